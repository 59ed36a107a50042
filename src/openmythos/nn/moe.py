"""Mixture of experts after DeepSeekMoE (arXiv 2401.06066) and DeepSeek-V3 (arXiv 2412.19437).

Fine-grained routed experts with stacked weights, shared experts that every token passes, dropless
routing on tokens sorted by expert. Balance comes from `router_bias`, which only decides who is
chosen, never the weight of a chosen expert, and which the trainer moves after each step
(`update_router_bias`, arXiv 2408.15664). The layer changes no state in its forward pass, so that
it may run any number of times per step, also under activation checkpointing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openmythos import kernels
from openmythos.config import MAX_PARTS, MAX_WIDTH, require, require_int, require_number
from openmythos.nn.experts import Experts, ExpertWeights, SortedRows
from openmythos.nn.feed_forward import SwiGLULayer, TokenRows
from openmythos.nn.linear import (
    NO_DELTAS,
    Deltas,
    Linear,
    as_autocast,
    at_least_fp32,
    no_autocast,
)
from openmythos.types import Tokens

# The grouped kernels want rows of whole 16 bytes: 8 numbers in bf16.
ALIGNMENT = 8


@runtime_checkable
class Exchange(Protocol):
    """Takes rows to where their expert is held, and what comes of them back, in the same order.

    `rows` [rows, dim] are sorted by expert, counts[i] of them for expert i. `there` maps rows that
    have come and the number of each one's expert, counted from the first that is held there.
    """

    def __call__(
        self, rows: Tensor, counts: Tensor, there: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor: ...


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
        require_number("route_scale", self.route_scale, above=0, at_most=1e6)
        for name in ("bias_rate", "balance_weight", "z_weight"):
            require_number(name, getattr(self, name), at_least=0, at_most=1e6)

    def build(self, dim: int) -> "MoELayer":
        require(dim % ALIGNMENT == 0, "dim", dim, f"must be a multiple of {ALIGNMENT} with experts")
        return MoELayer(self, dim)


class Router(Linear):
    """scores s = sigmoid(W x) or softmax(W x); the top_k of s + router_bias are chosen.

    A linear map, so that a LoopLoRA may give every loop a router of its own.
    """

    router_bias: Tensor

    def __init__(self, config: MoE, dim: int) -> None:
        super().__init__(dim, config.num_experts, bias=False)
        self.config = config
        self.register_buffer("router_bias", torch.zeros(config.num_experts))

    def forward(  # type: ignore[override]
        self, tokens: Tokens, deltas: Deltas = NO_DELTAS
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(weights [tokens, top_k], experts [tokens, top_k], scores, logits [tokens, experts])."""
        c = self.config
        # In fp32 at least: a rounded score flips choices, and nothing here is large.
        with no_autocast(tokens):
            wide = at_least_fp32(tokens)
            logits = F.linear(wide, self.weight.to(wide.dtype))
            delta = deltas.get(self.delta_key)
            if delta is not None:
                down = F.linear(wide, delta.down.to(wide.dtype))
                logits = logits + F.linear(down, delta.up.to(wide.dtype))
        scores = logits.sigmoid() if c.score == "sigmoid" else logits.softmax(dim=-1)
        experts = (
            (scores.detach() + self.router_bias.to(scores.dtype)).topk(c.top_k, dim=-1).indices
        )
        weights = scores.gather(1, experts)
        if c.normalize_top_k:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        if c.route_scale != 1:
            weights = weights * c.route_scale
        return weights, experts, scores, logits


def _count(chosen: Tensor, num_experts: int) -> Tensor:
    """How often each expert occurs."""
    counts = torch.zeros(num_experts, dtype=torch.int32, device=chosen.device)
    return counts.scatter_add(0, chosen, torch.ones_like(chosen, dtype=torch.int32))


def _inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))


def _filled_up(rows: SortedRows, counts: Tensor, step: int) -> SortedRows:
    """Each group grown to a multiple of `step`, with copies of token 0 of weight 0."""
    sizes = (counts + step - 1) // step * step
    ends = sizes.cumsum(0, dtype=torch.int32)
    shift = (ends - sizes) - (rows.ends - counts)
    moved = torch.arange(len(rows.source), device=ends.device) + shift.repeat_interleave(counts)
    total = int(ends[-1])
    return SortedRows(
        ends=ends,
        source=rows.source.new_zeros(total).index_copy(0, moved, rows.source),
        weights=rows.weights.new_zeros(total).index_copy(0, moved, rows.weights),
        place=moved[rows.place],
    )


