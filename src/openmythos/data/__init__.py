"""From text to batches: tokenizers, corpora, token shards and the loader."""
