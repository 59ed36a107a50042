"""One pre-norm layer: attention and feed-forward around a residual stream."""

from typing import NamedTuple

import torch
from torch import nn

from openmythos.nn.cache import CacheSlot
from openmythos.nn.experts import ExpertWeights
from openmythos.nn.feed_forward import FeedForwardLayer, ReLU2, RouterStats, SwiGLU
from openmythos.nn.grouped_query import GroupedQueryAttention
from openmythos.nn.latent_attention import LatentAttention
from openmythos.nn.layout import AttentionContext
from openmythos.nn.linear import NO_DELTAS, Deltas
from openmythos.nn.moe import MoE
from openmythos.nn.norm import RMSNorm
from openmythos.nn.view import LayerView, NoCache
from openmythos.types import Hidden, KeyValues, Mask

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
        self.feed_forward: FeedForwardLayer = feed_forward.build(dim)

    def forward(
        self,
        x: Hidden,
        context: AttentionContext,
        *,
        slot: CacheSlot | None = None,
        frozen: Frozen | None = None,
        deltas: Deltas = NO_DELTAS,
        expert_weights: ExpertWeights | None = None,
        last_only: bool = False,
    ) -> BlockOutput:
        """x [batch, seq, dim]; last_only computes the output of the last position alone."""
        if frozen is not None and not bool(frozen.active.all()):
            assert not last_only  # a coda's option; what halts is in the loop
            return self._forward_active(x, context, slot, frozen, deltas, expert_weights)
        normed = self.attention_norm(x)
        if slot is not None and not slot.writes:
            visible = slot.read(x.shape[1])
            kv = visible[:, slot.start :]
        else:
            kv = self.attention.project_kv(normed, context, deltas)
            visible = kv if slot is None else slot.write(kv)
        if last_only:
            x, normed, context = x[:, -1:], normed[:, -1:], context.last()
        x = x + self.attention(normed, visible, context, deltas)
        view = LayerView(
            context,
            NoCache(),
            deltas=deltas,
            expert_weights=expert_weights,
            collects=self.training and slot is None,  # with a cache it is inference
        )
        update, router = self.feed_forward(self.feed_forward_norm(x), view)
        return BlockOutput(x + update, kv, router)

    def _forward_active(
        self,
        x: Hidden,
        context: AttentionContext,
        slot: CacheSlot | None,
        frozen: Frozen,
        deltas: Deltas,
        expert_weights: ExpertWeights | None,
    ) -> BlockOutput:
        """The same at active positions alone, moved to the front of their rows.

        Rows are as long as the one with most active positions, and padded with halted ones.
        """
        # At least one, so that a row of none is no special case further down.
        longest = max(1, int(frozen.active.sum(dim=1).max()))
        order = (~frozen.active).to(torch.int8).argsort(dim=1, stable=True)
        columns = order[:, :longest]
        active = frozen.active.gather(1, columns)
        packed = x.gather(1, columns[..., None].expand(-1, -1, x.shape[2]))
        start = 0 if slot is None else slot.start
        context = context.pick(columns, start + x.shape[1])
        normed = self.attention_norm(packed)
        if slot is not None and not slot.writes:
            visible = slot.read(x.shape[1])
            kv = visible[:, slot.start :]
        else:
            places = columns[..., None].expand(-1, -1, frozen.kv.shape[2])
            new = self.attention.project_kv(normed, context, deltas)
            new = torch.where(active[..., None], new, frozen.kv.gather(1, places))
            kv = frozen.kv.scatter(1, places, new)
            visible = kv if slot is None else slot.write(kv)
        packed = packed + self.attention(normed, visible, context, deltas)
        view = LayerView(
            context,
            NoCache(),
            deltas=deltas,
            expert_weights=expert_weights,
            active=active,
            collects=self.training and slot is None,
        )
        update, router = self.feed_forward(self.feed_forward_norm(packed), view)
        where = active.nonzero(as_tuple=True)
        changed = (packed + update)[where].to(x.dtype)
        return BlockOutput(x.index_put((where[0], columns[where]), changed), kv, router)
