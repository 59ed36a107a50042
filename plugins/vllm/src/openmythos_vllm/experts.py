"""Routed experts by vLLM's fused operator for CPUs.

Only the sum over the chosen experts is vLLM's: the router stays ours, so that its delta per loop,
its bias and both kinds of scores need no counterpart there.
"""

from typing import cast

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.platforms import CpuArchEnum, current_platform

from openmythos.nn.feed_forward import RouterStats
from openmythos.nn.moe import MoELayer
from openmythos.nn.view import LayerView
from openmythos.types import Hidden

# The operator's blocks; other widths are computed by torch.
MULTIPLE = 32
DTYPES = (torch.float32, torch.bfloat16)


class FusedMoELayer(MoELayer):
    """The same function. The stacks of weights have the operator's layout, see `fuse`."""

    instructions: str

    def shared_weights(self) -> None:  # type: ignore[override]
        """Nothing to prepare."""

    def forward(self, x: Hidden, view: LayerView) -> tuple[Hidden, RouterStats | None]:
        tokens = x.flatten(0, 1)
        out = torch.empty_like(tokens)
        routing = self.router(tokens, view.deltas, view.loop)
        ops.cpu_fused_moe(
            out,
            tokens.contiguous(),
            self.experts.gate_up,
            self.experts.down,
            None,
            None,
            routing.weights.float(),
            routing.chosen.int(),
            "silu",
            self.instructions,
        )
        out = out.view(x.shape)
        return out if self.shared_expert is None else out + self.shared_expert(x, view)[0], None


def fuse(layer: MoELayer) -> bool:
    """Turn a loaded layer into a `FusedMoELayer` where the operator has its shapes."""
    stacks = (layer.experts.gate_up, layer.experts.down)
    on_cpu = current_platform.is_cpu()
    if not on_cpu or current_platform.get_cpu_architecture() != CpuArchEnum.X86:
        return False
    if stacks[0].dtype not in DTYPES or any(n % MULTIPLE for n in stacks[1].shape[1:]):
        return False
    tiles = stacks[0].dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    instructions = "amx" if tiles else "vec"
    for stack in stacks:
        packed = ops.cpu_prepack_moe_weight(stack.data.contiguous(), instructions)
        stack.data = cast("Tensor", packed)
    layer.__class__ = FusedMoELayer
    cast("FusedMoELayer", layer).instructions = instructions
    return True
