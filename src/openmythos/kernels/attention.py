"""Softmax attention: softmax(scale q k^T) v, for causal and masked queries.

On a CPU, several queries are computed in blocks, each with the keys that it may see. torch's fused
CPU kernel is about as fast as matmuls in its fp32 forward pass, but its backward pass and its bf16
path are far slower. Matmuls on blocks of queries are fast in all of them, and skip the keys after a
block or before its window.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from openmythos import kernels
from openmythos.kernels.precision import as_autocast
from openmythos.types import AttentionMask, AttentionOutput, Keys, Queries, Values

# A block has 64 queries with up to this many keys, 128 with more.
FEW_KEYS = 512
# Attention weights are saved for the backward pass up to this many keys, else recomputed.
KEPT_KEYS = 256


def reference(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """The formula; arguments as in `attention`."""
    if key.shape[1] != query.shape[1]:
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scores = scale * (query @ key.transpose(-2, -1))
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1) @ value


def attention(
    query: Queries,
    key: Keys,
    value: Values,
    *,
    mask: AttentionMask | None = None,
    is_causal: bool = False,
    window: int = 0,
    packed: bool = False,
    scale: float,
) -> AttentionOutput:
    """softmax(scale q k^T) v; heads must be a multiple of kv_heads.

    mask: True = may attend; it must be causal and, with window > 0, exclude keys that are `window`
    or more keys older. `is_causal`: the plain causal mask, which is not built. Without either every
    query sees every key. The queries are at the last positions of the keys, unless `packed`.
    """
    tuned = kernels.fast(query.device)
    if tuned is None:
        return reference(query, key, value, mask=mask, is_causal=is_causal, scale=scale)
    if (
        tuned.blocks
        and query.shape[2] > 1
        and (is_causal or mask is not None)
        and not packed
        # torch.compile specialises on the length: fine in training, where it is constant.
        and (torch.is_grad_enabled() or not torch.compiler.is_compiling())
    ):
        return blockwise_attention(query, key, value, mask, window, scale)
    value_dim = value.shape[-1]
    padding = query.shape[-1] - value_dim
    if padding > 0:
        # The fused kernels need equal head dims; otherwise torch falls back to a slow one.
        value = F.pad(value, (0, padding))
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[..., :value_dim]


def blockwise_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, window: int, scale: float
) -> Tensor:
    """softmax(scale q k^T) v where key j <= query i; shapes as in `attention`.

    The queries are at the last positions of the keys. `mask` [batch or 1, 1, seq, total], True =
    may attend, must be causal and, with window > 0, exclude keys that are `window` or more keys
    older; None is the plain causal mask.
    """
    batch, heads = query.shape[:2]
    if key.shape[1] != heads:
        key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    # The backward pass runs outside autocast: save the tensors as the forward pass casts them.
    query, key, value = as_autocast(query), as_autocast(key), as_autocast(value)
    flat = [x.reshape(batch * heads, *x.shape[2:]) for x in (query, key, value)]
    out: Tensor = _BlockwiseAttention.apply(*flat, mask, window, scale, heads)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2)


def _weights(
    query: Tensor, key: Tensor, mask: Tensor | None, queries: slice, keys: slice, scale: float
) -> Tensor:
    """Attention weights [batch * heads, queries, keys] of one block."""
    scores = torch.bmm(query[:, queries] * scale, key[:, keys].transpose(1, 2))
    if mask is None:
        size = scores.shape[1]
        later = torch.ones(size, size, dtype=torch.bool, device=scores.device).triu(1)
        scores[..., queries.start - queries.stop :].masked_fill_(later, float("-inf"))
    else:
        hidden = ~mask[:, :, queries, keys]
        heads = len(scores) // max(1, mask.shape[0])
        scores.view(mask.shape[0], heads, *scores.shape[1:]).masked_fill_(hidden, float("-inf"))
    return scores.softmax(dim=-1)


class _BlockwiseAttention(torch.autograd.Function):
    """o = p v, p = softmax(s), s = scale q k^T, and with g = dL/do (Dao et al. 2022, appendix B.2)

    dL/dv = p^T g,  dL/ds = p * (g v^T - rowsum(g * o)),
    dL/dq = scale dL/ds k,  dL/dk = scale (dL/ds)^T q

    o is [batch, seq, heads, head_dim], the layout that the output map reads: saved once for both.
    """

    @staticmethod
    def forward(ctx, query, key, value, mask, window, scale, heads):  # type: ignore[no-untyped-def]
        seq, total = query.shape[1], key.shape[1]
        edges = [*range(0, seq, 64 if total <= FEW_KEYS else 128), seq]
        start = total - seq
        # The queries of each block, and the keys that they may see.
        blocks = [
            (slice(i, j), slice(max(0, start + i - window + 1) if window else 0, start + j))
            for i, j in pairwise(edges)
        ]
        out = query.new_empty(len(query) // heads, seq, heads, value.shape[2])
        kept = []
        keep = total <= KEPT_KEYS and any(ctx.needs_input_grad)
        for queries, keys in blocks:
            weights = _weights(query, key, mask, queries, keys, scale)
            mixed = torch.bmm(weights, value[:, keys])
            out[:, queries] = mixed.view(len(out), heads, *mixed.shape[1:]).transpose(1, 2)
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
        for index, (q, k) in enumerate(ctx.blocks):
            weights = kept[index] if kept else _weights(query, key, mask, q, k, ctx.scale)
            grad_value[:, k].baddbmm_(weights.transpose(1, 2), grad[:, q])
            grad_scores = torch.bmm(grad[:, q], value[:, k].transpose(1, 2))
            grad_scores = grad_scores.sub_(mean[:, q]).mul_(weights).mul_(ctx.scale)
            torch.bmm(grad_scores, key[:, k], out=grad_query[:, q])
            grad_key[:, k].baddbmm_(grad_scores.transpose(1, 2), query[:, q])
        return grad_query, grad_key, grad_value, None, None, None, None
