"""One model on many ranks: expert parallelism, and FSDP2 for all other weights.

The model code is written for one device; only experts and initialisation handle DTensors. Applied
in this order: activation checkpointing, torch.compile, expert parallelism, FSDP2. Each prelude
layer, the recurrent block and each coda layer is one FSDP unit: its weights are all-gathered once
per forward and once per backward pass, whatever the number of loops.
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
    """How a model is distributed: `replicate` replicas, each sharded over `shard` ranks (0: all).

    Every rank reads its own part of the batch. With one replica this is FSDP, with several HSDP.
    `experts` neighbouring ranks of a replica divide the routed experts among themselves (expert
    parallelism). `gather` is the dtype of the all-gathered weights, bf16 only with autocast;
    gradients are reduced in fp32.
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
        """All ranks in the dimensions ("replicate", "shard"), or ("shard",) for one replica."""
        return self._mesh(device, shard=self._shard_size())

    def expert_mesh(self, device: str) -> DeviceMesh:
        """The same ranks with "shard" divided into ("shard", "experts")."""
        shard = self._shard_size()
        require(shard % self.experts == 0, "experts", self.experts, f"must divide shard = {shard}")
        return self._mesh(device, shard=shard // self.experts, experts=self.experts)

    def _mesh(self, device: str, **sizes: int) -> DeviceMesh:
        if self.replicate > 1:
            sizes = {"replicate": self.replicate, **sizes}
        return init_device_mesh(device, tuple(sizes.values()), mesh_dim_names=tuple(sizes))

    def _shard_size(self) -> int:
        size = rank_and_world_size()[1]
        shard = self.shard or max(1, size // self.replicate)
        allowed = f"times shard = {shard} must be the number of ranks = {size}"
        require(self.replicate * shard == size, "replicate", self.replicate, allowed)
        return shard


def parallelize(
    model: OpenMythos,
    parallel: Parallel,
    *,
    device: torch.device,
    checkpoint_loops: bool,
    compiled: bool,
    seed: int = 0,
) -> OpenMythos:
    """Distribute the model in place; weights, if there are any yet, must be equal on all ranks.

    A model on the meta device is initialised from `seed` after sharding: no rank ever holds more
    than one full parameter.
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
        register_fsdp_forward_method(model.recurrent, "scheduled")
    if next(model.parameters()).is_meta:
        model.to_empty(device=device)
        zero_outputs = model.config.zero_init_outputs
        generator = torch.Generator().manual_seed(seed)
        init_weights(model, zero_outputs=zero_outputs, generator=generator)
    return model


def reduce_gradients(model: OpenMythos, on: bool) -> None:
    """Set whether the next backward pass reduces gradients over ranks (the last of a step)."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients down if their norm exceeds `max_norm`; returns the norm before.

    One all-reduce gives the norm, since shards may be on several meshes and all replicas must use
    the same value.
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
    """Parameters grouped by mesh, as torch's foreach operators need them."""
    found: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        found.setdefault(mesh, []).append(parameter)
    return list(found.values())
