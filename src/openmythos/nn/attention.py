"""What every attention layer shares: its interface, and softmax attention itself.

An attention layer is two maps: `project_kv` turns the layer's input into what a cache would store,
[batch, seq, kv_width], and `forward` lets queries attend to such tensors. Whoever runs the layer
decides which keys and values it sees: its own, a cache's, or those of an earlier loop.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openmythos import kernels
from openmythos.nn.blockwise import blockwise_attention
from openmythos.nn.layout import AttentionContext
from openmythos.nn.linear import NO_DELTAS, Deltas
from openmythos.types import Hidden, KeyValues

Position = Literal["rope", "none"]


def in_blocks(query: Tensor, context: AttentionContext) -> bool:
    """Whether `attend` leaves torch's kernel for our own: a CPU computes several queries."""
    causal = context.is_causal or context.mask is not None
    causal = causal and not context.packed
    # Compiled, every length is a program of its own: right for training, where all are equal.
    steady = torch.is_grad_enabled() or not torch.compiler.is_compiling()
    return kernels.own_form(query) and steady and causal and query.shape[2] > 1


def attention(
    query: Tensor, key: Tensor, value: Tensor, context: AttentionContext, scale: float
) -> Tensor:
    """softmax(scale q k^T) v, the formula; arguments as of `attend`."""
    if key.shape[1] != query.shape[1]:
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scores = scale * (query @ key.transpose(-2, -1))
    mask = context.mask
    if context.is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1) @ value


def attend(
    query: Tensor, key: Tensor, value: Tensor, context: AttentionContext, scale: float
) -> Tensor:
    """softmax(scale q k^T) v on [batch, heads, seq, head_dim]; keys may have fewer heads."""
    if kernels.reference():
        return attention(query, key, value, context, scale)
    value_dim = value.shape[-1]
    if in_blocks(query, context):
        return blockwise_attention(query, key, value, context.mask, context.window, scale)
    padding = query.shape[-1] - value_dim
    if padding > 0:
        # The fused CPU and GPU kernels want equal head dims; torch falls back to the slow one.
        value = F.pad(value, (0, padding))
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=context.mask,
        is_causal=context.is_causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[..., :value_dim]


class AttentionLayer(nn.Module):
    """Interface of the attention layers; `kv_width` numbers are stored per token and slot."""

    kv_width: int

    def project_kv(
        self, x: Hidden, context: AttentionContext, deltas: Deltas = NO_DELTAS
    ) -> KeyValues:
        """Keys and values of x, in the form that is cached."""
        raise TypeError(f"{type(self).__name__} must define project_kv")
