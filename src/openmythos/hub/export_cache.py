"""The cache that `generate` of transformers hands to an exported model from step to step."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from openmythos.nn.cache import KVCache


class LoopCache(Cache):  # type: ignore[misc]
    """A `KVCache`, which has keys and values per layer and loop, as a cache of transformers."""

    is_compileable = False

    def __init__(self, native: KVCache) -> None:
        super().__init__(layers=[])
        self.native = native

    def make_room(self, seq: int) -> None:
        """Double the capacity, or more, unless `seq` more tokens fit."""
        needed = self.native.length + seq
        if needed > self.native.capacity:
            self.native.reserve(max(needed, 2 * self.native.capacity))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens in the cache."""
        return self.native.length

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: it grows as needed."""
        return -1

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: it grows as needed."""
        return -1

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        """(keys that the next query sees, offset of the first)."""
        seq = query_length if isinstance(query_length, int) else len(query_length)
        return self.native.length + seq, 0

    def crop(self, tokens: int) -> None:
        """Drop the last -tokens tokens if tokens <= 0, else keep only the first `tokens`."""
        length = self.native.length
        self.native.length = max(0, length + tokens) if tokens <= 0 else min(length, tokens)

    def reset(self) -> None:
        """Drop all tokens."""
        self.native.length = 0
        self.native.padded = False
        self.native.valid.fill_(True)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes row beam_idx[i]."""
        self.native.select_rows(beam_idx.to(self.native.valid.device))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        rows = torch.arange(self.native.batch)
        self.reorder_cache(rows.repeat_interleave(repeats))
