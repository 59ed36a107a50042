"""One transformer layer."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, Literal, cast

from torch import Tensor, nn

from openmythos.nn.feed_forward import GELU, FeedForwardLayer, GeGLU, ReLU2, RouterStats, SwiGLU
from openmythos.nn.grouped_query import GroupedQueryAttention
from openmythos.nn.latent_attention import LatentAttention
from openmythos.nn.moe import MoE
from openmythos.nn.norm import RMSNorm
from openmythos.nn.view import LayerView
from openmythos.types import Hidden

Attention = LatentAttention | GroupedQueryAttention
FeedForward = SwiGLU | GeGLU | ReLU2 | GELU | MoE


# Where a norm is applied around a branch f: to its input, its output, or the residual sum.
NormPlace = Literal["input", "branch", "sum"]


class Block(nn.Module):
    """x = x + attention(norm(x));  x = x + feed_forward(norm(x)).

    `norms` says where norms stand around each branch f:

    input           x + f(n x)          pre-norm, the default
    input, branch   x + m(f(n x))       Ouro, Gemma 2
    input, sum      m(x + f(n x))       Huginn
    branch          x + n(f(x))         OLMo 2
    sum             n(x + f(x))         post-norm
    """

    def __init__(
        self,
        dim: int,
        attention: Attention,
        feed_forward: FeedForward,
        norm_eps: float,
        norms: tuple[NormPlace, ...] = ("input",),
    ) -> None:
        super().__init__()

        def norm(place: NormPlace) -> nn.Module:
            return RMSNorm(dim, norm_eps) if place in norms else nn.Identity()

        self.attention_norm = norm("input")
        self.attention = attention.build(dim, norm_eps)
        self.attention_branch_norm = norm("branch")
        self.attention_sum_norm = norm("sum")
        self.feed_forward_norm = norm("input")
        self.feed_forward: FeedForwardLayer = feed_forward.build(dim)
        self.feed_forward_branch_norm = norm("branch")
        self.feed_forward_sum_norm = norm("sum")

    def forward(self, x: Hidden, view: LayerView) -> tuple[Tensor, RouterStats | None]:
        """(x [batch, seq, dim], router statistics if the view collects them)."""
        normed, context = self.attention_norm(x), view.context
        project = self.attention.project_kv
        kv = view.kv.update(lambda: project(normed, view.context, view.deltas))
        if view.last_only:
            x, context = x[:, -1:], context.last()
            normed = normed[:, -1:]
        update = self.attention(normed, kv, context, view.deltas)
        x = self.attention_sum_norm(x + self.attention_branch_norm(update))
        update, router = self.feed_forward(self.feed_forward_norm(x), view)
        return self.feed_forward_sum_norm(x + self.feed_forward_branch_norm(update)), router


LayerStats = list[RouterStats | None]


class Layers(nn.ModuleList):
    """Several layers, one after the other, each with its own view.

    `decode(layer, x, view)`, set by `nn.few_rows`, computes a layer for one new token per row at
    once; it returns None where it cannot. In a block of `with Layers.unchanged()` it looks for
    changes of a layer only once.
    """

    decode: ClassVar[Callable[[Block, Hidden, LayerView], Hidden | None] | None] = None
    unchanged: ClassVar[Callable[[], AbstractContextManager[None]]] = nullcontext

    def forward(self, x: Hidden, views: Sequence[LayerView]) -> tuple[Hidden, LayerStats]:
        stats: LayerStats = []
        decode = type(self).decode
        for layer, view in zip(self, views, strict=True):
            decoded = None if decode is None else decode(cast("Block", layer), x, view)
            x, router = layer(x, view) if decoded is None else (decoded, None)
            stats.append(router)
        return x, stats
