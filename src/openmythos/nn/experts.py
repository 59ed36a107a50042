"""The routed experts of a mixture: stacked weights, tokens sorted by expert, grouped products.

Only [gate | up] is kept for the backward pass, and the gradients of the weights are added up over
all loops in place.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from openmythos import kernels
from openmythos.nn.feed_forward import gated_product
from openmythos.nn.linear import as_autocast
from openmythos.types import Tokens

# torch's grouped_mm knows no other.
_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _groups(ends: Tensor) -> Iterator[tuple[int, int]]:
    """(start, end) of each group of rows."""
    return pairwise([0, *ends.tolist()])


@torch.library.custom_op("openmythos::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows [ends[g-1], ends[g]) of x [tokens, in] times weight[g]^T, weight [groups, out, in].

    A custom operator because torch's grouped_mm refuses fp32 on meta tensors, hence under
    torch.compile; in eager mode it costs nothing more.
    """
    if x.dtype not in _GROUPED_DTYPES:
        return torch.cat([x[i:j] @ w.t() for (i, j), w in zip(_groups(ends), weight, strict=True)])
    return F.grouped_mm(x, weight.transpose(-2, -1), offs=ends)


@grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("openmythos::grouped_outer", mutates_args=())
def grouped_outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Per group g of rows: left_g^T right_g, [groups, left_dim, right_dim]."""
    if left.dtype not in _GROUPED_DTYPES:
        return torch.stack([left[i:j].t() @ right[i:j] for i, j in _groups(ends)])
    return F.grouped_mm(left.transpose(0, 1), right, offs=ends)


@grouped_outer.register_fake
def _(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty(ends.shape[0], left.shape[1], right.shape[1])


class ExpertWeights(NamedTuple):
    """The stacked weights in the dtype that they are used in, made once for all loops."""

    gate_up: Tensor  # [num_experts, 2 * expert_dim, dim]
    down: Tensor  # [num_experts, dim, expert_dim]
    sums: "GradientSums | None" = None


class SortedRows(NamedTuple):
    """The chosen experts of all tokens as rows, sorted by expert."""

    ends: Tensor  # [num_experts] where the rows of each expert end
    source: Tensor  # [rows] token of each row
    weights: Tensor  # [rows] weight of each row in its token's sum
    place: Tensor  # [tokens, top_k] row of each choice


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
            for (start, end), part in zip(_groups(ends), total, strict=True):
                if end > start:
                    torch.addmm(part, left[start:end].t(), right[start:end], out=part)
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
    @kernels.first_order
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
    @kernels.first_order
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


torch.library.define(
    "openmythos::few_experts",
    "(Tensor tokens, Tensor weights, Tensor chosen, Tensor gate_up, Tensor down) -> Tensor",
)


def few_experts(
    tokens: Tensor, weights: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """Tokens [tokens, dim] through their experts `chosen` [tokens, top_k] one by one, no gradient.

    An operator of its own under torch.compile, which cannot follow the choice.
    """
    top_k, each = chosen.shape[1], tokens.unbind()
    rows = [(expert, row // top_k) for row, expert in enumerate(chosen.flatten().tolist())]
    gated = torch.stack([torch.mv(gate_up[expert], each[token]) for expert, token in rows])
    hidden = gated_product(gated).mul_(weights.view(-1, 1)).unbind()
    out = torch.zeros_like(tokens)
    totals = out.unbind()
    for (expert, token), row in zip(rows, hidden, strict=True):
        totals[token].addmv_(down[expert], row)
    return out


# Not a custom_op: that costs four times as much per call.
torch.library.impl("openmythos::few_experts", "cpu", few_experts)


@torch.library.register_fake("openmythos::few_experts")  # type: ignore[untyped-decorator]
def _(tokens: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(tokens)


def _held(weight: Tensor) -> Tensor:
    """Of a stack that ranks hold between them, this one's experts."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


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
        gate_up, down = as_autocast(_held(self.gate_up)), as_autocast(_held(self.down))
        trained = self.gate_up.requires_grad and self.down.requires_grad and not kernels.reference()
        if not (sum_gradients and trained and torch.is_grad_enabled()):
            return ExpertWeights(gate_up, down)
        sums = GradientSums()
        return ExpertWeights(
            _Collect.apply(gate_up, sums, 0),  # type: ignore[no-untyped-call]
            _Collect.apply(down, sums, 1),  # type: ignore[no-untyped-call]
            sums,
        )

    def forward(self, tokens: Tokens, rows: SortedRows, weights: ExpertWeights) -> Tokens:
        """Sum over the chosen experts of every token; tokens in the weights' dtype."""
        out: Tensor = _RoutedExperts.apply(  # type: ignore[no-untyped-call]
            tokens,
            weights.gate_up,
            weights.down,
            rows.weights,
            rows.source,
            rows.place,
            rows.ends,
            weights.sums,
        )
        return out

    def one_by_one(
        self, tokens: Tokens, row_weights: Tensor, chosen: Tensor, weights: ExpertWeights
    ) -> Tokens:
        """The formula: every expert on every token, weighted by 0 where it was not chosen."""
        shares = tokens.new_zeros(len(tokens), len(weights.down)).scatter(1, chosen, row_weights)
        out = torch.zeros_like(tokens)
        for share, gate_up, down in zip(
            shares.unbind(1), weights.gate_up, weights.down, strict=True
        ):
            gate, up = F.linear(tokens, gate_up).chunk(2, dim=-1)
            out = out + share[:, None] * F.linear(F.silu(gate) * up, down)
        return out

    def few(
        self, tokens: Tokens, row_weights: Tensor, chosen: Tensor, weights: ExpertWeights
    ) -> Tokens:
        """The same for few tokens on a CPU, expert by expert, without gradient."""
        operator = (
            torch.ops.openmythos.few_experts if torch.compiler.is_compiling() else few_experts
        )
        out: Tensor = operator(tokens, row_weights, chosen, weights.gate_up, weights.down)
        return out
