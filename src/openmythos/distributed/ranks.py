"""Ranks: process group, sums and means over ranks, waiting for rank 0, end of a process.

torchrun starts the ranks; without it every function here works for the single process.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from openmythos.config import ConfigError

T = TypeVar("T")

TIMEOUT = timedelta(seconds=50)  # of collectives
FILE_TIMEOUT = timedelta(hours=1)  # of barriers after reading files: disks are not equally fast


def launched() -> tuple[int, int]:
    """(rank, world size) set by torchrun; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def launched_here() -> tuple[int, int]:
    """(rank, number of ranks) among the ranks on this machine."""
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Make `device` the current one and, under torchrun, join the process group.

    Raises ConnectionError after a timeout or if the connection to another rank is lost.
    """
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index or 0)
    if launched()[1] == 1 or dist.is_initialized():
        yield
        return
    backend = "gloo"
    if device.type != "cpu":
        backend = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device.type)}"
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # After a restart the store still holds the addresses of the former ranks.
        store = PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if "Timed out waiting" in text:
            waited = re.search(r"waiting (\d+) ?ms", text)
            seconds = int(waited[1]) // 1000 if waited else TIMEOUT.seconds
            reason = f"timed out after {seconds} s in a collective; another rank hangs or died"
        elif "Connection closed by peer" in text or "Connection reset by peer" in text:
            reason = "lost the connection to another rank"
        else:
            raise
        raise ConnectionError(f"rank {launched()[0]}: {reason}") from error
    finally:
        dist.destroy_process_group()


def exit_process(code: int) -> NoReturn:
    """End this process; under torchrun without the interpreter's clean-up.

    gloo's threads outlive the process group: one that frees a tensor during clean-up aborts the
    process.
    """
    if launched()[1] == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def full_tensor(x: Tensor) -> Tensor:
    """The full tensor of a DTensor; any other tensor as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def rank_and_world_size() -> tuple[int, int]:
    """(rank, world size) of the process group; (0, 1) without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def wait_for_files() -> None:
    """Barrier with FILE_TIMEOUT, for ranks that have read or written files."""
    if rank_and_world_size()[1] == 1:
        return
    group = dist.new_group(backend="gloo", timeout=FILE_TIMEOUT)
    dist.barrier(group)
    dist.destroy_process_group(group)


def first_rank_does(work: Callable[[], T]) -> T | None:
    """The result of `work` on rank 0; None on other ranks, which wait and raise if it fails."""
    rank, size = rank_and_world_size()
    if size == 1:
        return work()
    group = dist.new_group(backend="gloo", timeout=FILE_TIMEOUT)
    result, failure = None, [""]
    try:
        if rank == 0:
            result = work()
    except BaseException as error:
        line = next(iter(str(error).splitlines()), "")
        failure = [line or type(error).__name__]
        raise
    finally:
        dist.broadcast_object_list(failure, src=0, group=group)
    dist.destroy_process_group(group)
    if rank > 0 and failure[0]:
        raise ConfigError(f"rank 0 failed: {failure[0]}")
    return result


def wait_for_file(path: Path) -> None:
    """Wait until a file written by another rank is visible here: file systems may lag."""
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    while not path.is_file():
        if time.monotonic() > deadline:
            late = f"not visible to rank {launched()[0]} {TIMEOUT.seconds} s after rank 0 wrote it"
            raise ConfigError(f"{path}: {late}; all ranks must share the folder")
        time.sleep(0.1)


@torch.no_grad()
def sum_over_ranks(x: Tensor) -> Tensor:
    """All-reduce `x` in place."""
    if rank_and_world_size()[1] > 1:
        dist.all_reduce(x)
    return x


@torch.no_grad()
def mean_over_ranks(values: Sequence[Tensor]) -> list[Tensor]:
    """The mean of each scalar over all ranks, by one all-reduce."""
    if rank_and_world_size()[1] == 1 or not values:
        return [value.detach() for value in values]
    stacked = torch.stack([value.detach().float() for value in values])
    return list(sum_over_ranks(stacked) / rank_and_world_size()[1])
