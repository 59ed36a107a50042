"""Softmax attention: softmax(scale q k^T) v, for causal and masked queries.

On a CPU, several queries with many keys are computed in blocks, each with the keys that it may see.
Matmuls on blocks of queries skip the keys after a block or before its window, and are fast in bf16,
where torch's fused kernel is not. With few keys in fp32 the form of `few_keys` is faster, and where
it cannot be used, torch's fused kernel.
"""

import itertools
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from openmythos import kernels
from openmythos.kernels import few_keys
from openmythos.kernels.precision import as_autocast
from openmythos.types import AttentionMask, AttentionOutput, Keys, Queries, Values

# Up to so many keys, torch's fused kernel is faster than blocks in fp32, forward and backward.
FUSED_KEYS = 128
# A block has 64 queries with up to this many keys, 128 with more.
FEW_KEYS = 512
# Attention weights are saved for the backward pass up to this many keys, else recomputed.
KEPT_KEYS = 256
# So many scores, for some heads and one block of queries, are computed at a time: 512 KiB in fp32.
CACHED_SCORES = 1 << 17


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
    in_fp32 = as_autocast(query).dtype.itemsize >= 4
    if in_fp32 and few_keys.accepts(query, key, value):
        causal = is_causal or (mask is not None and not packed)
        return few_keys.attention(query, key, value, mask, is_causal=causal, scale=scale)
    if (
        tuned.blocks
        and query.shape[2] > 1
        and (is_causal or mask is not None)
        and not packed
        and not (in_fp32 and key.shape[2] <= FUSED_KEYS)
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
    heads = query.shape[1]
    if key.shape[1] != heads:
        key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    # The backward pass runs outside autocast: save the tensors as the forward pass casts them.
    inputs = (as_autocast(x).contiguous() for x in (query, key, value))
    out: Tensor = _BlockwiseAttention.apply(*inputs, mask, window, scale)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2)


class _Pieces:
    """Attention in pieces: some rows of the batch, or some heads of one; then blocks of queries.

    `heads` has the pieces of the first two dimensions, chosen so that the scores of a block stay in
    the processor's cache; `blocks` has the queries of each block and the keys that they may see.
    """

    def __init__(
        self, query: Tensor, key: Tensor, mask: Tensor | None, window: int, most: int
    ) -> None:
        """`most` heads are computed at a time, in one row or more; 0: all of the batch."""
        (batch, heads, seq, _), total = query.shape, key.shape[2]
        size = _block_size(total)
        start = total - seq
        self.blocks = [
            (slice(i, j), slice(max(0, start + i - window + 1) if window else 0, start + j))
            for i, j in pairwise([*range(0, seq, size), seq])
        ]
        few, rows = most or heads, max(1, most // heads) if most else batch
        starts = itertools.product(range(0, batch, rows), range(0, heads, few))
        self.heads = [
            (slice(b, min(b + rows, batch)), slice(h, min(h + few, heads))) for b, h in starts
        ]
        self.mask, self.like = mask, query
        self.later = self._bias(
            torch.ones(size, size, dtype=torch.bool, device=query.device).triu(1)
        )

    def _bias(self, hidden: Tensor) -> Tensor:
        """0, and -inf where hidden. Added to the scores, it is faster than masked_fill_ on them."""
        return self.like.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))

    def weights(
        self, query: Tensor, key: Tensor, batch: slice, queries: slice, keys: slice
    ) -> Tensor:
        """Attention weights [heads, queries, keys] of one block; the queries are scaled."""
        scores = torch.bmm(query[:, queries], key[:, keys].transpose(1, 2))
        if self.mask is None:
            size = scores.shape[1]
            scores[..., -size:].add_(self.later[:size, :size])
        else:
            mask = self.mask if len(self.mask) == 1 else self.mask[batch]
            bias = self._bias(~mask[:, :, queries, keys])
            scores.view(len(bias), -1, *scores.shape[1:]).add_(bias)
        return scores.softmax(dim=-1)


def _block_size(total: int) -> int:
    return 64 if total <= FEW_KEYS else 128


class _BlockwiseAttention(torch.autograd.Function):
    """o = p v, p = softmax(s), s = scale q k^T, and with g = dL/do (Dao et al. 2022, appendix B.2)

    dL/dv = p^T g,  dL/ds = p * (g v^T - rowsum(g * o)),
    dL/dq = scale dL/ds k,  dL/dk = scale (dL/ds)^T q

    o is [batch, seq, heads, head_dim], the layout that the output map reads: saved once for both.
    """

    @staticmethod
    def forward(ctx, query, key, value, mask, window, scale):  # type: ignore[no-untyped-def]
        (batch, heads, seq, _), total = query.shape, key.shape[2]
        most = 0  # torch.compile would unroll the loop
        if not torch.compiler.is_compiling():
            most = max(1, CACHED_SCORES // (min(_block_size(total), seq) * total))
        pieces = _Pieces(query, key, mask, window, most)
        out = query.new_empty(batch, seq, heads, value.shape[3])
        kept = []
        keep = total <= KEPT_KEYS and any(ctx.needs_input_grad)
        for b, h in pieces.heads:
            q, k, v = (x[b, h].flatten(0, 1) for x in (query, key, value))
            q = q * scale
            for queries, keys in pieces.blocks:
                weights = pieces.weights(q, k, b, queries, keys)
                target = out[b, queries, h].transpose(1, 2)
                target.copy_(torch.bmm(weights, v[:, keys]).view(target.shape))
                if keep:
                    kept.append(weights)
        ctx.save_for_backward(query, key, value, mask, out, *kept)
        # A compiled forward pass may have a backward pass that is not.
        ctx.window, ctx.scale, ctx.most = window, scale, most
        return out

    @staticmethod
    @kernels.first_order
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        query, key, value, mask, out, *kept = ctx.saved_tensors
        pieces = _Pieces(query, key, mask, ctx.window, ctx.most)
        grads = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        weights_of = iter(kept)
        for b, h in pieces.heads:
            q, k, v = (x[b, h].flatten(0, 1) for x in (query, key, value))
            grad_q, grad_k, grad_v = (x[b, h].flatten(0, 1) for x in grads)
            g, o = (x[b, :, h].transpose(1, 2).flatten(0, 1) for x in (grad, out))
            mean = (g * o).sum(dim=-1, keepdim=True)
            q = q * ctx.scale
            for queries, keys in pieces.blocks:
                weights = next(weights_of, None)
                if weights is None:
                    weights = pieces.weights(q, k, b, queries, keys)
                grad_v[:, keys].baddbmm_(weights.transpose(1, 2), g[:, queries])
                grad_scores = torch.bmm(g[:, queries], v[:, keys].transpose(1, 2))
                grad_scores = grad_scores.sub_(mean[:, queries]).mul_(weights)
                torch.bmm(grad_scores, k[:, keys], out=grad_q[:, queries])
                grad_k[:, keys].baddbmm_(grad_scores.transpose(1, 2), q[:, queries])
            grad_q.mul_(ctx.scale)
        return *grads, None, None, None
