"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values from one latent.

Two paths that compute the same function. The naive one expands the latent to keys and values per
head: right for prefill and training. The absorbed one folds the expansion into query and output,
so that all heads attend to the cached latent itself: right for decoding.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from openmythos.config import MAX_PARTS, MAX_WIDTH, require, require_int, require_number
from openmythos.kernels.rope import rotate
from openmythos.nn.attention import AttentionLayer, Position
from openmythos.nn.layout import AttentionContext
from openmythos.nn.linear import NO_DELTAS, Deltas, Linear
from openmythos.nn.norm import RMSNorm
from openmythos.nn.rope_scaling import NoScaling, RopeScaling
from openmythos.types import Hidden, KeyValues


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention: the cache holds kv_latent_dim + rope_head_dim numbers a token.

    q_latent_dim = 0 projects queries directly. One rotary key of rope_head_dim is shared by all
    heads. `qk_norm` normalises each query head and the shared rotary key (the latents always are
    normed), which keeps the cache and the absorbed path exact.
    """

    kind: Literal["latent"] = "latent"
    num_heads: int = 8
    kv_latent_dim: int = 64
    q_latent_dim: int = 128
    nope_head_dim: int = 32
    rope_head_dim: int = 16
    value_head_dim: int = 32
    position: Position = "rope"
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling = field(default_factory=NoScaling)
    window: int = 0
    qk_norm: bool = False

    def __post_init__(self) -> None:
        require_int("num_heads", self.num_heads, minimum=1, maximum=MAX_PARTS)
        for name in ("kv_latent_dim", "nope_head_dim", "value_head_dim"):
            require_int(name, getattr(self, name), minimum=1, maximum=MAX_WIDTH)
        require_int("q_latent_dim", self.q_latent_dim, minimum=0, maximum=MAX_WIDTH)
        require_int("rope_head_dim", self.rope_head_dim, minimum=2, maximum=MAX_WIDTH)
        require(self.rope_head_dim % 2 == 0, "rope_head_dim", self.rope_head_dim, "must be even")
        require_int("window", self.window, minimum=0)
        require_number("rope_base", self.rope_base, above=0, at_most=1e12)

    def check(self, dim: int) -> None:
        """Any width will do: head sizes are set independently of dim."""

    def rotary_dim(self, dim: int) -> int:
        return self.rope_head_dim if self.position == "rope" else 0

    def kv_width(self, dim: int) -> int:
        return self.kv_latent_dim + self.rope_head_dim

    def multiply_adds_per_key(self, dim: int) -> int:
        """Multiply-adds of one query with one key and its value, all heads, on the naive path."""
        return self.num_heads * (self.nope_head_dim + self.rope_head_dim + self.value_head_dim)

    def kept_numbers(self, dim: int) -> int:
        """Activations per token saved for the backward pass, besides the normed input."""
        query = self.nope_head_dim + self.rope_head_dim
        # Values are padded to the width of the keys; latents are kept before and after norms.
        per_head = 2 * query + 2 * max(query, self.value_head_dim) + self.value_head_dim
        return self.num_heads * per_head + 2 * (self.q_latent_dim + self.kv_width(dim))

    def build(self, dim: int, norm_eps: float) -> "LatentAttentionLayer":
        return LatentAttentionLayer(self, dim, norm_eps)


class LatentAttentionLayer(AttentionLayer):
    """With c = norm(W_dkv x), k_r = rope(W_kr x) and q = [q_n | rope(q_r)] from norm(W_dq x):

    naive:    k_h = [W_uk,h c | k_r],  v_h = W_uv,h c,  o_h = softmax(q_h k_h^T / sqrt(d)) v_h
    absorbed: o_h = W_uv,h (softmax([W_uk,h^T q_n,h | q_r,h] [c | k_r]^T / sqrt(d)) c)
    d = nope_head_dim + rope_head_dim
    """

    def __init__(self, config: LatentAttention, dim: int, norm_eps: float) -> None:
        super().__init__()
        self.config = config
        self.kv_width = config.kv_width(dim)
        self.kv_parts = [config.kv_latent_dim, config.rope_head_dim]
        heads, query_dim = config.num_heads, config.nope_head_dim + config.rope_head_dim
        self.scale = query_dim**-0.5
        if config.q_latent_dim:
            self.query_down = Linear(dim, config.q_latent_dim, bias=False)
            self.query_latent_norm = RMSNorm(config.q_latent_dim, norm_eps)
            self.query_up = Linear(config.q_latent_dim, heads * query_dim, bias=False)
        else:
            self.query = Linear(dim, heads * query_dim, bias=False)
        self.kv_down = Linear(dim, self.kv_width, bias=False)
        self.kv_latent_norm = RMSNorm(config.kv_latent_dim, norm_eps)
        kv_up_dim = heads * (config.nope_head_dim + config.value_head_dim)
        self.kv_up = Linear(config.kv_latent_dim, kv_up_dim, bias=False)
        self.output = Linear(heads * config.value_head_dim, dim, bias=False)
        self.query_norm = RMSNorm(query_dim, norm_eps) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(config.rope_head_dim, norm_eps) if config.qk_norm else nn.Identity()

    def project_kv(
        self, x: Hidden, context: AttentionContext, deltas: Deltas = NO_DELTAS
    ) -> KeyValues:
        # split, not slices: the gradient of a slice is a copy among zeros, and a sum of those.
        latent, key = torch.split(self.kv_down(x, deltas), self.kv_parts, dim=-1)
        key = rotate(self.key_norm(key).unsqueeze(1), context.cos, context.sin).squeeze(1)
        return torch.cat((self.kv_latent_norm(latent), key), dim=-1)

    def forward(
        self, x: Hidden, kv: KeyValues, context: AttentionContext, deltas: Deltas = NO_DELTAS
    ) -> Hidden:
        c, seq, total = self.config, x.shape[1], kv.shape[1]
        if c.q_latent_dim:
            query = self.query_up(self.query_latent_norm(self.query_down(x, deltas)), deltas)
        else:
            query = self.query(x, deltas)
        query = self.query_norm(query.unflatten(-1, (c.num_heads, -1)).transpose(1, 2))
        nope, rope = torch.split(query, [c.nope_head_dim, c.rope_head_dim], dim=-1)
        rope = rotate(rope, context.cos, context.sin)
        # Multiply-adds per head that absorbing saves: it expands the seq queries, not all latents.
        # It adds some per query and key, since latents are wider than keys and values.
        head_dims = c.nope_head_dim + c.value_head_dim
        saved = (total - seq) * c.kv_latent_dim * head_dims
        added = seq * total * (2 * c.kv_latent_dim - head_dims)
        # Of a map that something wraps, such as peft, the weight is not all.
        plain = isinstance(self.kv_up, Linear)
        path = self.absorbed if saved > added and plain else self.naive
        out = path(nope, rope, kv.to(nope.dtype), context, deltas)
        return self.output(out.transpose(1, 2).flatten(2), deltas)

    def naive(
        self, nope: Tensor, rope: Tensor, kv: Tensor, context: AttentionContext, deltas: Deltas
    ) -> Tensor:
        """Expand keys and values per head; [batch, heads, seq, value_head_dim]."""
        c = self.config
        query = torch.cat((nope, rope), dim=-1)
        latent, rope_key = torch.split(kv, self.kv_parts, dim=-1)
        expanded = self.kv_up(latent, deltas).unflatten(-1, (c.num_heads, -1)).transpose(1, 2)
        nope_key, value = torch.split(expanded, [c.nope_head_dim, c.value_head_dim], dim=-1)
        rope_key = rope_key.unsqueeze(1).expand(-1, c.num_heads, -1, -1)
        key = torch.cat((nope_key, rope_key), dim=-1)
        return context.attend(query, key, value, self.scale)

    def absorbed(
        self, nope: Tensor, rope: Tensor, kv: Tensor, context: AttentionContext, deltas: Deltas
    ) -> Tensor:
        """Attend to the latents themselves as one key-value head shared by all query heads."""
        c = self.config
        weight, delta = self.kv_up.weight, deltas.get(self.kv_up.delta_key)
        if delta is not None:
            delta = delta.by_row()
            weight = weight + delta.up @ delta.down
        weight = weight.to(nope.dtype)
        weight = weight.view(*weight.shape[:-2], c.num_heads, -1, c.kv_latent_dim)
        query = torch.cat((per_head(nope, weight[..., : c.nope_head_dim, :]), rope), dim=-1)
        # The values include the rotary key, sliced off below: no copy of the latents.
        shared = kv.unsqueeze(1)
        batch, heads, seq, _ = query.shape
        alike = context.mask is None or (seq == 1 and context.packed)
        if alike and not context.is_causal:
            # All queries of a row see the same keys: fold the heads into the rows of one head.
            rows = query.transpose(1, 2).flatten(1, 2).unsqueeze(1)
            mixed = context.attend(rows, shared, shared, self.scale)
            mixed = mixed.view(batch, seq, heads, mixed.shape[-1]).transpose(1, 2)
        else:
            mixed = context.attend(query, shared, shared, self.scale)
        value_up = weight[..., c.nope_head_dim :, :].transpose(-2, -1)
        return per_head(mixed[..., : c.kv_latent_dim], value_up)


def per_head(x: Tensor, weight: Tensor) -> Tensor:
    """x [batch, heads, seq, in] times weight [heads, in, out], or [batch, heads, in, out].

    The heads are the batch of the matmul: broadcasting would copy the weight for every row.
    """
    if weight.ndim == 4:
        return x @ weight
    batch, heads, seq, _ = x.shape
    out = torch.bmm(x.transpose(0, 1).flatten(1, 2), weight)
    return out.view(heads, batch, seq, out.shape[-1]).transpose(0, 1)
