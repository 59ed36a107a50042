"""What ranks of a distributed run have to agree on."""

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_world_size() -> tuple[int, int]:
    """(0, 1) outside a distributed run."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@torch.no_grad()
def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of every rank's x."""
    if rank_and_world_size()[1] > 1:
        dist.all_reduce(x)
    return x


def choose_device(name: str) -> torch.device:
    """ "auto" is the accelerator if there is one, else the CPU."""
    if name != "auto":
        return torch.device(name)
    accelerator = torch.accelerator.current_accelerator()
    return torch.device("cpu") if accelerator is None else accelerator
