"""The interface of attention layers."""

from abc import ABC, abstractmethod
from typing import Literal

from torch import nn

from openmythos.nn.layout import AttentionContext
from openmythos.nn.linear import NO_DELTAS, Deltas
from openmythos.types import Hidden, KeyValues

Position = Literal["rope", "none"]


class AttentionLayer(nn.Module, ABC):
    """Two maps: `project_kv` makes what a cache stores, `forward` lets queries attend to it.

    The caller decides which keys and values the layer sees: those of its own input, of a cache, or
    of an earlier loop. So `forward` must read other positions only through `kv`, and `project_kv`
    must not mix positions.

    `context` has the rotary tables of the queries, for `kernels.rope.rotate`, and computes softmax
    attention under the mask of this call (`context.attend`). `deltas` change the linear maps in
    this loop: pass them to every `nn.linear.Linear`.

    The layer's config states `kv_width(dim)`, `build(dim, norm_eps)` and what
    `nn.layout.AttentionPositions` has.
    """

    residual_outputs: tuple[str, ...] = ("output.weight",)
    kv_width: int  # numbers that a cache stores per token

    @abstractmethod
    def project_kv(
        self, x: Hidden, context: AttentionContext, deltas: Deltas = NO_DELTAS
    ) -> KeyValues:
        """Keys and values of x, [batch, seq, kv_width], in the layout of the cache."""

    @abstractmethod
    def forward(
        self, x: Hidden, kv: KeyValues, context: AttentionContext, deltas: Deltas = NO_DELTAS
    ) -> Hidden:
        """The output [batch, seq, dim] for queries from x, on kv [batch, total, kv_width]."""
