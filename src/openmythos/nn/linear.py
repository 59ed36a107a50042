"""Linear maps that can carry a low-rank delta."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openmythos.nn.facts import Fill, identity


class LowRank(NamedTuple):
    """A low-rank change of a linear map: W + up @ down.

    With a first dimension each row has its own change, for rows that are in different loops:
    down [batch, rank, in_features], up [batch, out_features, rank], or of the changes
    [changes, ...] that of number `which` [batch].
    """

    down: Tensor  # [rank, in_features]
    up: Tensor  # [out_features, rank]
    which: Tensor | None = None

    def times(self, x: Tensor) -> Tensor:
        """up @ down @ x for x [..., in_features]; [batch, ..., in_features] if batched."""
        if self.down.ndim == 2:
            return F.linear(F.linear(x, self.down), self.up)
        down, up, _ = self.by_row()
        rows = x.reshape(len(down), -1, x.shape[-1])
        return (rows @ down.mT @ up.mT).view(*x.shape[:-1], up.shape[-2])

    def by_row(self) -> "LowRank":
        """Without `which`: the change of each row."""
        if self.which is None:
            return self
        return LowRank(self.down[self.which], self.up[self.which])

    def to(self, dtype: torch.dtype) -> "LowRank":
        return LowRank(self.down.to(dtype), self.up.to(dtype), self.which)


Deltas = Mapping[str, LowRank]
NO_DELTAS: Deltas = {}


def addresses(deltas: Deltas) -> list[int]:
    """Where the numbers of deltas are in memory; others mean that they were replaced."""
    return [x.data_ptr() for delta in deltas.values() for x in (delta.down, delta.up)]


def per_row(deltas: Deltas) -> bool:
    """Whether the deltas have a batch dimension: one delta per row."""
    return any(delta.down.ndim == 3 for delta in deltas.values())


class Linear(nn.Linear):
    """y = x W^T (+ b), with W + up @ down in place of W where `deltas` names this map.

    `delta_key` is empty unless `recurrence.loop_lora` adapts this map.
    """

    delta_key: str = ""

    def forward(self, x: Tensor, deltas: Deltas = NO_DELTAS) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        delta = deltas.get(self.delta_key)
        return y if delta is None else y + delta.times(x)


class ReadoutMap(nn.Linear):
    """C h: a linear map from the last state to the coda's input (Parcae, arXiv 2604.12946)."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, bias=False)

    def fills(self) -> dict[str, Fill]:
        return {"weight": identity}

    def forward(self, state: Tensor) -> Tensor:
        # Autocast computes the map in bf16, but the state keeps its own dtype.
        return F.linear(state, self.weight).to(state.dtype)
