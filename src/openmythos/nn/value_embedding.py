"""Value embeddings: a table of values per token id, added to the values of attention."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from openmythos.config import MAX_WIDTH, require, require_int, require_number
from openmythos.nn.grouped_query import GroupedQueryAttention, GroupedQueryAttentionLayer
from openmythos.types import Hidden, TokenIds


@dataclass(frozen=True, kw_only=True)
class NoValueEmbeddings:
    """Values are a linear map of the layer's input, and nothing else."""

    kind: Literal["none"] = "none"

    def check(self, dim: int, attention: object) -> None:
        pass

    def add_to(self, layers: nn.ModuleList, vocab_size: int) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class GatedValueEmbeddings:
    """A table in every second layer of prelude, recurrent block and coda (Parcae, 2604.12946).

    The first `gate_channels` features of the layer's normed input set one gate per key-value head,
    between 0 and `gate_scale`. The loops share a layer's table, as they share the layer. Needs
    grouped-query attention.
    """

    kind: Literal["gated"] = "gated"
    gate_channels: int = 32
    gate_scale: float = 2.0

    def __post_init__(self) -> None:
        require_int("gate_channels", self.gate_channels, minimum=1, maximum=MAX_WIDTH)
        require_number("gate_scale", self.gate_scale, above=0, at_most=1e6)

    def check(self, dim: int, attention: object) -> None:
        """Raise a ConfigError unless a model of width `dim` can have them."""
        fits = isinstance(attention, GroupedQueryAttention)
        require(fits, "value_embeddings", self.kind, "needs grouped-query attention")
        text = f"must be at most dim = {dim}"
        require(self.gate_channels <= dim, "gate_channels", self.gate_channels, text)

    def add_to(self, layers: nn.ModuleList, vocab_size: int) -> None:
        """Give the second, fourth, ... layer a table of vocab_size rows."""
        for layer in list(layers)[1::2]:
            attention = layer.attention
            assert isinstance(attention, GroupedQueryAttentionLayer)  # the model's config checks it
            heads = attention.config.num_kv_heads
            attention.value_embedding = ValueEmbedding(self, vocab_size, heads, attention.head_dim)


ValueEmbeddings = NoValueEmbeddings | GatedValueEmbeddings


class ValueEmbedding(nn.Module):
    """gate_scale * sigmoid(W_gate x[:gate_channels])_g * table[token]_g for every head g."""

    decays = False

    def __init__(
        self, config: GatedValueEmbeddings, vocab_size: int, num_kv_heads: int, head_dim: int
    ) -> None:
        super().__init__()
        self.config = config
        self.table = nn.Embedding(vocab_size, num_kv_heads * head_dim)
        self.gate = nn.Linear(config.gate_channels, num_kv_heads, bias=False)

    def forward(self, x: Hidden, tokens: TokenIds) -> Tensor:
        """What is added to the values, [batch, seq, num_kv_heads * head_dim]."""
        gate = self.config.gate_scale * self.gate(x[..., : self.config.gate_channels]).sigmoid()
        rows: Tensor = self.table(tokens).unflatten(-1, (gate.shape[-1], -1))
        return (gate[..., None] * rows).flatten(-2)
