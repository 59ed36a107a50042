"""Value embeddings: a table of values per token id, added to the values of attention."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from openmythos.config import MAX_WIDTH, require_int, require_number
from openmythos.nn.grouped_query import GroupedQueryAttention
from openmythos.nn.latent_attention import LatentAttention
from openmythos.types import Hidden, KeyValues, TokenIds


@dataclass(frozen=True, kw_only=True)
class NoValueEmbeddings:
    """Values are a linear map of the layer's input, and nothing else."""

    kind: Literal["none"] = "none"

    def build(
        self, vocab_size: int, dim: int, attention: GroupedQueryAttention | LatentAttention
    ) -> None:
        return None


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

    def build(
        self, vocab_size: int, dim: int, attention: GroupedQueryAttention | LatentAttention
    ) -> "ValueEmbedding":
        assert isinstance(attention, GroupedQueryAttention)  # the model's config checks it
        return ValueEmbedding(self, vocab_size, attention.num_kv_heads, attention.size(dim))


ValueEmbeddings = NoValueEmbeddings | GatedValueEmbeddings


class ValueEmbedding(nn.Module):
    """v_g += gate_scale * sigmoid(W_gate x[:gate_channels])_g * table[token]_g per head g."""

    decays = False

    def __init__(
        self, config: GatedValueEmbeddings, vocab_size: int, num_kv_heads: int, head_dim: int
    ) -> None:
        super().__init__()
        self.config = config
        self.table = nn.Embedding(vocab_size, num_kv_heads * head_dim)
        self.gate = nn.Linear(config.gate_channels, num_kv_heads, bias=False)

    def forward(self, kv: KeyValues, x: Hidden, tokens: TokenIds) -> KeyValues:
        """Keys and values of grouped-query attention [batch, seq, kv_width], with the addition."""
        key, value = kv.chunk(2, dim=-1)
        gate = self.config.gate_scale * self.gate(x[..., : self.config.gate_channels]).sigmoid()
        rows: Tensor = self.table(tokens).unflatten(-1, (gate.shape[-1], -1))
        added = (gate[..., None] * rows).flatten(-2)
        return torch.cat((key, value + added.to(value.dtype)), dim=-1)
