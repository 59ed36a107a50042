"""Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from openmythos.config import MAX_PARTS, ConfigError, require, require_int, require_number
from openmythos.kernels.rope import rotate
from openmythos.nn.attention import AttentionLayer, Position
from openmythos.nn.layout import AttentionContext
from openmythos.nn.linear import NO_DELTAS, Deltas, Linear
from openmythos.nn.norm import RMSNorm
from openmythos.types import Hidden, KeyValues


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

    def multiply_adds_per_key(self, dim: int) -> int:
        """Of a query with one key and one value over all heads."""
        return 2 * dim

    def kept_numbers(self, dim: int) -> int:
        """Numbers per token that a layer keeps for its backward pass, beside its normed input."""
        # Query, keys and values, output by head and joined; qk_norm keeps its inputs.
        width = self.kv_width(dim)
        return 3 * dim + width + self.qk_norm * (dim + width // 2)

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
        key = self.key_norm(self._heads(self.key(x, deltas)))
        key = rotate(key, context.cos, context.sin)
        return torch.cat((key.transpose(1, 2).flatten(2), self.value(x, deltas)), dim=-1)

    def forward(
        self, x: Hidden, kv: KeyValues, context: AttentionContext, deltas: Deltas = NO_DELTAS
    ) -> Hidden:
        query = self.query_norm(self._heads(self.query(x, deltas)))
        query = rotate(query, context.cos, context.sin)
        key, value = kv.to(query.dtype).chunk(2, dim=-1)
        out = context.attend(query, self._heads(key), self._heads(value), self.head_dim**-0.5)
        return self.output(out.transpose(1, 2).flatten(2), deltas)
