"""Ranks: how processes find each other, what they agree on, and how they end.

torchrun starts the ranks; without it every function here means one process.
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

# A collective that waits longer for a rank ends the job.
PATIENCE = timedelta(seconds=50)
# Ranks that read files may differ more: machines, and their disks, are not equally fast.
PATIENCE_WITH_FILES = timedelta(hours=1)


def launched() -> tuple[int, int]:
    """(rank, ranks) as torchrun has started this process; (0, 1) where it has not."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def launched_here() -> tuple[int, int]:
    """(rank, ranks) among those that torchrun has started on this machine."""
    rank, ranks = os.environ.get("LOCAL_RANK", "0"), os.environ.get("LOCAL_WORLD_SIZE", "1")
    return int(rank), int(ranks)


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """The ranks that torchrun has started, none where it has not; `device` is the current one.

    Raises ConnectionError where a rank no longer answers the others.
    """
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index or 0)
    if launched()[1] == 1 or dist.is_initialized():
        yield
        return
    backend = "gloo"
    if device.type != "cpu":
        backend = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device.type)}"
    store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # Restarted ranks meet in the same store, where the former have left their addresses.
        store = PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    try:
        yield
    except RuntimeError as error:
        said = str(error)
        if "Timed out waiting" in said:
            waited = re.search(r"waiting (\d+) ?ms", said)
            seconds = int(waited[1]) // 1000 if waited else PATIENCE.seconds
            told = f"waited {seconds} s in vain for the others"
        elif "Connection closed by peer" in said or "Connection reset by peer" in said:
            told = "lost the connection to another"
        else:
            raise
        raise ConnectionError(f"rank {launched()[0]}: {told}") from error
    finally:
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process; a rank's at once, for gloo's threads outlive their group.

    One that drops a tensor while the interpreter winds up would abort a rank that is done.
    """
    if launched()[1] == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def whole(x: Tensor) -> Tensor:
    """All of a tensor that may be in shards."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def rank_and_world_size() -> tuple[int, int]:
    """(0, 1) outside a distributed run."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def wait_for_files() -> None:
    """Return when all ranks have done what each does with files of its own."""
    if rank_and_world_size()[1] == 1:
        return
    group = dist.new_group(backend="gloo", timeout=PATIENCE_WITH_FILES)
    dist.barrier(group)
    dist.destroy_process_group(group)


def first_rank_does(work: Callable[[], T]) -> T | None:
    """What `work` returns on rank 0; None on the others, which wait, and fail if it fails."""
    rank, size = rank_and_world_size()
    if size == 1:
        return work()
    group = dist.new_group(backend="gloo", timeout=PATIENCE_WITH_FILES)
    done, failure = None, [""]
    try:
        if rank == 0:
            done = work()
    except BaseException as error:
        line = next(iter(str(error).splitlines()), "")
        failure = [line or type(error).__name__]
        raise
    finally:
        dist.broadcast_object_list(failure, src=0, group=group)
    dist.destroy_process_group(group)
    if rank > 0 and failure[0]:
        raise ConfigError(f"rank 0 failed: {failure[0]}")
    return done


def wait_for_file(path: Path) -> None:
    """Return when a file that another rank has written is seen here: file systems may lag."""
    deadline = time.monotonic() + PATIENCE.total_seconds()
    while not path.is_file():
        if time.monotonic() > deadline:
            told = f"not seen by rank {launched()[0]} {PATIENCE.seconds} s after rank 0 wrote it"
            raise ConfigError(f"{path}: {told}; all ranks must share the folder")
        time.sleep(0.1)


@torch.no_grad()
def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of every rank's x."""
    if rank_and_world_size()[1] > 1:
        dist.all_reduce(x)
    return x


@torch.no_grad()
def mean_over_ranks(values: Sequence[Tensor]) -> list[Tensor]:
    """Every scalar's mean over all ranks, in one message."""
    if rank_and_world_size()[1] == 1 or not values:
        return [value.detach() for value in values]
    stacked = torch.stack([value.detach().float() for value in values])
    return list(sum_over_ranks(stacked) / rank_and_world_size()[1])
