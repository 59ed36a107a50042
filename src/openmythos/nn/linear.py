"""Linear maps that can carry a low-rank delta."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def as_autocast(x: Tensor) -> Tensor:
    """x in the dtype that a matmul would run in here; functions of our own do not see autocast."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Autocast off for the device of x; some devices (meta) have none."""
    device = x.device.type
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else nullcontext()


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 where it is: half precision would not do."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


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
