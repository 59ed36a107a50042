"""Mixture of experts after DeepSeekMoE (arXiv 2401.06066) and DeepSeek-V3 (arXiv 2412.19437).

Fine-grained routed experts with stacked weights, shared experts that every token passes, dropless
routing on tokens sorted by expert. Balance comes from `router_bias`, which only decides who is
chosen, never the weight of a chosen expert, and which the trainer moves after each step
(`update_router_bias`, arXiv 2408.15664). The layer changes no state in its forward pass, so that
it may run any number of times per step, also under activation checkpointing.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openmythos.config import require, require_int, require_number
from openmythos.nn.feed_forward import SwiGLULayer, TokenRows
from openmythos.nn.linear import NO_DELTAS, Deltas
from openmythos.types import Tokens

# The grouped kernels want rows of whole 16 bytes: 8 numbers in bf16.
ALIGNMENT = 8


class RouterStats(NamedTuple):
    """Sums over the routed tokens of one or more calls: add two to join them."""

    counts: Tensor  # [num_experts] tokens sent to each expert
    balance: Tensor  # sum over sequences of sum_i f_i P_i (1 = perfect balance)
    z: Tensor  # sum over tokens of logsumexp(router logits)^2
    sequences: Tensor  # number of summed sequences
    tokens: Tensor  # number of summed tokens

    def plus(self, other: "RouterStats | None") -> "RouterStats":
        if other is None:
            return self
        return RouterStats(*(a + b for a, b in zip(self, other, strict=True)))

    def max_violation(self) -> Tensor:
        """MaxVio = (largest load - mean load) / mean load (arXiv 2408.15664)."""
        mean = self.counts.mean()
        return (self.counts.max() - mean) / mean


@dataclass(frozen=True, kw_only=True)
class MoE:
    """num_experts routed experts of width expert_dim, top_k of them per token, plus shared ones.

    The weight of a chosen expert is its score, normalised over the chosen, times route_scale.
    bias_rate moves router_bias per step (0 = off); balance_weight and z_weight scale the
    sequence-wise balance loss and the router z-loss in training.
    """

    kind: Literal["moe"] = "moe"
    num_experts: int = 16
    top_k: int = 2
    expert_dim: int = 128
    num_shared_experts: int = 1
    score: Literal["sigmoid", "softmax"] = "sigmoid"
    normalize_top_k: bool = True
    route_scale: float = 1.0
    bias_rate: float = 1e-3
    balance_weight: float = 1e-4
    z_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k", "expert_dim"):
            require_int(name, getattr(self, name), minimum=1)
        require_int("num_shared_experts", self.num_shared_experts, minimum=0)
        require(
            self.expert_dim % ALIGNMENT == 0,
            "expert_dim",
            self.expert_dim,
            f"must be a multiple of {ALIGNMENT}",
        )
        require(
            self.top_k <= self.num_experts,
            "top_k",
            self.top_k,
            f"must be at most num_experts = {self.num_experts}",
        )
        require_number("route_scale", self.route_scale, above=0)
        for name in ("bias_rate", "balance_weight", "z_weight"):
            require_number(name, getattr(self, name), at_least=0)

    def build(self, dim: int) -> "MoELayer":
        require(dim % ALIGNMENT == 0, "dim", dim, f"must be a multiple of {ALIGNMENT} with experts")
        return MoELayer(self, dim)


@torch.library.custom_op("openmythos::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows [ends[g-1], ends[g]) of x [tokens, in] times weight[g]^T, weight [groups, out, in].

    A custom operator because torch's grouped_mm refuses fp32 on meta tensors, hence under
    torch.compile; in eager mode it costs nothing more.
    """
    return F.grouped_mm(x, weight.transpose(-2, -1), offs=ends)


@grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("openmythos::grouped_outer", mutates_args=())
def grouped_outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Per group g of rows: left_g^T right_g, [groups, left_dim, right_dim]."""
    return F.grouped_mm(left.transpose(0, 1), right, offs=ends)


@grouped_outer.register_fake
def _(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty(ends.shape[0], left.shape[1], right.shape[1])


def _save_for_backward(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _grouped_linear_backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, weight, ends = ctx.saved_tensors
    grad = grad.contiguous()  # grouped_mm refuses the stride-0 gradient that sum() produces
    grad_x = grouped_linear(grad, weight.transpose(-2, -1), ends)
    return grad_x, grouped_outer(grad, x, ends), None


grouped_linear.register_autograd(_grouped_linear_backward, setup_context=_save_for_backward)


def _autocast(x: Tensor) -> Tensor:
    """x in the dtype that a matmul would run in here; custom operators do not see autocast."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


class ExpertWeights(NamedTuple):
    """The stacked weights in the dtype that they are used in, made once for all loops."""

    gate_up: Tensor  # [num_experts, 2 * expert_dim, dim]
    down: Tensor  # [num_experts, dim, expert_dim]


