"""One pre-norm layer: attention and feed-forward around a residual stream."""

from typing import NamedTuple

import torch
from torch import nn

from openmythos.nn.attention import AttentionContext, GroupedQueryAttention
from openmythos.nn.cache import CacheSlot
from openmythos.nn.feed_forward import ReLU2, SwiGLU, TokenRows
from openmythos.nn.latent_attention import LatentAttention
from openmythos.nn.linear import NO_DELTAS, Deltas, RMSNorm
from openmythos.nn.moe import ExpertWeights, MoE, MoELayer, RouterStats
from openmythos.types import Hidden, KeyValues, Mask, Tokens

Attention = LatentAttention | GroupedQueryAttention
FeedForward = SwiGLU | ReLU2 | MoE


class BlockOutput(NamedTuple):
    x: Hidden
    kv: KeyValues  # of this call's own tokens, whatever older ones they attended to
    router: RouterStats | None


class Frozen(NamedTuple):
    """Positions that have halted: their keys and values stay as they were, their x is not used."""

    active: Mask
    kv: KeyValues


class Block(nn.Module):
    """x = x + Attention(norm(x));  x = x + FeedForward(norm(x))."""

    def __init__(
        self, dim: int, attention: Attention, feed_forward: FeedForward, norm_eps: float
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(dim, norm_eps)
        self.attention = attention.build(dim, norm_eps)
        self.feed_forward_norm = RMSNorm(dim, norm_eps)
        self.feed_forward = feed_forward.build(dim)

    def prepare(self) -> ExpertWeights | None:
        """What a caller that runs the layer many times makes once, for `expert_weights`."""
        if isinstance(self.feed_forward, MoELayer):
            return self.feed_forward.experts.weights()
        return None

    def forward(
        self,
        x: Hidden,
        context: AttentionContext,
        *,
        slot: CacheSlot | None = None,
        frozen: Frozen | None = None,
        deltas: Deltas = NO_DELTAS,
        expert_weights: ExpertWeights | None = None,
    ) -> BlockOutput:
        normed = self.attention_norm(x)
        if slot is not None and not slot.writes:
            visible = slot.read(x.shape[1])
            kv = visible[:, slot.start :]
        else:
            kv = self.attention.project_kv(normed, context, deltas)
            if frozen is not None:
                kv = torch.where(frozen.active[..., None], kv, frozen.kv)
            visible = kv if slot is None else slot.write(kv)
        x = x + self.attention(normed, visible, context, deltas)
        active = None if frozen is None else frozen.active
        x, router = self._feed(x, active, deltas, expert_weights)
        return BlockOutput(x, kv, router)

    def _feed(
        self, x: Hidden, active: Mask | None, deltas: Deltas, expert_weights: ExpertWeights | None
    ) -> tuple[Hidden, RouterStats | None]:
        """Add the feed-forward branch, computed at active positions only."""
        batch, seq, _ = x.shape
        if active is None:
            index = torch.arange(batch, device=x.device).repeat_interleave(seq)
            tokens = self.feed_forward_norm(x).flatten(0, 1)
            update, router = self._branch(tokens, TokenRows(index, batch), deltas, expert_weights)
            return x + update.view_as(x), router
        where = active.nonzero(as_tuple=True)
        tokens = x[where]
        normed = self.feed_forward_norm(tokens)
        update, router = self._branch(normed, TokenRows(where[0], batch), deltas, expert_weights)
        return x.index_put(where, (tokens + update).to(x.dtype)), router

    def _branch(
        self,
        tokens: Tokens,
        rows: TokenRows,
        deltas: Deltas,
        expert_weights: ExpertWeights | None,
    ) -> tuple[Tokens, RouterStats | None]:
        if isinstance(self.feed_forward, MoELayer):
            return self.feed_forward(tokens, rows, deltas, expert_weights)
        return self.feed_forward(tokens, rows, deltas)
