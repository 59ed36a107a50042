"""Routed experts: weighted sum of the SwiGLU networks chosen for each token, dropless.

The fast form sorts one row per token and choice by expert and computes grouped matmuls. Only
[gate | up] is saved for the backward pass, and weight gradients are accumulated in place over all
uses of the weights. A few decoded tokens on a CPU are computed expert by expert instead.
"""

import zlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from openmythos import kernels
from openmythos.kernels import gated as gated_map
from openmythos.kernels.precision import as_autocast

# With fewer rows per expert, one operator for all experts is faster than some for each.
ROWS_IN_TURN = 16
# Up to this many tokens, fixed shapes are worth reading an expert once per token.
FEW_TOKENS = 16
# The dtypes that torch's grouped_mm supports.
_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A copy of this file, as in a Hugging Face export, must define operators under another name.
_IS_COPY = not __name__.startswith("openmythos.")
NAMESPACE = f"openmythos_{zlib.crc32(__name__.encode()):08x}" if _IS_COPY else "openmythos"


class ExpertWeights(NamedTuple):
    """The stacked weights in the compute dtype; see `prepare`."""

    gate_up: Tensor  # [num_experts, 2 * expert_dim, dim]
    down: Tensor  # [num_experts, dim, expert_dim]
    sums: dict[int, Tensor] | None = None  # gradients of gate_up (0) and down (1) so far


def prepare(gate_up: Tensor, down: Tensor) -> ExpertWeights:
    """Prepare the weights for `routed_experts`, once for many calls, such as all loops.

    They are cast to autocast's dtype here: autocast caches only the casts of its own operators.
    """
    trained = gate_up.requires_grad and down.requires_grad and torch.is_grad_enabled()
    gate_up, down = as_autocast(gate_up), as_autocast(down)
    fast = kernels.fast(gate_up.device) is not None and not torch.compiler.is_compiling()
    if not (trained and fast):
        return ExpertWeights(gate_up, down)
    sums: dict[int, Tensor] = {}
    return ExpertWeights(
        _Collect.apply(gate_up, sums, 0),  # type: ignore[no-untyped-call]
        _Collect.apply(down, sums, 1),  # type: ignore[no-untyped-call]
        sums,
    )


def reference(
    tokens: Tensor, row_weights: Tensor, chosen: Tensor, weights: ExpertWeights
) -> Tensor:
    """The formula: every expert on every token, weighted by 0 where it was not chosen."""
    zeros = row_weights.new_zeros(*chosen.shape[:-1], len(weights.down))
    shares = zeros.scatter(-1, chosen, row_weights)
    out = torch.zeros_like(tokens)
    for share, gate_up, down in zip(shares.unbind(-1), weights.gate_up, weights.down, strict=True):
        out = out + share[..., None] * gated_map.reference(F.linear(tokens, gate_up), down)
    return out


def routed_experts(
    tokens: Tensor, row_weights: Tensor, chosen: Tensor, weights: ExpertWeights
) -> Tensor:
    """sum_i row_weights_i W_down,i (silu(g_i) * u_i),  [g_i | u_i] = W_gate_up,i x, i chosen for x.

    tokens [..., dim], row_weights and chosen [..., top_k]; [..., dim], in autocast's dtype.
    """
    tokens = as_autocast(tokens)
    row_weights, tuned = row_weights.to(tokens.dtype), kernels.fast(tokens.device)
    if tuned is None:
        return reference(tokens, row_weights, chosen, weights)
    if not torch.is_grad_enabled() and chosen.numel() > 0:
        few_tokens = chosen.numel() <= FEW_TOKENS * chosen.shape[-1]
        if few_tokens and (tuned.gathers or torch.compiler.is_compiling()):
            return gathered(tokens, row_weights, chosen, weights)
        few = tuned.few_rows_per_expert * len(weights.down)
        if not torch.compiler.is_compiling() and chosen.numel() <= few:
            return per_expert_decode(tokens, row_weights, chosen, weights)
    flat, rows = tokens.flatten(0, -2), _sorted_rows(row_weights, chosen, len(weights.down))
    if not torch.is_grad_enabled() and _takes_turns(rows.source, len(weights.down)):
        routed = _in_turn(flat, weights.gate_up, weights.down, rows, gated=None)
        return _sum_choices(routed, rows.place).view(tokens.shape)
    out: Tensor = _RoutedExperts.apply(  # type: ignore[no-untyped-call]
        flat,
        weights.gate_up,
        weights.down,
        *rows,
        None if torch.compiler.is_compiling() else weights.sums,
    )
    return out.view(tokens.shape)


