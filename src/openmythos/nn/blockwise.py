"""Causal softmax attention on a CPU: blocks of queries against the keys that they may see.

torch's fused CPU kernel computes about as fast as fp32 matmuls, but its backward pass and its bf16
path are far slower than the machine's. Plain matmuls on blocks of queries reach those speeds, and
skip the keys that lie after a block or before its window.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from openmythos import kernels

# Up to so many keys a block has 64 queries, beyond 128.
FEW_KEYS = 512
# Up to so many keys the backward pass keeps the weights, beyond it computes them again.
KEPT_KEYS = 256


class _Blocks(NamedTuple):
    """How a call is cut: queries [i, j) of a block see keys [first key, last key)."""

    queries: list[tuple[int, int]]
    keys: list[tuple[int, int]]

    @classmethod
    def cut(cls, seq: int, total: int, window: int) -> "_Blocks":
        edges = [*range(0, seq, 64 if total <= FEW_KEYS else 128), seq]
        start = total - seq
        queries = list(pairwise(edges))
        keys = [(max(0, start + i - window + 1) if window else 0, start + j) for i, j in queries]
        return cls(queries, keys)


def blockwise_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, window: int, scale: float
) -> Tensor:
    """softmax(scale q k^T) v where key j <= query i; shapes as in `attention.attend`.

    The queries are the last of the keys. `mask` [batch or 1, 1, seq, total], True = may attend,
    must allow no later key, and with window > 0 none that is `window` or more keys older; None is
    the plain causal mask.
    """
    batch, heads = query.shape[:2]
    if key.shape[1] != heads:
        key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    flat = [x.reshape(batch * heads, *x.shape[2:]) for x in (query, key, value)]
    out: Tensor = _BlockwiseAttention.apply(*flat, mask, window, scale, heads)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2)


def _weights(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    queries: tuple[int, int],
    keys: tuple[int, int],
    scale: float,
) -> Tensor:
    """Attention weights [batch * heads, queries, keys] of one block."""
    (i, j), (first, last) = queries, keys
    scores = torch.bmm(query[:, i:j] * scale, key[:, first:last].transpose(1, 2))
    if mask is None:
        later = torch.ones(j - i, j - i, dtype=torch.bool, device=scores.device).triu(1)
        scores[..., i - j :].masked_fill_(later, float("-inf"))
    else:
        hidden = ~mask[:, :, i:j, first:last]
        heads = len(scores) // max(1, mask.shape[0])
        scores.view(mask.shape[0], heads, *scores.shape[1:]).masked_fill_(hidden, float("-inf"))
    return scores.softmax(dim=-1)


class _BlockwiseAttention(torch.autograd.Function):
    """o = p v, p = softmax(s), s = scale q k^T, and with g = dL/do (Dao et al. 2022, appendix B.2)

    dL/dv = p^T g,  dL/ds = p * (g v^T - rowsum(g * o)),
    dL/dq = scale dL/ds k,  dL/dk = scale (dL/ds)^T q

    o is [batch, seq, heads, head_dim], which the map after it reads as it is: kept once for both.
    """

    @staticmethod
    def forward(ctx, query, key, value, mask, window, scale, heads):  # type: ignore[no-untyped-def]
        blocks = _Blocks.cut(query.shape[1], key.shape[1], window)
        out = query.new_empty(len(query) // heads, query.shape[1], heads, value.shape[2])
        kept = []
        keep = key.shape[1] <= KEPT_KEYS and any(ctx.needs_input_grad)
        for queries, keys in zip(*blocks, strict=True):
            weights = _weights(query, key, mask, queries, keys, scale)
            mixed = torch.bmm(weights, value[:, slice(*keys)])
            out[:, slice(*queries)] = mixed.view(len(out), heads, *mixed.shape[1:]).transpose(1, 2)
            if keep:
                kept.append(weights)
        ctx.save_for_backward(query, key, value, mask, out, *kept)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    @kernels.first_order
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        query, key, value, mask, out, *kept = ctx.saved_tensors
        mean = (grad * out).sum(dim=-1, keepdim=True).transpose(1, 2).reshape(*query.shape[:2], 1)
        grad = grad.transpose(1, 2).flatten(0, 1)
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        for index, (queries, keys) in enumerate(zip(*ctx.blocks, strict=True)):
            q, k = slice(*queries), slice(*keys)
            weights = kept[index] if kept else _weights(query, key, mask, queries, keys, ctx.scale)
            grad_value[:, k].baddbmm_(weights.transpose(1, 2), grad[:, q])
            grad_scores = torch.bmm(grad[:, q], value[:, k].transpose(1, 2))
            grad_scores = grad_scores.sub_(mean[:, q]).mul_(weights).mul_(ctx.scale)
            torch.bmm(grad_scores, key[:, k], out=grad_query[:, q])
            grad_key[:, k].baddbmm_(grad_scores.transpose(1, 2), query[:, q])
        return grad_query, grad_key, grad_value, None, None, None, None
