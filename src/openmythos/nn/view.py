"""What a layer is given besides its input: positions, keys and values, and what a loop changes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from openmythos.nn.experts import ExpertWeights
from openmythos.nn.layout import AttentionContext
from openmythos.nn.linear import Deltas
from openmythos.types import KeyValues, Mask


class KVView(Protocol):
    """The keys and values that one attention layer sees in one call."""

    def update(self, project: Callable[[], KeyValues]) -> KeyValues:
        """Keys and values [batch, kv_seq, kv_width] to attend to.

        `project` computes those of this call's own tokens; a view that needs none does not call it.
        """


class NoCache:
    """This call's own tokens and no others."""

    def update(self, project: Callable[[], KeyValues]) -> KeyValues:
        return project()


@dataclass(frozen=True)
class Cached:
    """Earlier tokens from a cache, to which this call's are appended.

    `writes` is False in loops that read what an earlier loop has written (see `nn.cache`).
    """

    storage: Tensor  # [batch, capacity, kv_width]
    start: int  # columns filled by earlier calls
    seq: int  # tokens of this call
    writes: bool

    def update(self, project: Callable[[], KeyValues]) -> KeyValues:
        end = self.start + self.seq
        if self.writes:
            self.storage[:, self.start : end] = project()
        return self.storage[:, :end]


@dataclass
class Halting:
    """Where positions may halt: a halted one keeps the keys and values of its last loop.

    Without `columns` every position is active. With them the call computes only the positions at
    `columns` [batch, longest] of each row, of which those with `active` are real and the others
    padding. `kv` [batch, seq, kv_width] holds all positions' keys and values, before and after.
    """

    kv: Tensor | None
    inner: "KVView"
    columns: Tensor | None = None
    active: Mask | None = None

    def update(self, project: Callable[[], KeyValues]) -> KeyValues:
        visible = self.inner.update(lambda: self._merged(project()))
        return visible

    def _merged(self, new: Tensor) -> Tensor:
        if self.columns is not None and self.active is not None:
            assert self.kv is not None
            places = self.columns[..., None].expand(-1, -1, new.shape[2])
            new = torch.where(self.active[..., None], new, self.kv.gather(1, places))
            new = self.kv.scatter(1, places, new)
        self.kv = new
        return new


@dataclass(frozen=True)
class LayerView:
    """One layer's surroundings in one call.

    `active` [batch, seq] is False at positions whose feed-forward is not computed (padding of
    halted rows); None: all are. `expert_weights` are made once for all loops. Router statistics
    are collected where `collects` is set: in training.
    """

    context: AttentionContext
    kv: KVView
    deltas: Deltas = field(default_factory=dict)
    expert_weights: ExpertWeights | None = None
    active: Mask | None = None
    collects: bool = False