# Few tokens


def gathered(tokens: Tensor, row_weights: Tensor, chosen: Tensor, weights: ExpertWeights) -> Tensor:
    """`routed_experts` with the weights of every token's experts side by side, without gradient.

    No shape depends on the choice. Compiled code reads the weights in place; elsewhere they are
    copied.
    """
    gate_up, down = weights.gate_up[chosen], weights.down[chosen]
    gated = _times(gate_up, tokens[..., None, :])
    gate, up = gated.chunk(2, dim=-1)
    return _times(down, F.silu(gate) * up * row_weights[..., None]).sum(dim=-2)


def _times(weight: Tensor, x: Tensor) -> Tensor:
    """weight [..., out, in] times x [..., in]."""
    if torch.compiler.is_compiling():  # a matmul would have its operands copied
        return (weight * x[..., None, :]).sum(dim=-1)
    return torch.matmul(weight, x[..., None])[..., 0]


def per_expert_decode(
    tokens: Tensor, row_weights: Tensor, chosen: Tensor, weights: ExpertWeights
) -> Tensor:
    """`routed_experts` expert by expert, without gradient."""
    gate_up, down = weights.gate_up, weights.down
    top_k, flat = chosen.shape[-1], tokens.flatten(0, -2)
    each, out = flat.unbind(), torch.zeros_like(flat)
    rows = [(expert, row // top_k) for row, expert in enumerate(chosen.flatten().tolist())]
    gated = torch.stack([torch.mv(gate_up[expert], each[token]) for expert, token in rows])
    gate, up = gated.chunk(2, dim=-1)
    hidden = F.silu(gate).mul_(up).mul_(row_weights.reshape(-1, 1)).unbind()
    totals = out.unbind()
    for (expert, token), row in zip(rows, hidden, strict=True):
        totals[token].addmv_(down[expert], row)
    return out.view(tokens.shape)


# Rows sorted by expert


class SortedRows(NamedTuple):
    """One row per token and choice, sorted by expert."""

    weights: Tensor  # [rows] weight of each row in its token's sum
    source: Tensor  # [rows] token of each row
    place: Tensor  # [tokens, top_k] row of each choice
    ends: Tensor  # [num_experts] where the rows of each expert end


def count_rows(chosen: Tensor, num_experts: int) -> Tensor:
    """How often each expert occurs in chosen [rows]."""
    counts = torch.zeros(num_experts, dtype=torch.int32, device=chosen.device)
    return counts.scatter_add(0, chosen, torch.ones_like(chosen, dtype=torch.int32))


def _sorted_rows(row_weights: Tensor, chosen: Tensor, num_experts: int) -> SortedRows:
    top_k, choices = chosen.shape[-1], chosen.flatten()
    counts = count_rows(choices, num_experts)
    order = choices.argsort()
    place = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    rows = SortedRows(
        weights=row_weights.flatten()[order],
        source=order // top_k,
        place=place.view(-1, top_k),
        ends=counts.cumsum(0, dtype=torch.int32),
    )
    step = group_step(len(choices) // num_experts, row_weights.dtype, choices.device)
    return rows if step == 1 else pad_groups(rows, counts, step)


def group_step(mean: int, dtype: torch.dtype, device: torch.device) -> int:
    """Groups of `mean` rows are padded to multiples of this: 1/32 to 1/16 of the mean.

    On a CPU, bf16 kernels are compiled for each shape, which takes longer than running them, and
    unpadded group sizes hardly ever repeat.
    """
    compiled_anew = device.type == "cpu" and dtype != torch.float32
    if not compiled_anew or torch.compiler.is_compiling():
        return 1
    return 1 << max(0, mean.bit_length() - 5)


def pad_groups(rows: SortedRows, counts: Tensor, step: int) -> SortedRows:
    """Pad each group to a multiple of `step`, with copies of token 0 of weight 0."""
    sizes = (counts + step - 1) // step * step
    ends = sizes.cumsum(0, dtype=torch.int32)
    shift = (ends - sizes) - (rows.ends - counts)
    moved = torch.arange(len(rows.source), device=ends.device) + shift.repeat_interleave(counts)
    total = int(ends[-1])
    return SortedRows(
        weights=rows.weights.new_zeros(total).index_copy(0, moved, rows.weights),
        source=rows.source.new_zeros(total).index_copy(0, moved, rows.source),
        place=moved[rows.place],
        ends=ends,
    )


# Grouped products


def _groups(ends: Tensor) -> Iterator[tuple[int, int]]:
    """(start, end) of each group of rows."""
    return pairwise([0, *ends.tolist()])


@torch.library.custom_op(f"{NAMESPACE}::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows [ends[g-1], ends[g]) of x [rows, in] times weight[g]^T, weight [groups, out, in].

    A custom operator because torch's grouped_mm refuses fp32 on meta tensors, hence under
    torch.compile; in eager mode it costs nothing more.
    """
    if x.dtype not in _GROUPED_DTYPES:
        return torch.cat([x[i:j] @ w.t() for (i, j), w in zip(_groups(ends), weight, strict=True)])
    return F.grouped_mm(x, weight.transpose(-2, -1), offs=ends)


@grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op(f"{NAMESPACE}::grouped_outer", mutates_args=())
def grouped_outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Per group g of rows: left_g^T right_g, [groups, left_dim, right_dim]."""
    if left.dtype not in _GROUPED_DTYPES:
        return torch.stack([left[i:j].t() @ right[i:j] for i, j in _groups(ends)])
    return F.grouped_mm(left.transpose(0, 1), right, offs=ends)


@grouped_outer.register_fake
def _(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty(ends.shape[0], left.shape[1], right.shape[1])


class _RoutedExperts(torch.autograd.Function):
    """out_t = sum over rows r of t:  w_r W_down h_r,  h = silu(g) * u,  [g | u] = W_gate_up x_t

    Only [g | u] is saved; the backward pass recomputes the rest.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]  # noqa: PLR0913
        ctx, tokens, gate_up, down, row_weights, source, place, ends, sums
    ):
        rows = SortedRows(row_weights, source, place, ends)
        if _takes_turns(source, len(down)):
            gated = tokens.new_empty(len(source), gate_up.shape[1])
            routed = _in_turn(tokens, gate_up, down, rows, gated)
        else:
            gated = grouped_linear(tokens.index_select(0, source), gate_up, ends)
            hidden = gated_map.activated(gated).mul_(row_weights[:, None])
            routed = grouped_linear(hidden, down, ends)
        ctx.save_for_backward(tokens, gate_up, down, row_weights, source, place, ends, gated)
        ctx.sums = sums
        ctx.collectors = None if sums is None else (gate_up.grad_fn, down.grad_fn)
        return _sum_choices(routed, place)

    @staticmethod
    @kernels.first_order
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        tokens, gate_up, down, row_weights, source, place, ends, gated = ctx.saved_tensors
        if _takes_turns(source, len(down)):
            rows, weights = (
                SortedRows(row_weights, source, place, ends),
                ExpertWeights(gate_up, down),
            )
            found = _gradients_in_turn(ctx, grad, tokens, weights, rows, gated)
            return *found, None, None, None, None
        grad = grad.index_select(0, source)
        grad_hidden = grouped_linear(grad, down.transpose(-2, -1), ends)
        grad_gated, hidden = gated_map.gradients(grad_hidden, gated)
        grad_weights = _of_weights(grad_gated, gated)
        grad_gated.mul_(row_weights[:, None])
        grad_down = _weight_gradient(ctx, 1, grad, hidden.mul_(row_weights[:, None]), ends)
        grad_gate_up = _weight_gradient(ctx, 0, grad_gated, tokens.index_select(0, source), ends)
        grad_rows = grouped_linear(grad_gated, gate_up.transpose(-2, -1), ends)
        found = (_sum_choices(grad_rows, place), grad_gate_up, grad_down, grad_weights)
        return *found, None, None, None, None


def _of_weights(grad_gated: Tensor, gated: Tensor) -> Tensor:
    """The gradient of row weights: u times its gradient, since u enters the output linearly."""
    return torch.mul(*(x.chunk(2, dim=-1)[1] for x in (grad_gated, gated))).sum(dim=-1)


def _sum_choices(rows: Tensor, place: Tensor) -> Tensor:
    """Sum the top_k rows of each token, in a fixed order on every device."""
    if _runs_eagerly_on_cpu(rows) and len(place):
        return F.embedding_bag(place, rows, mode="sum")
    chosen = rows.index_select(0, place.flatten())
    # With a dtype: autocast on a GPU would otherwise sum to fp32, and so make the gradient fp32.
    return chosen.view(*place.shape, rows.shape[-1]).sum(dim=1, dtype=rows.dtype)


def _takes_turns(rows: Tensor, num_experts: int) -> bool:
    """Whether experts run one after the other: on a CPU many rows of one stay in its cache."""
    return _runs_eagerly_on_cpu(rows) and len(rows) >= ROWS_IN_TURN * num_experts


def _runs_eagerly_on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _in_turn(
    tokens: Tensor, gate_up: Tensor, down: Tensor, rows: SortedRows, gated: Tensor | None
) -> Tensor:
    """Weighted outputs [rows, dim] of the experts; [gate | up] is kept in `gated` [rows, ...]."""
    out = tokens.new_empty(len(rows.source), tokens.shape[-1])
    for (i, j), up, low in zip(_groups(rows.ends), gate_up, down, strict=True):
        x = tokens.index_select(0, rows.source[i:j])
        part = x @ up.t() if gated is None else torch.mm(x, up.t(), out=gated[i:j])
        hidden = gated_map.activated(part).mul_(rows.weights[i:j, None])
        torch.mm(hidden, low.t(), out=out[i:j])
    return out


def _gradients_in_turn(
    ctx: Any, grad: Tensor, tokens: Tensor, weights: ExpertWeights, rows: SortedRows, gated: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of tokens, gate_up, down and row weights."""
    grad_rows = tokens.new_empty(len(rows.source), tokens.shape[-1])
    grad_weights = torch.empty_like(rows.weights)
    gate_up, down = weights.gate_up, weights.down
    (sum_up, keep_up), (sum_down, keep_down) = _total(ctx, 0, gate_up), _total(ctx, 1, down)
    for expert, (i, j) in enumerate(_groups(rows.ends)):
        source, weight = rows.source[i:j], rows.weights[i:j, None]
        g = grad.index_select(0, source)
        grad_gated, hidden = gated_map.gradients(g @ down[expert], gated[i:j])
        grad_weights[i:j] = _of_weights(grad_gated, gated[i:j])
        grad_gated.mul_(weight)
        if sum_down is not None:
            total, hidden = sum_down[expert], hidden.mul_(weight)
            torch.addmm(total, g.t(), hidden, beta=keep_down, out=total)
        if sum_up is not None:
            total, x = sum_up[expert], tokens.index_select(0, source)
            torch.addmm(total, grad_gated.t(), x, beta=keep_up, out=total)
        torch.mm(grad_gated, gate_up[expert], out=grad_rows[i:j])
    if ctx.sums is not None:
        sum_up = sum_down = None
    return _sum_choices(grad_rows, rows.place), sum_up, sum_down, grad_weights


def _total(ctx: Any, which: int, weight: Tensor) -> tuple[Tensor | None, int]:
    """(the sum of the gradients of gate_up (0) or down (1), 0 if it is still empty, else 1)."""
    if not _is_wanted(ctx, which):
        return None, 0
    sums = {} if ctx.sums is None else ctx.sums
    known = which in sums
    sums[which] = sums[which] if known else torch.empty_like(weight)
    return sums[which], int(known)


# Gradients of weights that are used many times


class _Collect(torch.autograd.Function):
    """The identity; its gradient is the incoming one plus the one accumulated in `sums`."""

    @staticmethod
    def forward(ctx, weight, sums, which):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        ctx.sums, ctx.which = sums, which
        return weight.view_as(weight)

    @staticmethod
    @kernels.first_order
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        total = ctx.sums.pop(ctx.which, None)
        if total is not None and grad is not None:
            total = total + grad
        return grad if total is None else total, None, None


def _weight_gradient(
    ctx: Any, which: int, left: Tensor, right: Tensor, ends: Tensor
) -> Tensor | None:
    """left_g^T right_g of each group g: the gradient of gate_up (0) or down (1).

    Autograd would allocate a full gradient in every loop and add it to the sum: for many experts
    that is most of the memory traffic of a step. So each use adds its product to `ctx.sums`, in
    place, and returns None; `_Collect`, which autograd runs after the last use, returns the sum.
    """
    if not _is_wanted(ctx, which):
        return None
    product = grouped_outer(left, right, ends)
    if ctx.sums is None:
        return product
    ctx.sums[which] = product if which not in ctx.sums else ctx.sums[which].add_(product)
    return None


def _is_wanted(ctx: Any, which: int) -> bool:
    if not ctx.needs_input_grad[1 + which]:
        return False
    # If this gradient is not requested, its sum would be left over for the next backward pass.
    return ctx.sums is None or torch._C._will_engine_execute_node(ctx.collectors[which])