class MoELayer(nn.Module):
    """y = sum_{i in top_k} g_i Expert_i(x) + SharedExpert(x).

    With an `exchange`, its ranks hold the routed experts between them and call the layer together.
    """

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
        self.exchange: Exchange | None = None

    def forward(
        self,
        tokens: Tokens,
        rows: TokenRows | None,
        deltas: Deltas = NO_DELTAS,
        expert_weights: ExpertWeights | None = None,
    ) -> tuple[Tokens, RouterStats | None]:
        """Statistics come in training only, of the sequences that `rows` tells."""
        if expert_weights is None:
            expert_weights = self.experts.weights()
        weights, experts, scores, logits = self.router(tokens, deltas)
        counts = None
        if self.exchange is not None:
            out, counts = self._exchanged(tokens, weights, experts, expert_weights, self.exchange)
        elif rows is None and self._are_few(tokens):
            tokens = as_autocast(tokens)
            weights = weights.to(tokens.dtype)
            out = self.experts.few(tokens, weights, experts, expert_weights)
        else:
            out, counts = self._sorted(tokens, weights, experts, expert_weights)
        if self.shared_expert is not None:
            out = out + self.shared_expert(tokens, rows, deltas)[0]
        if counts is None or rows is None or not self.training:
            return out, None
        return out, self._stats(counts, experts, scores, logits, rows)

    def _sorted(
        self, tokens: Tensor, weights: Tensor, experts: Tensor, expert_weights: ExpertWeights
    ) -> tuple[Tensor, Tensor]:
        """(sum over the chosen experts, tokens per expert) by grouped products."""
        chosen = experts.flatten()
        counts = _count(chosen, expert_weights.gate_up.shape[0])
        tokens = as_autocast(tokens)
        if kernels.reference():
            weights = weights.to(tokens.dtype)
            return self.experts.one_by_one(tokens, weights, experts, expert_weights), counts
        order = chosen.argsort()
        rows = SortedRows(
            ends=counts.cumsum(0, dtype=torch.int32),
            source=order // experts.shape[1],
            weights=weights.to(tokens.dtype).flatten()[order],
            place=_inverse(order).view_as(experts),
        )
        step = self._group_step(tokens, len(chosen) // len(counts))
        if step > 1:
            rows = _filled_up(rows, counts, step)
        return self.experts(tokens, rows, expert_weights), counts

    def _exchanged(
        self,
        tokens: Tensor,
        weights: Tensor,
        experts: Tensor,
        expert_weights: ExpertWeights,
        exchange: Exchange,
    ) -> tuple[Tensor, Tensor]:
        """The same where other ranks hold some of the experts, and this one some of theirs."""

        def there(rows: Tensor, expert: Tensor) -> Tensor:
            whole = rows.new_ones(len(rows), 1)
            return self._sorted(rows, whole, expert[:, None], expert_weights)[0]

        tokens = as_autocast(tokens)
        chosen = experts.flatten()
        counts = _count(chosen, self.config.num_experts)
        order = chosen.argsort()
        # A row of its own for each choice, so that their gradients meet in a fixed order.
        rows = tokens[:, None].expand(-1, experts.shape[1], -1).flatten(0, 1)
        back = exchange(rows.index_select(0, order), counts, there)
        choices = back.index_select(0, _inverse(order)).view(*experts.shape, back.shape[-1])
        return (choices * weights.to(tokens.dtype)[..., None]).sum(dim=1), counts

    def _group_step(self, tokens: Tensor, mean: int) -> int:
        """Groups are filled up to multiples of this.

        A CPU's bf16 kernels are compiled for each shape anew, for longer than they run, and the
        sizes of groups hardly ever repeat unless they are rounded.
        """
        compiled_anew = tokens.device.type == "cpu" and tokens.dtype != torch.float32
        if not compiled_anew or torch.compiler.is_compiling():
            return 1
        return 1 << max(0, mean.bit_length() - 5)  # a 16th to a 32nd of a mean group

    def _are_few(self, tokens: Tensor) -> bool:
        """Whether a CPU decodes so few tokens that grouping costs more than it saves."""
        few = kernels.tuned(tokens.device).few_rows_per_expert * self.config.num_experts
        free = not torch.is_grad_enabled() and not kernels.reference()
        return free and len(tokens) * self.config.top_k <= few

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
