"""Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245)."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from openmythos.config import MAX_PARTS, MAX_WIDTH, require, require_int, require_number
from openmythos.kernels.rope import rotate
from openmythos.nn.attention import AttentionLayer, Position
from openmythos.nn.facts import Fill, constant
from openmythos.nn.layout import AttentionContext
from openmythos.nn.linear import NO_DELTAS, Deltas, Linear
from openmythos.nn.norm import RMSNorm
from openmythos.nn.rope_scaling import NoScaling, RopeScaling
from openmythos.types import Hidden, KeyValues


@dataclass(frozen=True, kw_only=True)
class GroupedQueryAttention:
    """num_heads query heads that share num_kv_heads key-value heads (Ainslie et al. 2023).

    num_kv_heads = num_heads is multi-head attention; `head_dim` = 0 is dim / num_heads. `window` >
    0 limits every token to the last `window` tokens. `position = "none"` drops rotary positions
    (NoPE); `rope_dim` > 0 rotates only the first `rope_dim` features of each head.

    `qk_norm` normalises queries and keys before the rotation: per head ("head", as in Qwen3), per
    head without weights ("plain", Parcae), or all heads as one vector ("width", OLMo 2).
    `qk_norm_eps` = 0 is the model's `norm_eps`. `qk_bias` adds a vector to every query and key head
    (Huginn).
    """

    kind: Literal["grouped_query"] = "grouped_query"
    num_heads: int = 8
    num_kv_heads: int = 8
    head_dim: int = 0
    position: Position = "rope"
    rope_base: float = 10_000.0
    rope_dim: int = 0
    rope_scaling: RopeScaling = field(default_factory=NoScaling)
    window: int = 0
    qk_norm: bool = False
    qk_norm_kind: Literal["head", "plain", "width"] = "head"
    qk_norm_eps: float = 0.0
    qk_bias: bool = False

    def __post_init__(self) -> None:
        require_int("num_heads", self.num_heads, minimum=1, maximum=MAX_PARTS)
        require_int("num_kv_heads", self.num_kv_heads, minimum=1, maximum=MAX_PARTS)
        for name in ("head_dim", "rope_dim"):
            require_int(name, getattr(self, name), minimum=0, maximum=MAX_WIDTH)
        require_int("window", self.window, minimum=0)
        require_number("rope_base", self.rope_base, above=0, at_most=1e12)
        require_number("qk_norm_eps", self.qk_norm_eps, at_least=0, at_most=1)
        require(
            self.num_heads % self.num_kv_heads == 0,
            "num_kv_heads",
            self.num_kv_heads,
            f"must divide num_heads = {self.num_heads}",
        )

    def check(self, dim: int) -> None:
        """Raise a ConfigError unless the head sizes fit a model of width `dim`."""
        if not self.head_dim:
            text = f"must divide dim = {dim}"
            require(dim % self.num_heads == 0, "num_heads", self.num_heads, text)
        size = self.size(dim)
        text = f"must be at most head_dim = {size}"
        require(self.rope_dim <= size, "rope_dim", self.rope_dim, text)
        name = "rope_dim" if self.rope_dim else "head_dim" if self.head_dim else "num_heads"
        text = f"head_dim = dim / num_heads = {size} must be even for rotary positions"
        text = text if name == "num_heads" else "must be even for rotary positions"
        require(self.rotary_dim(dim) % 2 == 0, name, getattr(self, name), text)

    def size(self, dim: int) -> int:
        """The head dimension in a model of width `dim`."""
        return self.head_dim or dim // self.num_heads

    def rotary_dim(self, dim: int) -> int:
        return (self.rope_dim or self.size(dim)) if self.position == "rope" else 0

    def kv_width(self, dim: int) -> int:
        return 2 * self.num_kv_heads * self.size(dim)

    def multiply_adds_per_key(self, dim: int) -> int:
        """Multiply-adds of one query with one key and its value, over all heads."""
        return 2 * self.num_heads * self.size(dim)

    def kept_numbers(self, dim: int) -> int:
        """Activations per token saved for the backward pass, besides the normed input."""
        # Queries, K/V, output per head and concatenated; qk_norm also saves its inputs.
        heads, width = self.num_heads * self.size(dim), self.kv_width(dim)
        return 3 * heads + width + self.qk_norm * (heads + width // 2)

    def build(self, dim: int, norm_eps: float) -> "GroupedQueryAttentionLayer":
        return GroupedQueryAttentionLayer(self, dim, norm_eps)


class GroupedQueryAttentionLayer(AttentionLayer):
    """o = W_o concat_h softmax(q_h k_g(h)^T / sqrt(head_dim)) v_g(h)."""

    def __init__(self, config: GroupedQueryAttention, dim: int, norm_eps: float) -> None:
        super().__init__()
        config.check(dim)
        self.config = config
        self.head_dim = config.size(dim)
        self.kv_width = config.kv_width(dim)
        heads, kv_heads = (n * self.head_dim for n in (config.num_heads, config.num_kv_heads))
        self.query = Linear(dim, heads, bias=False)
        self.key = Linear(dim, kv_heads, bias=False)
        self.value = Linear(dim, kv_heads, bias=False)
        self.output = Linear(heads, dim, bias=False)
        self.query_norm, self.key_norm = (
            RMSNorm(
                width if config.qk_norm_kind == "width" else self.head_dim,
                config.qk_norm_eps or norm_eps,
                weighted=config.qk_norm_kind != "plain",
            )
            if config.qk_norm
            else nn.Identity()
            for width in (heads, kv_heads)
        )
        if config.qk_bias:
            self.query_bias = nn.Parameter(torch.zeros(heads))
            self.key_bias = nn.Parameter(torch.zeros(kv_heads))
        self.value_embedding: nn.Module | None = None  # set by `nn.value_embedding`

    def fills(self) -> dict[str, Fill]:
        biases = ("query_bias", "key_bias") if self.config.qk_bias else ()
        return dict.fromkeys(biases, constant(0.0))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], x.shape[-1] // self.head_dim, self.head_dim).transpose(1, 2)

    def _turned(
        self, x: Tensor, norm: nn.Module, bias: Tensor | None, context: AttentionContext
    ) -> Tensor:
        """Queries or keys [batch, seq, heads * head_dim], split into heads, normed and rotated."""
        by_width = self.config.qk_norm_kind == "width"
        x = self._heads(norm(x)) if by_width else norm(self._heads(x))
        if bias is not None:
            x = x + bias.view(-1, 1, self.head_dim).to(x.dtype)
        part = self.config.rope_dim
        if context.cos is None or part in (0, self.head_dim):
            return rotate(x, context.cos, context.sin)
        return torch.cat((rotate(x[..., :part], context.cos, context.sin), x[..., part:]), dim=-1)

    def project_kv(
        self, x: Hidden, context: AttentionContext, deltas: Deltas = NO_DELTAS
    ) -> KeyValues:
        bias = self.key_bias if self.config.qk_bias else None
        key = self._turned(self.key(x, deltas), self.key_norm, bias, context)
        value = self.value(x, deltas)
        if self.value_embedding is not None:
            value = value + self.value_embedding(x, context.tokens).to(value.dtype)
        return torch.cat((key.transpose(1, 2).flatten(2), value), dim=-1)

    def forward(
        self, x: Hidden, kv: KeyValues, context: AttentionContext, deltas: Deltas = NO_DELTAS
    ) -> Hidden:
        bias = self.query_bias if self.config.qk_bias else None
        query = self._turned(self.query(x, deltas), self.query_norm, bias, context)
        key, value = kv.to(query.dtype).chunk(2, dim=-1)
        out = context.attend(query, self._heads(key), self._heads(value), self.head_dim**-0.5)
        return self.output(out.transpose(1, 2).flatten(2), deltas)
