"""The routed experts of a mixture: SwiGLU networks with stacked weights."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from openmythos.kernels.experts import ExpertWeights, prepare, routed_experts
from openmythos.types import Tokens

__all__ = ["ExpertWeights", "Experts"]


class Experts(nn.Module):
    """num_experts SwiGLU networks: y_i = W_down,i (silu(g) * u) with [g | u] = W_gate_up,i x."""

    def __init__(self, num_experts: int, dim: int, expert_dim: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * expert_dim, dim))
        self.down = nn.Parameter(torch.empty(num_experts, dim, expert_dim))

    def weights(self) -> ExpertWeights:
        """The weights for `forward`, prepared once for many calls; the local shard if sharded."""
        stacks = (self.gate_up, self.down)
        return prepare(*(w.to_local() if isinstance(w, DTensor) else w for w in stacks))

    def forward(
        self, tokens: Tokens, row_weights: Tensor, chosen: Tensor, weights: ExpertWeights
    ) -> Tokens:
        """sum_i row_weights_i y_i over the experts chosen [tokens, top_k] for each token."""
        return routed_experts(tokens, row_weights, chosen, weights)
