"""Generation: decoding with a KV cache, sampling, text."""
