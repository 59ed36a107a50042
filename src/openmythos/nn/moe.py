"""Mixture of experts after DeepSeekMoE (arXiv 2401.06066) and DeepSeek-V3 (arXiv 2412.19437).

Fine-grained routed experts with stacked weights, shared experts that every token passes, dropless
routing on tokens sorted by expert. Balance comes from `router_bias`, which only decides who is
chosen, never the weight of a chosen expert, and which the trainer moves after each step
(`update_router_bias`, arXiv 2408.15664). The layer changes no state in its forward pass, so that
it may run any number of times per step, also under activation checkpointing.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from openmythos.config import require, require_int, require_number
from openmythos.nn.feed_forward import SwiGLULayer, TokenRows
from openmythos.nn.linear import NO_DELTAS, Deltas
from openmythos.types import Channels, Tokens

# The grouped kernels want rows of whole 16 bytes: 8 numbers in bf16.
ALIGNMENT = 8
# Measured on a CPU: below so many routed rows per expert, expert by expert is faster.
FEW_ROWS_PER_EXPERT = 0.25


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
    sums: "GradientSums | None" = None


class GradientSums:
    """Where all uses of the weights add up their gradients, in place.

    Autograd would make a whole gradient in every loop and add it to the last sum: for many experts
    that is most of the memory traffic of a step. Each use instead adds its product to the sum here
    and hands on nothing; `_Collect`, which autograd runs after the last of them, takes the sum.
    """

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}

    def add(self, which: int, left: Tensor, right: Tensor, ends: Tensor) -> None:
        """Add left_g^T right_g of each group g of rows to the gradient of weight `which`."""
        total = self._sums.get(which)
        if total is None:
            self._sums[which] = grouped_outer(left, right, ends)
        elif left.device.type == "cpu":
            start = 0
            for group, end in enumerate(ends.tolist()):
                if end > start:
                    part = total[group]
                    torch.addmm(part, left[start:end].t(), right[start:end], out=part)
                start = end
        else:
            total += grouped_outer(left, right, ends)

    def take(self, which: int) -> Tensor | None:
        return self._sums.pop(which, None)


class _Collect(torch.autograd.Function):
    """The identity, whose gradient is what `sums` holds beside what arrives."""

    @staticmethod
    def forward(ctx, weight, sums, which):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        ctx.sums, ctx.which = sums, which
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        total = ctx.sums.take(ctx.which)
        if total is not None and grad is not None:
            total = total + grad
        return grad if total is None else total, None, None


class _RoutedExperts(torch.autograd.Function):
    """out_t = sum over rows r of t:  w_r W_down h_r,  h = silu(g) * u,  [g | u] = W_gate_up x_t

    Rows are sorted by expert; `source` names the token of each, `place` the row of each choice of
    a token, [tokens, top_k]. Only [g | u] is kept: all else is made again in the backward pass.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]  # noqa: PLR0913
        ctx, tokens, gate_up, down, row_weights, source, place, ends, sums
    ):
        gated = grouped_linear(tokens.index_select(0, source), gate_up, ends)
        gate, up = gated.chunk(2, dim=-1)
        hidden = F.silu(gate).mul_(up).mul_(row_weights[:, None])
        routed = grouped_linear(hidden, down, ends)
        ctx.save_for_backward(tokens, gate_up, down, row_weights, source, place, ends, gated)
        ctx.sums = sums
        ctx.collectors = None if sums is None else (gate_up.grad_fn, down.grad_fn)
        return _sum_choices(routed, place)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        tokens, gate_up, down, row_weights, source, place, ends, gated = ctx.saved_tensors
        gate, up = gated.chunk(2, dim=-1)
        grad = grad.index_select(0, source)
        grad_hidden = grouped_linear(grad, down.transpose(-2, -1), ends)
        silu = F.silu(gate)
        hidden = silu * up
        grad_weights = (grad_hidden * hidden).sum(dim=-1)
        grad_hidden.mul_(row_weights[:, None])
        grad_down = _weight_gradient(ctx, 1, grad, hidden.mul_(row_weights[:, None]), ends)
        grad_gated = torch.cat(
            (torch.ops.aten.silu_backward(grad_hidden * up, gate), grad_hidden.mul_(silu)), dim=-1
        )
        grad_gate_up = _weight_gradient(ctx, 0, grad_gated, tokens.index_select(0, source), ends)
        grad_rows = grouped_linear(grad_gated, gate_up.transpose(-2, -1), ends)
        grad_tokens = _sum_choices(grad_rows, place)
        return grad_tokens, grad_gate_up, grad_down, grad_weights, None, None, None, None


def _weight_gradient(
    ctx: Any, which: int, left: Tensor, right: Tensor, ends: Tensor
) -> Tensor | None:
    """The gradient of gate_up (0) or down (1), or None where it has gone to the shared sums."""
    if not ctx.needs_input_grad[1 + which]:
        return None
    if ctx.sums is None:
        return grouped_outer(left, right, ends)
    # A backward pass that asks for other gradients alone would leave the sum for the next one.
    if torch._C._will_engine_execute_node(ctx.collectors[which]):
        ctx.sums.add(which, left, right, ends)
    return None


