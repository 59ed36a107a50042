"""Many ranks as one: how a model is spread over them, and what they have to agree on.

The model files know one device, but for experts and initialisation, which meet torch's DTensors.
Here, from outside and in this order: recomputed loops, compiled
layers, experts that ranks hold between them, weights in shards (torch's FSDP2). Prelude layers, the
recurrent block and coda layers are a unit each, gathered when they run: the block once per pass,
however many loops it runs.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from openmythos.config import ConfigError, require, require_int
from openmythos.model.init import init_weights
from openmythos.model.mythos import OpenMythos
from openmythos.train.expert_parallel import average_over_all, check_experts, split_experts
from openmythos.train.optim import by_mesh

T = TypeVar("T")

# A collective that waits longer for a rank ends the job.
PATIENCE = timedelta(seconds=50)
# Ranks that read files may differ more: machines, and their disks, are not equally fast.
PATIENCE_WITH_FILES = timedelta(hours=1)


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How ranks share the work: `replicate` groups of `shard` ranks (0: as many as there are).

    Every rank reads its own part of the batch. A group holds the model once, each of its ranks a
    part of every weight; more than one group is HSDP. `experts` of a group's ranks hold the routed
    experts between them, and tokens travel to those. `gather` is the dtype in which weights travel
    to where they are used, bf16 for autocast alone; gradients come back in fp32.
    """

    replicate: int = 1
    shard: int = 0
    experts: int = 1
    gather: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        require_int("replicate", self.replicate, minimum=1)
        require_int("shard", self.shard, minimum=0)
        require_int("experts", self.experts, minimum=1)

    def mesh(self, device: str) -> DeviceMesh:
        """All ranks, along ("replicate", "shard") or one of them alone."""
        shard = self._ranks_that_shard()
        if self.replicate == 1:
            return init_device_mesh(device, (shard,), mesh_dim_names=("shard",))
        return init_device_mesh(
            device, (self.replicate, shard), mesh_dim_names=("replicate", "shard")
        )

    def expert_mesh(self, device: str) -> DeviceMesh:
        """The same ranks along ("replicate", "shard", "experts"), or the last two alone."""
        shard = self._ranks_that_shard()
        text = f"must divide the number of ranks that shard = {shard}"
        require(shard % self.experts == 0, "experts", self.experts, text)
        sizes, names = (shard // self.experts, self.experts), ("shard", "experts")
        if self.replicate == 1:
            return init_device_mesh(device, sizes, mesh_dim_names=names)
        return init_device_mesh(
            device, (self.replicate, *sizes), mesh_dim_names=("replicate", *names)
        )

    def _ranks_that_shard(self) -> int:
        size = rank_and_world_size()[1]
        shard = self.shard or max(1, size // self.replicate)
        fits = self.replicate * shard == size
        text = f"times shard = {shard} must be the number of ranks = {size}"
        require(fits, "replicate", self.replicate, text)
        return shard


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


def spread(
    model: OpenMythos,
    parallel: Parallel,
    *,
    device: torch.device,
    checkpoint_loops: bool,
    compiled: bool,
    seed: int = 0,
) -> OpenMythos:
    """The model as a step runs it, in place; every rank comes with the same weights.

    One on the meta device gets its weights of `seed` when it is in shards, so that no rank ever
    holds more of it whole than one parameter.
    """
    model.recurrent.checkpoint_loops = checkpoint_loops
    if compiled:
        model.compile_layers()
    place = None
    if parallel.experts > 1:
        check_experts(model, parallel.experts)
        place = split_experts(model, parallel.expert_mesh(device.type))
    if rank_and_world_size()[1] > 1:
        mesh = parallel.mesh(device.type)
        narrow = torch.bfloat16 if parallel.gather == "bf16" else None
        policy = MixedPrecisionPolicy(
            param_dtype=narrow, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        units = (*model.prelude, model.recurrent, *model.coda, model)
        for unit in units:
            fully_shard(unit, mesh=mesh, mp_policy=policy, shard_placement_fn=place)
        if place is not None:
            average_over_all(units)
        register_fsdp_forward_method(model, "losses")
    if next(model.parameters()).is_meta:
        model.to_empty(device=device)
        init_weights(model, model.config, torch.Generator().manual_seed(seed))
    return model


def reduce_gradients(model: OpenMythos, on: bool) -> None:
    """Whether the next backward pass sums gradients over ranks: of a step's passes the last."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """The norm of all gradients, which are scaled down together where it is above max_norm.

    One sum over all ranks: shards may lie on several meshes, and replicas must get the same.
    """
    groups = by_mesh(parameter for parameter in parameters if parameter.grad is not None)
    grads = [p.grad for group in groups for p in group if p.grad is not None]
    norm = get_total_norm([x.to_local() if isinstance(x, DTensor) else x for x in grads])
    if isinstance(grads[0], DTensor):
        names = grads[0].device_mesh.mesh_dim_names or ()
        replicas = grads[0].device_mesh["replicate"].size() if "replicate" in names else 1
        norm = (sum_over_ranks(norm.square()) / replicas).sqrt()
    for group in groups:
        clip_grads_with_norm_(group, max_norm, norm)
    return norm


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
