"""Compute dtypes: autocast does not apply inside custom autograd functions."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# Asked once: torch.compile of torch 2.11 does not trace the question.
_WITH_AUTOCAST = frozenset(
    kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind)
)


def has_autocast(device: torch.device) -> bool:
    """Whether there is autocast for this type of device; some, such as meta, have none."""
    return device.type in _WITH_AUTOCAST or torch.amp.is_autocast_available(device.type)


def as_autocast(x: Tensor) -> Tensor:
    """x in the dtype of a matmul in this context: autocast's, if it is enabled."""
    device = x.device.type
    if has_autocast(x.device) and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Autocast off for the device of x."""
    off = has_autocast(x.device)
    return torch.autocast(x.device.type, enabled=False) if off else nullcontext()


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 if it already is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
