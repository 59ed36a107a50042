"""In which dtype a formula is computed: functions of our own do not see autocast."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def as_autocast(x: Tensor) -> Tensor:
    """x in the dtype that a matmul would run in here."""
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