def _sum_choices(rows: Tensor, place: Tensor) -> Tensor:
    """Sum the top_k rows of each token, in a fixed order on every device."""
    chosen = rows.index_select(0, place.flatten())
    return chosen.view(*place.shape, rows.shape[-1]).sum(dim=1)


class Experts(nn.Module):
    """num_experts SwiGLU networks with stacked weights."""

    def __init__(self, num_experts: int, dim: int, expert_dim: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * expert_dim, dim))
        self.down = nn.Parameter(torch.empty(num_experts, dim, expert_dim))

    def weights(self, *, sum_gradients: bool = False) -> ExpertWeights:
        """Cast as autocast would: it caches only what its own operators cast.

        sum_gradients is for many uses of the result, none of them compiled.
        """
        gate_up, down = _autocast(self.gate_up), _autocast(self.down)
        trained = self.gate_up.requires_grad and self.down.requires_grad
        if not (sum_gradients and trained and torch.is_grad_enabled()):
            return ExpertWeights(gate_up, down)
        sums = GradientSums()
        return ExpertWeights(
            _Collect.apply(gate_up, sums, 0),  # type: ignore[no-untyped-call]
            _Collect.apply(down, sums, 1),  # type: ignore[no-untyped-call]
            sums,
        )

    def one(self, token: Channels, expert: int, weights: ExpertWeights) -> Channels:
        """A token through a single expert."""
        gate, up = F.linear(token, weights.gate_up[expert]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, weights.down[expert])


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
        if c.route_scale != 1:
            weights = weights * c.route_scale
        return weights, experts, scores, logits


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
        if expert_weights is None:
            expert_weights = self.experts.weights()
        weights, experts, scores, logits = self.router(tokens)
        counts = None
        if self._are_few(tokens):
            out = self._one_by_one(tokens, weights, experts, expert_weights)
        else:
            out, counts = self._sorted(tokens, weights, experts, expert_weights)
        if self.shared_expert is not None:
            out = out + self.shared_expert(tokens, rows, deltas)[0]
        if counts is None or not self.training:
            return out, None
        return out, self._stats(counts, experts, scores, logits, rows)

    def _sorted(
        self, tokens: Tensor, weights: Tensor, experts: Tensor, expert_weights: ExpertWeights
    ) -> tuple[Tensor, Tensor]:
        """(sum over the chosen experts, tokens per expert) by grouped products."""
        c = self.config
        counts = torch.zeros(c.num_experts, dtype=torch.int32, device=tokens.device)
        chosen = experts.flatten()
        counts = counts.scatter_add(0, chosen, torch.ones_like(chosen, dtype=torch.int32))
        order = chosen.argsort()
        tokens = _autocast(tokens)
        ends, rows = self._layout(counts, chosen[order], tokens)
        place = torch.empty_like(order).scatter(0, order, rows)
        source, row_weights = order // c.top_k, weights.to(tokens.dtype).flatten()[order]
        if len(rows) and tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            # Rows that fill up a group are copies of token 0 with weight 0.
            total = int(ends[-1])
            source = source.new_zeros(total).index_copy(0, rows, source)
            row_weights = row_weights.new_zeros(total).index_copy(0, rows, row_weights)
        out: Tensor = _RoutedExperts.apply(  # type: ignore[no-untyped-call]
            tokens,
            expert_weights.gate_up,
            expert_weights.down,
            row_weights,
            source,
            place.view_as(experts),
            ends,
            expert_weights.sums,
        )
        return out, counts

    def _layout(self, counts: Tensor, chosen: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(end of each group, row of each sorted choice), groups filled up where that pays.

        A CPU's bf16 kernels are compiled for each shape anew, for longer than they run, and the
        sizes of groups hardly ever repeat unless they are rounded.
        """
        if (
            tokens.device.type != "cpu"
            or tokens.dtype == torch.float32
            or torch.compiler.is_compiling()
        ):
            ends = counts.cumsum(0, dtype=torch.int32)
            return ends, torch.arange(len(chosen), device=chosen.device)
        per_expert = len(chosen) // self.config.num_experts
        step = 1 << max(0, per_expert.bit_length() - 5)  # a 16th to a 32nd of a mean group
        filled = (counts + step - 1) // step * step
        ends = filled.cumsum(0, dtype=torch.int32)
        shift = (ends - filled) - (counts.cumsum(0) - counts)
        return ends, torch.arange(len(chosen)) + shift[chosen]

    def _are_few(self, tokens: Tensor) -> bool:
        """Whether a CPU decodes so few tokens that grouping costs more than it saves."""
        here = tokens.device.type == "cpu" and not torch.compiler.is_compiling()
        few = FEW_ROWS_PER_EXPERT * self.config.num_experts
        return here and not self.training and len(tokens) * self.config.top_k <= few

    def _one_by_one(
        self, tokens: Tensor, weights: Tensor, experts: Tensor, expert_weights: ExpertWeights
    ) -> Tensor:
        """The same sum, token by token and expert by expert."""
        tokens = _autocast(tokens)
        sums = []
        for token, weight, chosen in zip(
            tokens.unbind(), weights.to(tokens.dtype).unbind(), experts.tolist(), strict=True
        ):
            outputs = [self.experts.one(token, expert, expert_weights) for expert in chosen]
            sums.append(weight @ torch.stack(outputs))
        return torch.stack(sums) if sums else tokens.new_zeros(tokens.shape)

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
