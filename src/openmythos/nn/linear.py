"""Linear maps that can carry a low-rank delta, and the norm of the whole project."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LowRank(NamedTuple):
    """A low-rank change of a linear map: W + up @ down."""

    down: Tensor  # [rank, in_features]
    up: Tensor  # [out_features, rank]


Deltas = Mapping[str, LowRank]
NO_DELTAS: Deltas = {}


class Linear(nn.Linear):
    """y = x W^T (+ b), with W + up @ down in place of W where `deltas` names this map.

    `delta_key` is empty until somebody (`recurrence.conditioning`) registers the map for adapting.
    """

    delta_key: str = ""

    def forward(self, x: Tensor, deltas: Deltas = NO_DELTAS) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        delta = deltas.get(self.delta_key)
        if delta is None:
            return y
        return y + F.linear(F.linear(x, delta.down), delta.up)

    def merged_weight(self, deltas: Deltas) -> Tensor:
        """The weight [out_features, in_features] with its delta added, for paths that need W."""
        delta = deltas.get(self.delta_key)
        return self.weight if delta is None else self.weight + delta.up @ delta.down


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # torch's kernel refuses a weight of another dtype, as autocast produces.
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
