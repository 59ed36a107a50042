"""What every attention layer shares, and grouped-query attention.

An attention layer is two maps: `project_kv` turns the layer's input into what a cache would store,
[batch, seq, kv_width], and `forward` lets queries attend to such tensors. Whoever runs the layer
decides which keys and values it sees: its own, a cache's, or those of an earlier loop.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openmythos import kernels
from openmythos.config import MAX_PARTS, ConfigError, require, require_int, require_number
from openmythos.nn.blockwise import blockwise_attention
from openmythos.nn.linear import NO_DELTAS, Deltas, Linear
from openmythos.nn.norm import RMSNorm
from openmythos.nn.rope import apply_rope, rope_tables
from openmythos.types import Hidden, KeyValues

Position = Literal["rope", "none"]


@dataclass(frozen=True)
class AttentionContext:
    """Positions and masks of one forward pass: computed once, used by every layer in every loop."""

    cos: Tensor | None  # [batch or 1, seq, rotary_dim]; None without rotary positions
    sin: Tensor | None
    mask: Tensor | None  # [batch or 1, 1, seq, total], True = may attend
    is_causal: bool  # the mask is the plain causal one and need not be built
    window: int = 0  # keys that the mask lets a query see at most; 0: unlimited
    packed: bool = False  # the queries are not the last of the keys

    def rows(self, start: int, stop: int) -> "AttentionContext":
        """The context of a slice of the batch."""
        return self._take(slice(start, stop))

    def select(self, rows: Tensor) -> "AttentionContext":
        """The context of the batch reordered by `rows`."""
        return self._take(rows)

    def last(self) -> "AttentionContext":
        """The context of the last query of every row."""
        cos, sin = (None if x is None else x[:, -1:] for x in (self.cos, self.sin))
        mask = None if self.mask is None else self.mask[:, :, -1:]
        return AttentionContext(cos, sin, mask, False, self.window)

    def pick(self, columns: Tensor, total: int) -> "AttentionContext":
        """The context of the queries at `columns` [batch, picked] of each row, on `total` keys."""
        batch, picked = columns.shape

        def along(x: Tensor) -> Tensor:
            index = columns[..., None].expand(-1, -1, x.shape[-1])
            return x.expand(batch, -1, -1).gather(1, index)

        cos, sin = (None if x is None else along(x) for x in (self.cos, self.sin))
        if self.mask is not None:
            mask = along(self.mask[:, 0])
        elif self.is_causal:
            mask = torch.arange(total, device=columns.device) <= columns[..., None]
        else:
            mask = columns.new_ones(batch, picked, total, dtype=torch.bool)
        return AttentionContext(cos, sin, mask[:, None], False, self.window, packed=True)

    def _take(self, rows: Tensor | slice) -> "AttentionContext":
        # What has no batch dimension of its own serves every row.
        cos, sin, mask = (
            x if x is None or x.shape[0] == 1 else x[rows] for x in (self.cos, self.sin, self.mask)
        )
        return AttentionContext(cos, sin, mask, self.is_causal, self.window)


@dataclass(frozen=True)
class TokenLayout:
    """Where the tokens of a forward pass stand: columns [start, start + seq) of `total` keys.

    `valid` [batch, total] is False at padding, `documents` [batch, total] numbers the packed
    documents of a row; None means all valid, one document.
    """

    seq: int
    start: int
    device: torch.device
    valid: Tensor | None = None
    documents: Tensor | None = None

    def positions(self) -> Tensor:
        """Position of each token in its document, padding not counted, [batch or 1, seq]."""
        if self.documents is not None:
            index = torch.arange(self.seq, device=self.device).expand_as(self.documents)
            begins = self.documents.diff(dim=1, prepend=self.documents[:, :1]) != 0
            return index - (index * begins).cummax(dim=1).values
        if self.valid is None:
            return torch.arange(self.start, self.start + self.seq, device=self.device)[None]
        return (self.valid.long().cumsum(1) - 1).clamp_min(0)[:, self.start :]

    def mask(self, window: int) -> tuple[Tensor | None, bool]:
        """(mask, is_causal) for a sliding window of `window` keys (0: unlimited)."""
        total = self.start + self.seq
        windowed = 0 < window < total
        if self.valid is None and self.documents is None and not windowed:
            if self.seq == 1:
                return None, False
            if self.start == 0:
                return None, True
        query = torch.arange(self.start, total, device=self.device)[:, None]
        key = torch.arange(total, device=self.device)[None, :]
        allowed = (key <= query)[None]
        if windowed:
            allowed = allowed & (key > query - window)
        if self.documents is not None:
            allowed = allowed & (self.documents[:, self.start :, None] == self.documents[:, None])
        if self.valid is not None:
            # A padding token may look at itself, or its softmax would be over nothing.
            allowed = (allowed & self.valid[:, None]) | (key == query)
        return allowed[:, None], False


def attention_context(
    layout: TokenLayout, rotary_dim: int, base: float, window: int
) -> AttentionContext:
    """The shared part of attention for `layout`; rotary_dim 0 means no rotary positions."""
    mask, is_causal = layout.mask(window)
    if rotary_dim == 0:
        return AttentionContext(None, None, mask, is_causal, window)
    cos, sin = rope_tables(layout.positions(), rotary_dim, base)
    return AttentionContext(cos, sin, mask, is_causal, window)


def rotate(x: Tensor, context: AttentionContext) -> Tensor:
    """Apply the context's rotation to x [batch, heads, seq, rotary_dim]."""
    if context.cos is None or context.sin is None:
        return x
    return apply_rope(x, context.cos.unsqueeze(1), context.sin.unsqueeze(1))


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


