"""One transformer layer for a few rows, each one token: x [rows, dim] -> x [rows, dim].

`reference` is the formula in plain torch; `few_rows_native.NativeLayer` is the fast form, one call
into C++. Keys and values are written to the cache in place. Rows may be at different positions of
the cache, in different slots (loops), and each may have its own low-rank deltas.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from openmythos.kernels import attention, experts, norm, rope
from openmythos.kernels.experts import ExpertWeights

Activation = Literal["silu", "gelu", "relu2"]


class Norm(NamedTuple):
    """RMSNorm; see `kernels.norm`."""

    weight: Tensor | None  # None: no weight
    eps: float


class Delta(NamedTuple):
    """A low-rank change of a map: W + up @ down, or one per row with a first dimension [rows].

    With `which` [rows] a row's change is that one of the first dimension. Adjacent rows of the
    same change are computed together.
    """

    down: Tensor  # [rank, in]
    up: Tensor  # [out, rank]
    which: Tensor | None = None


# By the name of the map: "query_down", "query", "key", "value", "kv_down", "kv_up", "output",
# "router", "up", "down".
Deltas = Mapping[str, Delta]


@dataclass(frozen=True, kw_only=True)
class LatentWeights:
    """Multi-head latent attention; see `nn.latent_attention`."""

    heads: int
    nope_dim: int
    value_dim: int
    query: Tensor  # [heads * (nope_dim + rope_dim), dim, or the width of query_down]
    kv_down: Tensor  # [latent_dim + rope_dim, dim]
    kv_up: Tensor  # [heads * (nope_dim + value_dim), latent_dim]
    output: Tensor  # [dim, heads * value_dim]
    kv_latent_norm: Norm
    query_down: Tensor | None = None
    query_latent_norm: Norm | None = None
    query_norm: Norm | None = None
    key_norm: Norm | None = None

    @property
    def latent_dim(self) -> int:
        return self.kv_up.shape[1]

    @property
    def rope_dim(self) -> int:
        return self.kv_width - self.latent_dim

    @property
    def kv_width(self) -> int:
        return self.kv_down.shape[0]


@dataclass(frozen=True, kw_only=True)
class GroupedWeights:
    """Grouped-query attention; see `nn.grouped_query`."""

    heads: int
    kv_heads: int
    query: Tensor  # [heads * head_dim, dim]
    key: Tensor  # [kv_heads * head_dim, dim]
    value: Tensor
    output: Tensor  # [dim, heads * head_dim]
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    norm_by_width: bool = False  # all heads as one vector
    query_bias: Tensor | None = None
    key_bias: Tensor | None = None

    @property
    def head_dim(self) -> int:
        return self.key.shape[0] // self.kv_heads

    @property
    def kv_width(self) -> int:
        return 2 * self.key.shape[0]


@dataclass(frozen=True, kw_only=True)
class DenseWeights:
    """W_down activation(W_up x), or gated: W_down (activation(g) * u) with [g | u] = W_up x."""

    up: Tensor
    down: Tensor
    activation: Activation
    gated: bool


@dataclass(frozen=True, kw_only=True)
class ExpertsWeights:
    """Routed experts and shared ones; see `nn.moe`."""

    router: Tensor  # [num_experts, dim]
    router_bias: Tensor  # [num_experts], or [loops, num_experts]: the last row also beyond
    gate_up: Tensor  # [num_experts, 2 * expert_dim, dim]
    down: Tensor  # [num_experts, dim, expert_dim]
    top_k: int
    softmax: bool  # scores are a softmax of the logits, else sigmoids
    normalize: bool
    route_scale: float
    shared: DenseWeights | None


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """The weights of one layer: x = n(x + m(f(n x))) for both branches f; a norm may be None."""

    attention: LatentWeights | GroupedWeights
    feed_forward: DenseWeights | ExpertsWeights
    attention_norm: Norm | None
    attention_branch_norm: Norm | None
    attention_sum_norm: Norm | None
    feed_forward_norm: Norm | None
    feed_forward_branch_norm: Norm | None
    feed_forward_sum_norm: Norm | None


@dataclass(kw_only=True, slots=True)  # a frozen one takes longer to make than the call around it
class Places:
    """Where the tokens of all rows are, and what they see: columns `first` to `column`.

    Row r reads and writes kv[slot[r], line[r]]; without them that is kv[0, r]. With `pages`
    [lines, blocks] kv is [pages, columns of a page, kv_width], and a row's columns are those of the
    pages of its line, by default r, one page after the other. Rows in which `writes` is False see
    the keys and values that are in their column already.
    """

    kv: Tensor  # [slots, lines, columns, kv_width]
    column: Tensor | int  # [rows]
    slot: Tensor | None = None
    line: Tensor | None = None
    pages: Tensor | None = None
    first: Tensor | None = None
    writes: Tensor | bool = True
    mask: Tensor | None = None  # [rows or 1, column + 1 or more], False: hidden
    cos: Tensor | None = None  # [rows or 1, rotary_dim]; see `nn.layout.rope_tables`
    sin: Tensor | None = None
    loop: Tensor | int = 0  # [rows] or of all rows, from 0; it says which router bias is added


def reference(x: Tensor, layer: LayerWeights, places: Places, deltas: Deltas) -> Tensor:
    """The formula."""
    attended = _Attention(layer.attention, places, deltas, len(x))
    update = attended(_normed(layer.attention_norm, x[:, None]))[:, 0]
    x = x + _normed(layer.attention_branch_norm, update)
    x = _normed(layer.attention_sum_norm, x)
    normed = _normed(layer.feed_forward_norm, x)
    update = _feed_forward(layer.feed_forward, normed, deltas, places.loop)
    x = x + _normed(layer.feed_forward_branch_norm, update)
    return _normed(layer.feed_forward_sum_norm, x)


def _normed(part: Norm | None, x: Tensor) -> Tensor:
    if part is None:
        return x
    weight = x.new_ones(x.shape[-1]) if part.weight is None else part.weight
    return norm.reference(x, weight, part.eps)


def _linear(x: Tensor, weight: Tensor, delta: Delta | None) -> Tensor:
    """x [rows, n, in] -> [rows, n, out]."""
    y = F.linear(x, weight)
    if delta is None:
        return y
    down, up = delta.down, delta.up
    if delta.which is not None:
        down, up = down[delta.which], up[delta.which]
    return y + x @ down.mT @ up.mT


def _heads(x: Tensor, heads: int) -> Tensor:
    """x [rows, n, heads * size] -> [rows, heads, n, size]."""
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)


class _Attention:
    """Attention of one call, on tokens [rows, 1, dim]."""

    def __init__(
        self,
        weights: LatentWeights | GroupedWeights,
        places: Places,
        deltas: Deltas,
        rows: int,
    ) -> None:
        self.weights, self.places, self.deltas = weights, places, deltas
        kv = places.kv
        here = torch.arange(rows, device=kv.device)
        self.column = torch.zeros_like(here) + places.column
        first = torch.zeros_like(here) if places.first is None else places.first
        index = torch.arange(int(self.column.max()) + 1, device=kv.device)
        self.seen = (index >= first[:, None]) & (index <= self.column[:, None])
        if places.mask is not None:
            self.seen = self.seen & places.mask[:, : len(index)]
        # Where all columns of a row are: a page and a column of it, or a slot, a line and a column.
        self.where: tuple[Tensor, ...]
        line = here if places.line is None else places.line
        if places.pages is not None:
            page, column = index // kv.shape[1], index % kv.shape[1]
            self.where = (places.pages[line][:, page], column.expand(rows, -1))
        else:
            slot = torch.zeros_like(here) if places.slot is None else places.slot
            wide = (rows, len(index))
            self.where = (
                slot[:, None].expand(wide),
                line[:, None].expand(wide),
                index.expand(wide),
            )

    def __call__(self, x: Tensor) -> Tensor:
        w = self.weights
        heads = self._latent(w, x) if isinstance(w, LatentWeights) else self._grouped(w, x)
        return _linear(heads.transpose(1, 2).flatten(2), w.output, self.deltas.get("output"))

    def _rotated(self, x: Tensor) -> Tensor:
        """x [rows, heads, 1, width], whose first rotary_dim features are rotated."""
        cos, sin = self.places.cos, self.places.sin
        if cos is None or sin is None:
            return x
        dim = cos.shape[-1]
        cos, sin = (t[:, None, None].to(x.dtype) for t in (cos, sin))
        return torch.cat((rope.reference(x[..., :dim], cos, sin), x[..., dim:]), dim=-1)

    def _cached(self, new: Tensor) -> Tensor:
        """Write new [rows, kv_width]; keys and values [rows, 1, columns, kv_width]."""
        kv, own = self.places.kv, self.column[:, None]
        where = tuple(index.gather(1, own)[:, 0] for index in self.where)
        writes = torch.as_tensor(self.places.writes, device=kv.device).view(-1, 1)
        kv[where] = torch.where(writes, new.to(kv.dtype), kv[where])
        return kv[self.where][:, None].to(new.dtype)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask, scale = self.seen[:, None, None], query.shape[-1] ** -0.5
        return attention.reference(query, key, value, mask=mask, is_causal=False, scale=scale)

    def _latent(self, w: LatentWeights, x: Tensor) -> Tensor:
        deltas, split = self.deltas, w.latent_dim
        down = _linear(x, w.kv_down, deltas.get("kv_down"))
        key = self._rotated(_normed(w.key_norm, down[:, None, :, split:]))[:, 0]
        latent = _normed(w.kv_latent_norm, down[..., :split])
        kv = self._cached(torch.cat((latent, key), dim=-1)[:, 0])
        if w.query_down is not None:
            x = _linear(x, w.query_down, deltas.get("query_down"))
            x = _normed(w.query_latent_norm, x)
        query = _heads(_linear(x, w.query, deltas.get("query")), w.heads)
        query = _normed(w.query_norm, query)
        nope, rotary = query[..., : w.nope_dim], query[..., w.nope_dim :]
        query = torch.cat((nope, self._rotated(rotary)), dim=-1)
        expanded = _heads(_linear(kv[:, 0, :, :split], w.kv_up, deltas.get("kv_up")), w.heads)
        shared = kv[..., split:].expand(-1, w.heads, -1, -1)
        keys = torch.cat((expanded[..., : w.nope_dim], shared), dim=-1)
        return self._attend(query, keys, expanded[..., w.nope_dim :])

    def _grouped(self, w: GroupedWeights, x: Tensor) -> Tensor:
        query = self._turned(x, w.query, "query", w.query_norm, w.query_bias)
        key = self._turned(x, w.key, "key", w.key_norm, w.key_bias)
        value = _linear(x, w.value, self.deltas.get("value"))
        kv = self._cached(torch.cat((key.flatten(1), value[:, 0]), dim=-1))
        keys, values = _heads(kv[:, 0], 2 * w.kv_heads).chunk(2, dim=1)
        return self._attend(query, keys, values)

    def _turned(
        self, x: Tensor, weight: Tensor, name: str, part: Norm | None, bias: Tensor | None
    ) -> Tensor:
        """Queries or keys [rows, heads, 1, head_dim]."""
        assert isinstance(self.weights, GroupedWeights)
        x, size = _linear(x, weight, self.deltas.get(name)), self.weights.head_dim
        if self.weights.norm_by_width:
            x = _normed(part, x)
        x = _heads(x, x.shape[-1] // size)
        if not self.weights.norm_by_width:
            x = _normed(part, x)
        return self._rotated(x if bias is None else x + bias.view(-1, 1, size).to(x.dtype))


def _feed_forward(
    w: DenseWeights | ExpertsWeights, x: Tensor, deltas: Deltas, loop: Tensor | int
) -> Tensor:
    if isinstance(w, DenseWeights):
        return _dense(w, x, deltas)
    logits = _linear(x[:, None], w.router, deltas.get("router"))[:, 0]
    scores = logits.softmax(dim=-1) if w.softmax else logits.sigmoid()
    bias = w.router_bias.view(-1, scores.shape[-1])
    bias = bias[torch.as_tensor(loop, device=bias.device).clamp_max(len(bias) - 1)]
    chosen = (scores + bias.to(scores.dtype)).topk(w.top_k, dim=-1).indices
    weights = scores.gather(1, chosen)
    if w.normalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    stacks = ExpertWeights(w.gate_up, w.down)
    out = experts.reference(x, weights * w.route_scale, chosen, stacks)
    return out if w.shared is None else out + _dense(w.shared, x, deltas)


def _dense(w: DenseWeights, x: Tensor, deltas: Deltas) -> Tensor:
    hidden, up = _linear(x[:, None], w.up, deltas.get("up")), None
    if w.gated:
        hidden, up = hidden.chunk(2, dim=-1)
    if w.activation == "silu":
        hidden = F.silu(hidden)
    elif w.activation == "gelu":
        hidden = F.gelu(hidden, approximate="tanh")
    else:
        hidden = F.relu(hidden).square()
    return _linear(hidden if up is None else hidden * up, w.down, deltas.get("down"))[:, 0]
