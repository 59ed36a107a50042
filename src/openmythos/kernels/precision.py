"""Compute dtypes: autocast does not apply inside custom autograd functions."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def as_autocast(x: Tensor) -> Tensor:
    """x in the dtype of a matmul in this context: autocast's, if it is enabled."""
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
    """x in fp32, or in fp64 if it already is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