class Experts(nn.Module):
    """num_experts SwiGLU networks with stacked weights."""

    def __init__(self, num_experts: int, dim: int, expert_dim: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * expert_dim, dim))
        self.down = nn.Parameter(torch.empty(num_experts, dim, expert_dim))

    def weights(self) -> ExpertWeights:
        """Cast as autocast would: it caches only what its own operators cast."""
        return ExpertWeights(_autocast(self.gate_up), _autocast(self.down))

    def forward(self, tokens: Tokens, ends: Tensor, weights: ExpertWeights) -> Tokens:
        """Tokens sorted by expert; expert g owns the rows before ends[g]."""
        gate, up = grouped_linear(_autocast(tokens), weights.gate_up, ends).chunk(2, dim=-1)
        return grouped_linear(F.silu(gate) * up, weights.down, ends)


class Router(nn.Module):
    """scores s = sigmoid(W x) or softmax(W x); the top_k of s + router_bias are chosen."""

    router_bias: Tensor

    def __init__(self, config: MoE, dim: int) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, dim))
        self.register_buffer("router_bias", torch.zeros(config.num_experts))

    def forward(self, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(weights [tokens, top_k], experts [tokens, top_k], scores, logits [tokens, experts])."""
        c = self.config
        # In fp32: a rounded score flips choices, and nothing here is large.
        with torch.autocast(tokens.device.type, enabled=False):
            logits = F.linear(tokens.float(), self.weight.float())
        scores = logits.sigmoid() if c.score == "sigmoid" else logits.softmax(dim=-1)
        experts = (scores.detach() + self.router_bias.float()).topk(c.top_k, dim=-1).indices
        weights = scores.gather(1, experts)
        if c.normalize_top_k:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * c.route_scale, experts, scores, logits


class MoELayer(nn.Module):
    """y = sum_{i in top_k} g_i Expert_i(x) + SharedExpert(x)."""

    def __init__(self, config: MoE, dim: int) -> None:
        super().__init__()
        self.config = config
        self.router = Router(config, dim)
        self.experts = Experts(config.num_experts, dim, config.expert_dim)
        self.shared_expert = (
            SwiGLULayer(dim, config.num_shared_experts * config.expert_dim)
            if config.num_shared_experts
            else None
        )

    def forward(
        self,
        tokens: Tokens,
        rows: TokenRows,
        deltas: Deltas = NO_DELTAS,
        expert_weights: ExpertWeights | None = None,
    ) -> tuple[Tokens, RouterStats | None]:
        """Statistics come in training only; `rows` is for the sequence-wise balance loss."""
        c = self.config
        if expert_weights is None:
            expert_weights = self.experts.weights()
        weights, experts, scores, logits = self.router(tokens)
        counts = torch.zeros(c.num_experts, dtype=torch.int32, device=tokens.device)
        chosen = experts.flatten()
        counts = counts.scatter_add(0, chosen, torch.ones_like(chosen, dtype=torch.int32))
        order = chosen.argsort()
        source = order // c.top_k
        ends = counts.cumsum(0, dtype=torch.int32)
        routed = self.experts(tokens[source], ends, expert_weights)
        # Back to token order, where the top_k outputs of a token are neighbours.
        routed = torch.empty_like(routed).index_copy(0, order, routed)
        routed = routed.view(-1, c.top_k, routed.shape[-1])
        out = torch.einsum("tkd,tk->td", routed, weights.to(routed.dtype))
        if self.shared_expert is not None:
            out = out + self.shared_expert(tokens, rows, deltas)[0]
        if not self.training:
            return out, None
        return out, self._stats(counts, experts, scores, logits, rows)

    def _stats(
        self,
        counts: Tensor,
        experts: Tensor,
        scores: Tensor,
        logits: Tensor,
        rows: TokenRows,
    ) -> RouterStats:
        """Per row, f_i = num_experts / top_k * share of choices and P_i = mean normalised score."""
        c = self.config
        zeros = scores.new_zeros(rows.num_rows, c.num_experts)
        probability = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
        chosen = torch.zeros_like(scores).scatter(1, experts, 1.0)
        choices = zeros.index_add(0, rows.row, chosen)
        probabilities = zeros.index_add(0, rows.row, probability)
        size = choices.sum(dim=-1) / c.top_k
        per_row = (choices * probabilities).sum(dim=-1) * c.num_experts / c.top_k
        return RouterStats(
            counts=counts.to(scores.dtype),
            balance=(per_row / size.square().clamp_min(1)).sum(),
            z=logits.logsumexp(dim=-1).square().sum(),
            sequences=(size > 0).sum().to(scores.dtype),
            tokens=scores.new_full((), experts.shape[0]),
        )

    @torch.no_grad()
    def update_router_bias(self, counts: Tensor) -> None:
        """b_i += bias_rate * sign(mean load - load_i), with the counts of a whole step."""
        bias = self.router.router_bias
        bias += self.config.bias_rate * torch.sign(counts.mean() - counts).to(bias.dtype)
