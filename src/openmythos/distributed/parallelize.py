"""One model over many ranks: experts split over ranks, weights sharded by FSDP2.

The model code knows one device; only experts and initialisation meet DTensors. Applied from outside
and in this order: activation checkpointing, compiled layers, expert parallelism, sharded weights.
Each prelude layer, the recurrent block and each coda layer is one FSDP unit: its weights are
gathered once per pass, however many loops the block runs.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from openmythos.config import require, require_int
from openmythos.distributed.expert_parallel import average_over_all, check_experts, split_experts
from openmythos.distributed.ranks import rank_and_world_size, sum_over_ranks
from openmythos.model.init import init_weights
from openmythos.model.mythos import OpenMythos


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


def by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters in lists of one mesh each: torch's operators on lists take no other."""
    found: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        found.setdefault(mesh, []).append(parameter)
    return list(found.values())
