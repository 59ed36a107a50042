"""What a layer is given besides its input: positions, keys and values, and what a loop changes."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from openmythos.nn.experts import ExpertWeights
from openmythos.nn.layout import AttentionContext
from openmythos.nn.linear import Deltas
from openmythos.types import KeyValues, Mask

Project = Callable[[], Tensor]


@runtime_checkable
class KVView(Protocol):
    """The keys and values that one attention layer sees in one call."""

    def update(self, project: Project) -> KeyValues:
        """Keys and values [batch, kv_seq, kv_width] to attend to.

        `project` computes those of this call's own tokens. A view that has them already does not
        call it.
        """


class NoCache:
    """This call's own tokens and no others."""

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
        # A view, no copy: the cache is for inference, where autograd does not look at it.
        return self.storage[:, :end]


@dataclass(frozen=True)
class Given:
    """Keys and values that are known already."""

    kv: Tensor

    def update(self, project: Project) -> KeyValues:
        return self.kv


@dataclass
class Halting:
    """Where positions may halt: a halted one keeps the keys and values of its last loop.

    `kv` [batch, seq, kv_width] are those of all positions, from the loop before and then from this
    one. `active` marks the positions that this loop computes; None: all. With `columns` [batch,
    width] the call computes only these columns of each row, and `active` is [batch, width].
    """

    inner: KVView
    kv: Tensor | None
    active: Mask | None = None
    columns: Tensor | None = None

    def update(self, project: Project) -> KeyValues:
        return self.inner.update(lambda: self._merge(project()))

    def kept(self) -> KeyValues:
        """Those of all positions after this loop."""
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
    """One layer's surroundings in one call.

    `active` [batch, seq] is False at positions whose feed-forward is not computed; None: all are.
    `expert_weights` are shared by the loops of a pass. With `collects` the layer returns router
    statistics, as in training.
    """

    context: AttentionContext
    kv: KVView = field(default_factory=NoCache)
    deltas: Deltas = field(default_factory=dict)
    expert_weights: ExpertWeights | None = None
    active: Mask | None = None
    collects: bool = False

    def last(self, kv: Tensor) -> "LayerView":
        """The view of the last position alone, which attends to `kv`."""
        return replace(self, context=self.context.last(), kv=Given(kv))