@dataclass(frozen=True, kw_only=True)
class GroupedQueryAttention:
    """num_heads query heads that share num_kv_heads key-value heads (Ainslie et al. 2023).

    num_kv_heads = num_heads is multi-head attention. `window` > 0 limits every token to the last
    `window` tokens; `position = "none"` drops rotary positions (NoPE); `qk_norm` normalises each
    query and key head before the rotation.
    """

    kind: Literal["grouped_query"] = "grouped_query"
    num_heads: int = 8
    num_kv_heads: int = 8
    position: Position = "rope"
    rope_base: float = 10_000.0
    window: int = 0
    qk_norm: bool = False

    def __post_init__(self) -> None:
        require_int("num_heads", self.num_heads, minimum=1, maximum=MAX_PARTS)
        require_int("num_kv_heads", self.num_kv_heads, minimum=1, maximum=MAX_PARTS)
        require_int("window", self.window, minimum=0)
        require_number("rope_base", self.rope_base, above=0, at_most=1e12)
        require(
            self.num_heads % self.num_kv_heads == 0,
            "num_kv_heads",
            self.num_kv_heads,
            f"must divide num_heads = {self.num_heads}",
        )

    def check(self, dim: int) -> None:
        require(dim % self.num_heads == 0, "num_heads", self.num_heads, f"must divide dim = {dim}")
        if self.position == "rope" and (dim // self.num_heads) % 2:
            raise ConfigError(
                f"num_heads = {self.num_heads}: head_dim = dim / num_heads = "
                f"{dim // self.num_heads} must be even for rotary positions"
            )

    def rotary_dim(self, dim: int) -> int:
        return dim // self.num_heads if self.position == "rope" else 0

    def kv_width(self, dim: int) -> int:
        return 2 * self.num_kv_heads * (dim // self.num_heads)

    def build(self, dim: int, norm_eps: float) -> "GroupedQueryAttentionLayer":
        return GroupedQueryAttentionLayer(self, dim, norm_eps)


class GroupedQueryAttentionLayer(AttentionLayer):
    """o = W_o concat_h softmax(q_h k_g(h)^T / sqrt(head_dim)) v_g(h)."""

    def __init__(self, config: GroupedQueryAttention, dim: int, norm_eps: float) -> None:
        super().__init__()
        config.check(dim)
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = dim // config.num_heads
        self.kv_width = config.kv_width(dim)
        kv_dim = self.num_kv_heads * self.head_dim
        self.query = Linear(dim, dim, bias=False)
        self.key = Linear(dim, kv_dim, bias=False)
        self.value = Linear(dim, kv_dim, bias=False)
        self.output = Linear(dim, dim, bias=False)
        self.query_norm = RMSNorm(self.head_dim, norm_eps) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(self.head_dim, norm_eps) if config.qk_norm else nn.Identity()

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], x.shape[-1] // self.head_dim, self.head_dim).transpose(1, 2)

    def project_kv(
        self, x: Hidden, context: AttentionContext, deltas: Deltas = NO_DELTAS
    ) -> KeyValues:
        key = rotate(self.key_norm(self._heads(self.key(x, deltas))), context)
        return torch.cat((key.transpose(1, 2).flatten(2), self.value(x, deltas)), dim=-1)

    def forward(
        self, x: Hidden, kv: KeyValues, context: AttentionContext, deltas: Deltas = NO_DELTAS
    ) -> Hidden:
        query = rotate(self.query_norm(self._heads(self.query(x, deltas))), context)
        key, value = kv.to(query.dtype).chunk(2, dim=-1)
        out = attend(query, self._heads(key), self._heads(value), context, self.head_dim**-0.5)
        return self.output(out.transpose(1, 2).flatten(2), deltas)
