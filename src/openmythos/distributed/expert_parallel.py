"""Expert parallelism: experts sharded over ranks, tokens dispatched and combined by all-to-all.

Every `Parallel.experts` neighbouring ranks are an experts group. Rank i of a group holds the i-th
part of each expert stack. FSDP2 shards that part over the groups (and replicates it, with HSDP) as
it shards other weights over all ranks. No row is dropped: ranks first exchange the row counts.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_common
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo
from torch.distributed.tensor import Shard, distribute_tensor

from openmythos import kernels
from openmythos.config import ConfigError, require
from openmythos.model.mythos import OpenMythos
from openmythos.nn.dispatch import Dispatched
from openmythos.nn.moe import MoELayer

if TYPE_CHECKING:
    from torch.distributed.fsdp._fully_shard._fsdp_common import ShardPlacementResult

# The mesh and dimension that FSDP2 shards a parameter on; None: the default.
Placement = Callable[[nn.Parameter], "ShardPlacementResult | None"]


class _AllToAll(torch.autograd.Function):
    """All-to-all of rows, received in order of rank; backward returns their gradients."""

    @staticmethod
    def forward(ctx, rows, sent, received, group):  # type: ignore[no-untyped-def]
        ctx.sizes, ctx.group = (sent, received), group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    @kernels.first_order
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        sent, received = ctx.sizes
        return _all_to_all(grad, received, sent, ctx.group), None, None, None


def _all_to_all(
    rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out


class AllToAllDispatcher:
    """An `nn.dispatch.TokenDispatcher` over a group of ranks with equally many experts each."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def dispatch(self, rows: Tensor, counts: Tensor) -> Dispatched:
        to_others = counts.long().view(self._group.size(), -1)
        to_me = torch.empty_like(to_others)
        dist.all_to_all_single(to_me, to_others, group=self._group)
        sent, received = torch.stack((to_others.sum(dim=1), to_me.sum(dim=1))).tolist()
        local = torch.arange(to_me.shape[1], device=rows.device).repeat(len(to_me))
        expert = local.repeat_interleave(to_me.flatten())
        arrived = _AllToAll.apply(rows, sent, received, self._group)  # type: ignore[no-untyped-call]
        return Dispatched(arrived, expert, (sent, received))

    def combine(self, results: Tensor, dispatched: Dispatched) -> Tensor:
        sent, received = dispatched.sizes
        returned: Tensor = _AllToAll.apply(results, received, sent, self._group)  # type: ignore[no-untyped-call]
        return returned


def check_experts(model: OpenMythos, experts: int) -> None:
    """Raise a ConfigError unless every MoE layer can be split into `experts` parts."""
    if not hasattr(_fsdp_common, "ShardPlacementResult"):
        raise ConfigError(
            f"experts = {experts}: must be 1 with torch {torch.__version__}, which cannot shard "
            "experts over other ranks than the rest; update torch"
        )
    layers = _layers(model)
    if not layers:
        raise ConfigError(f"experts = {experts}: must be 1 for a model without routed experts")
    for layer in layers:
        held = layer.config.num_experts
        text = f"must divide the number of routed experts = {held}"
        require(held % experts == 0, "experts", experts, text)


def split_experts(model: OpenMythos, mesh: DeviceMesh) -> Placement:
    """Shard the expert stacks over the mesh's "experts"; returns the placements for FSDP2."""
    group = mesh.get_group("experts")
    names = tuple(name for name in mesh.mesh_dim_names or () if name != "experts")
    split = set()
    for layer in _layers(model):
        layer.dispatcher = AllToAllDispatcher(group)
        for name, weight in layer.experts.named_parameters():
            # All ranks have the same weights: no broadcast is needed.
            part = distribute_tensor(
                weight.detach(), mesh["experts"], [Shard(0)], src_data_rank=None
            )
            setattr(layer.experts, name, nn.Parameter(part))
            split.add(layer.experts.get_parameter(name))
    model.recurrent.sync_num_loops = functools.partial(_largest, group=group)
    others = mesh[names]
    info = (
        FSDPMeshInfo(others, shard_mesh_dim=0)
        if len(names) == 1
        else HSDPMeshInfo(others, shard_mesh_dim=1, replicate_mesh_dim=0)
    )
    own = _fsdp_common.ShardPlacementResult(Shard(0), info)
    return lambda weight: own if weight in split else None


def average_over_all(units: Sequence[nn.Module]) -> None:
    """Make FSDP2 divide expert gradients by the world size, as it does all other gradients.

    They are sums over the rows of their experts group already; the loss is a mean over ranks.
    """
    for unit in units:
        for group in fully_shard.state(unit)._fsdp_param_groups:  # type: ignore[attr-defined]
            if group.mesh_info.mesh.size() < dist.get_world_size():
                group.gradient_divide_factor = float(dist.get_world_size())
                # Gloo cannot scale in a reduction. In a group of one, torch divides without this.
                group.force_sum_reduction_for_comms = group.mesh_info.shard_mesh_size > 1


def _layers(model: OpenMythos) -> list[MoELayer]:
    return [module for module in model.modules() if isinstance(module, MoELayer)]


def _largest(number: int, group: dist.ProcessGroup) -> int:
    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    return int(found)
