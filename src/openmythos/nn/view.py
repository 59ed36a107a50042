"""What a layer sees besides its input: positions and mask, keys and values, per-loop deltas."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from openmythos.kernels.experts import ExpertWeights
from openmythos.nn.layout import AttentionContext
from openmythos.nn.linear import Deltas
from openmythos.types import KeyValues, Mask

Project = Callable[[], Tensor]


@runtime_checkable
class KVView(Protocol):
    """The keys and values that one attention layer sees in one call."""

    def update(self, project: Project) -> KeyValues:
        """Keys and values [batch, kv_seq, kv_width] to attend to.

        `project` computes K/V of this call's own tokens; a view that has them does not call it.
        """


class NoCache:
    """No cache: only this call's own tokens."""

    def update(self, project: Project) -> KeyValues:
        return project()


@dataclass(frozen=True)
class Cached:
    """Earlier tokens from a cache, followed by this call's `seq` tokens.

    `writes` is False in loops that read what an earlier loop has stored (see `nn.cache`).
    """

    storage: Tensor  # [batch, capacity, kv_width]
    start: int  # columns filled by earlier calls
    seq: int
    writes: bool = True

    def update(self, project: Project) -> KeyValues:
        end = self.start + self.seq
        if self.writes:
            self.storage[:, self.start : end] = project()
        # A view, no copy: the cache is for inference, without autograd.
        return self.storage[:, :end]

    def own(self) -> KeyValues:
        """Keys and values of this call's tokens, once they have been written."""
        return self.storage[:, self.start : self.start + self.seq]


@dataclass(frozen=True)
class CachedRows:
    """A new token of every row at its own column of a cache, all of it said by tensors.

    With `slot` each row also has its own slot. Rows whose `writes` is False keep what is stored.
    """

    storage: Tensor  # [batch, capacity, kv_width]; with `slot` [slots, batch, capacity, kv_width]
    column: Tensor  # [batch] where the token goes
    total: int  # columns to read: the context's mask hides those that are not filled
    slot: Tensor | None = None  # [batch]
    writes: Tensor | None = None  # [batch]; None: all rows write

    def own(self) -> KeyValues:
        """Keys and values [batch, 1, kv_width] of the new tokens."""
        return self.storage[self._at()][:, None]

    def _at(self) -> tuple[Tensor, ...]:
        rows = torch.arange(self.column.shape[0], device=self.column.device)
        return (rows, self.column) if self.slot is None else (self.slot, rows, self.column)

    def update(self, project: Project) -> KeyValues:
        at = self._at()
        new = project()[:, 0].to(self.storage.dtype)
        if self.writes is not None:
            new = torch.where(self.writes[:, None], new, self.storage[at])
        self.storage[at] = new
        if self.slot is None:
            return self.storage[:, : self.total]
        return self.storage[at[0], at[1], : self.total]


@dataclass
class Halting:
    """Keys and values with halting: a halted position keeps those of its last loop.

    `kv` [batch, seq, kv_width] has all positions: before `update` from the previous loop, then from
    this one. `active` marks the positions that this loop computes; None: all. With `columns`
    [batch, width] only these columns of each row are computed, and `active` is [batch, width].
    """

    inner: KVView
    kv: Tensor | None
    active: Mask | None = None
    columns: Tensor | None = None

    def update(self, project: Project) -> KeyValues:
        return self.inner.update(lambda: self._merge(project()))

    def kept(self) -> KeyValues:
        """Keys and values of all positions after this loop."""
        assert self.kv is not None
        return self.kv

    def _merge(self, new: Tensor) -> Tensor:
        old, index = self.kv, None
        if old is not None and self.columns is not None:
            index = self.columns[..., None].expand(-1, -1, new.shape[2])
        if old is not None and self.active is not None:
            before = old if index is None else old.gather(1, index)
            new = torch.where(self.active[..., None], new, before)
        self.kv = new if old is None or index is None else old.scatter(1, index, new)
        return self.kv


@dataclass(frozen=True)
class LayerView:
    """What one layer sees in one call, besides its input.

    `active` [batch, seq] is False where the feed-forward is skipped; None: computed everywhere.
    `expert_weights` are shared by the loops of a pass. With `collects` the layer returns router
    statistics, as in training. `last_only`: the output is computed at the last position alone.
    `loop`: index of the loop, [1], or of each row's own [batch]; None outside the recurrent block
    and where no layer asks for it (`FeedForwardLayer.asks_loop`).
    """

    context: AttentionContext
    kv: KVView = field(default_factory=NoCache)
    deltas: Deltas = field(default_factory=dict)
    expert_weights: ExpertWeights | None = None
    active: Mask | None = None
    collects: bool = False
    last_only: bool = False
    loop: Tensor | None = None
