"""Linear maps that can carry a low-rank delta."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def as_autocast(x: Tensor) -> Tensor:
    """x in the dtype that a matmul would run in here; functions of our own do not see autocast."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


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
