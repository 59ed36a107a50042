"""Mixture of experts after DeepSeekMoE (arXiv 2401.06066) and DeepSeek-V3 (arXiv 2412.19437).

Fine-grained routed experts with stacked weights, shared experts that run for every token, dropless
routing on tokens sorted by expert. The load is balanced by `router_bias`, which affects the choice
of experts but not their weights; the trainer updates it after each step (`update_router_bias`,
arXiv 2408.15664). `forward` changes no state, so that it may run any number of times per step, also
under activation checkpointing.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from openmythos.config import MAX_PARTS, MAX_WIDTH, require, require_int, require_number
from openmythos.kernels.experts import ExpertWeights, prepare, routed_experts
from openmythos.kernels.precision import at_least_fp32, no_autocast
from openmythos.nn.dispatch import TokenDispatcher, dispatched_experts
from openmythos.nn.facts import Fill, constant, multiply_adds
from openmythos.nn.feed_forward import FeedForwardLayer, GatedLayer, RouterStats, at_places
from openmythos.nn.linear import NO_DELTAS, Deltas, Linear, per_row
from openmythos.nn.view import LayerView
from openmythos.types import Hidden, Tokens

__all__ = ["MoE", "MoELayer", "Router", "RouterStats"]

# The grouped kernels need rows aligned to 16 bytes: 8 numbers in bf16.
ALIGNMENT = 8


@dataclass(frozen=True, kw_only=True)
class MoE:
    """num_experts routed experts of width expert_dim, top_k of them per token, plus shared ones.

    The weight of a chosen expert is its score, normalised over the chosen, times route_scale.
    bias_rate moves router_bias per step (0 = off), with bias_decays times the learning rate's
    schedule. The first bias_loops loops have a bias of their own each, later ones that of the last
    (1: all loops share one); a layer outside of the loop has the first. balance_weight and z_weight
    scale the sequence-wise balance loss and the router z-loss in training.
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
    bias_decays: bool = False
    bias_loops: int = 1
    balance_weight: float = 1e-4
    z_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k"):
            require_int(name, getattr(self, name), minimum=1, maximum=MAX_PARTS)
        require_int("expert_dim", self.expert_dim, minimum=1, maximum=MAX_WIDTH)
        require_int("num_shared_experts", self.num_shared_experts, minimum=0, maximum=MAX_PARTS)
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
        require_int("bias_loops", self.bias_loops, minimum=1, maximum=MAX_PARTS)
        require_number("route_scale", self.route_scale, above=0, at_most=1e6)
        for name in ("bias_rate", "balance_weight", "z_weight"):
            require_number(name, getattr(self, name), at_least=0, at_most=1e6)

    def kept_numbers(self, dim: int, *, cast: bool) -> tuple[int, int]:
        """Activations per token saved for the backward pass: (in autocast's dtype, in fp32).

        gate and up of each chosen and shared expert; in fp32 the router's scores, logits and the
        intermediates of the balance loss, and the router's input if it was cast.
        """
        narrow = 2 * (self.top_k + self.num_shared_experts) * self.expert_dim
        return narrow, 4 * self.num_experts + (dim if cast else 0)

    def build(self, dim: int) -> "MoELayer":
        require(dim % ALIGNMENT == 0, "dim", dim, f"must be a multiple of {ALIGNMENT} with experts")
        return MoELayer(self, dim)


class Routing(NamedTuple):
    """The experts chosen for each token, and their weights."""

    weights: Tensor  # [tokens, top_k]
    chosen: Tensor  # [tokens, top_k]
    scores: Tensor  # [tokens, num_experts]
    logits: Tensor  # [tokens, num_experts]

    def select(self, places: Tensor) -> "Routing":
        return Routing(*(x.index_select(0, places) for x in self))


class Router(Linear):
    """scores s = sigmoid(W x) or softmax(W x); the top_k of s + router_bias are chosen.

    `router_bias` is [num_experts], or [bias_loops, num_experts] if bias_loops > 1. A `Linear`, so
    that a LoopLoRA can adapt the router in every loop.
    """

    decays = False
    router_bias: Tensor

    def __init__(self, config: MoE, dim: int) -> None:
        super().__init__(dim, config.num_experts, bias=False)
        self.config = config
        by_loop = (config.bias_loops,) if config.bias_loops > 1 else ()
        self.register_buffer("router_bias", torch.zeros(*by_loop, config.num_experts))

    def fills(self) -> dict[str, Fill]:
        return {"router_bias": constant(0.0)}

    def forward(  # type: ignore[override]
        self, tokens: Tokens, deltas: Deltas = NO_DELTAS, loop: Tensor | None = None
    ) -> Routing:
        c = self.config
        # In fp32 at least: rounding flips choices, and this matmul is cheap.
        with no_autocast(tokens):
            wide = at_least_fp32(tokens)
            logits = F.linear(wide, self.weight.to(wide.dtype))
            delta = deltas.get(self.delta_key)
            if delta is not None:
                logits = logits + delta.to(wide.dtype).times(wide)
        scores = logits.sigmoid() if c.score == "sigmoid" else logits.softmax(dim=-1)
        bias = self.router_bias if c.bias_loops == 1 else self._bias_of(loop, len(scores))
        biased = scores.detach() + bias.to(scores.dtype)
        chosen = biased.topk(c.top_k, dim=-1).indices
        weights = scores.gather(1, chosen)
        if c.normalize_top_k:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        if c.route_scale != 1:
            weights = weights * c.route_scale
        return Routing(weights, chosen, scores, logits)

    def rows(self, loop: Tensor | None) -> Tensor:
        """The rows of `router_bias` for loop indices, [1] or [batch]; without them the first."""
        if loop is None:
            return torch.zeros(1, dtype=torch.long, device=self.router_bias.device)
        return loop.clamp_max(self.config.bias_loops - 1)

    def _bias_of(self, loop: Tensor | None, tokens: int) -> Tensor:
        """[1, num_experts], or [tokens, num_experts] if each of the rows has its own loop."""
        bias = self.router_bias[self.rows(loop)]
        return bias.repeat_interleave(tokens // len(bias), dim=0) if len(bias) > 1 else bias


class Experts(nn.Module):
    """num_experts SwiGLU networks: y_i = W_down,i (silu(g) * u) with [g | u] = W_gate_up,i x."""

    def __init__(self, num_experts: int, dim: int, expert_dim: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * expert_dim, dim))
        self.down = nn.Parameter(torch.empty(num_experts, dim, expert_dim))


class MoELayer(FeedForwardLayer):
    """y = sum_{i in top_k} g_i Expert_i(x) + SharedExpert(x).

    With a `dispatcher` the routed experts are sharded over its ranks, and `forward` is collective.
    """

    def __init__(self, config: MoE, dim: int) -> None:
        super().__init__()
        self.config = config
        self.router = Router(config, dim)
        self.experts = Experts(config.num_experts, dim, config.expert_dim)
        self.shared_expert = (
            GatedLayer(dim, config.num_shared_experts * config.expert_dim, F.silu)
            if config.num_shared_experts
            else None
        )
        self.dispatcher: TokenDispatcher | None = None
        self.asks_loop = config.bias_loops > 1

    residual_outputs = ("experts.down",)

    def multiply_adds(self) -> int:
        """Per token: the router, the chosen experts and the shared ones."""
        rest = self.router.weight.numel() + self.active_weights()
        return rest + (0 if self.shared_expert is None else multiply_adds(self.shared_expert))

    def active_weights(self) -> int:
        """Number of weights in the top_k routed experts of one token."""
        stacks = self.experts.parameters()
        return sum(x.numel() for x in stacks) // self.config.num_experts * self.config.top_k

    def shared_weights(self) -> ExpertWeights:
        """The weights of the experts, the local shard if sharded, prepared for many calls."""
        stacks = (self.experts.gate_up, self.experts.down)
        return prepare(*(w.to_local() if isinstance(w, DTensor) else w for w in stacks))

    def forward(self, x: Hidden, view: LayerView) -> tuple[Hidden, RouterStats | None]:
        tokens, places = x.flatten(0, 1), None
        if view.active is None:
            routing = self.router(tokens, view.deltas, view.loop)
        else:
            places = view.active.flatten().nonzero()[:, 0]
            tokens, routing = self._route_some(tokens, places, view)
        weights = self.shared_weights() if view.expert_weights is None else view.expert_weights
        inputs = (tokens, routing.weights, routing.chosen, weights)
        if self.dispatcher is None:
            out = routed_experts(*inputs)
        else:
            out = dispatched_experts(*inputs, self.config.num_experts, self.dispatcher)
        out = out.view(x.shape) if places is None else at_places(out, places, x.shape)
        if self.shared_expert is not None:
            out = out + self.shared_expert(x, view)[0]
        return out, self._stats(routing, places, x.shape, view.loop) if view.collects else None

    def _route_some(
        self, tokens: Tensor, places: Tensor, view: LayerView
    ) -> tuple[Tensor, Routing]:
        """The tokens at `places`, and their routing."""
        some, loop = tokens.index_select(0, places), view.loop
        if per_row(view.deltas) or (loop is not None and len(loop) > 1):
            # Packing would mix tokens of different rows.
            return some, self.router(tokens, view.deltas, loop).select(places)
        return some, self.router(some, view.deltas, loop)

    def _stats(
        self, routing: Routing, places: Tensor | None, shape: torch.Size, loop: Tensor | None
    ) -> RouterStats:
        """Per sequence f_i = num_experts / top_k * share of choices, P_i = mean score of expert i.

        Scores are normalised to sum to 1 over the experts.
        """
        c, scores = self.config, routing.scores
        probability = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
        chosen = torch.zeros_like(scores).scatter(1, routing.chosen, 1.0)
        shape = torch.Size((*shape[:2], c.num_experts))
        if places is not None:
            probability, chosen = (at_places(t, places, shape) for t in (probability, chosen))
        probabilities, choices = (t.view(shape).sum(dim=1) for t in (probability, chosen))
        size = choices.sum(dim=-1) / c.top_k
        products = (choices * probabilities).sum(dim=-1) * c.num_experts / c.top_k
        counts = choices.sum(dim=0)
        if c.bias_loops > 1:
            rows = self.router.rows(loop).expand(len(choices))
            counts = counts.new_zeros(c.bias_loops, c.num_experts).index_add(0, rows, choices)
        return RouterStats(
            counts=counts,
            balance=(products / size.square().clamp_min(1)).sum(),
            z=routing.logits.logsumexp(dim=-1).square().sum(),
            sequences=(size > 0).sum().to(scores.dtype),
            tokens=scores.new_full((), len(scores)),
        )

    def router_loss(self, balance: Tensor, z: Tensor) -> Tensor:
        return self.config.balance_weight * balance + self.config.z_weight * z

    @torch.no_grad()
    def update_router_bias(self, counts: Tensor, scale: float = 1.0) -> None:
        """b_i += bias_rate * sign(mean load - load_i), from the counts of one training step."""
        bias, c = self.router.router_bias, self.config
        rate = c.bias_rate * scale if c.bias_decays else c.bias_rate
        bias += rate * torch.sign(counts.mean(dim=-1, keepdim=True) - counts).to(bias.dtype)
