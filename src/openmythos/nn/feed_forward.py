"""Feed-forward layers: their interface, and the dense ones."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openmythos.config import MAX_WIDTH, require_int
from openmythos.kernels.experts import ExpertWeights
from openmythos.kernels.gated import gated_linear
from openmythos.nn.linear import Linear, per_row
from openmythos.nn.view import LayerView
from openmythos.types import Hidden

Activation = Callable[[Tensor], Tensor]


class RouterStats(NamedTuple):
    """Router statistics, summed over the routed tokens of one or more calls; `plus` adds two."""

    counts: Tensor  # [num_experts] tokens sent to each expert; [loops, num_experts] by loop
    balance: Tensor  # sum over sequences of sum_i f_i P_i (1 = perfect balance)
    z: Tensor  # sum over tokens of logsumexp(router logits)^2
    sequences: Tensor  # number of summed sequences
    tokens: Tensor  # number of summed tokens

    def plus(self, other: "RouterStats | None") -> "RouterStats":
        if other is None:
            return self
        return RouterStats(*(a + b for a, b in zip(self, other, strict=True)))

    def max_violation(self) -> Tensor:
        """MaxVio = (largest load - mean load) / mean load (arXiv 2408.15664), over all loops."""
        load = self.counts.view(-1, self.counts.shape[-1]).sum(dim=0)
        return (load.max() - load.mean()) / load.mean()


class FeedForwardLayer(nn.Module, ABC):
    """A position-wise map. Inside the recurrent block, a layer runs once per loop.

    `forward(x, view)` returns the update [batch, seq, dim] that the block adds to its residual
    stream, and router statistics or None. Of `view` it reads:

    - `deltas`: pass them to every `nn.linear.Linear`; they change the maps in this loop;
    - `active` [batch, seq], or None: positions with False are not computed, and their update is 0.
      `only_active` does this for any dense layer;
    - `collects`: return router statistics, if the layer has a router;
    - `expert_weights`: what `shared_weights` returned before the loops, or None;
    - `loop`: index of the loop as a tensor, for a layer with `asks_loop`.

    `forward` changes no state, so that it may be repeated under activation checkpointing.
    """

    asks_loop = False

    @abstractmethod
    def forward(self, x: Hidden, view: LayerView) -> tuple[Hidden, RouterStats | None]: ...

    def shared_weights(self) -> ExpertWeights | None:
        """Expert weights prepared once for all loops, for `view.expert_weights`; None if dense."""
        return None

    def router_loss(self, balance: Tensor, z: Tensor) -> Tensor:
        """The router's auxiliary loss, from the means of `balance` and `z`; 0 if dense."""
        return torch.zeros_like(balance)

    def update_router_bias(self, counts: Tensor, scale: float = 1.0) -> None:
        """Balance the load after a training step, by `RouterStats.counts`; no effect if dense.

        `scale`: the learning rate of this step / its highest value.
        """


def only_active(
    layer: FeedForwardLayer, x: Hidden, view: LayerView
) -> tuple[Hidden, RouterStats | None]:
    """Run a dense layer only at the active positions of the view; elsewhere the update is 0."""
    assert view.active is not None
    everywhere = replace(view, active=None)
    if per_row(view.deltas):  # packing would mix positions of different rows
        out = layer.forward(x, everywhere)[0]
        return torch.where(view.active[..., None], out, 0), None
    places = view.active.flatten().nonzero()[:, 0]
    packed = x.flatten(0, 1).index_select(0, places)
    out = layer.forward(packed[None], everywhere)[0][0]
    return at_places(out, places, x.shape), None


def at_places(rows: Tensor, places: Tensor, shape: torch.Size) -> Hidden:
    """Zeros of `shape` [batch, seq, ...] with `rows` at `places`, indices into batch * seq."""
    return rows.new_zeros(shape).flatten(0, 1).index_copy(0, places, rows).view(shape)


@dataclass(frozen=True, kw_only=True)
class _Dense:
    """The common config of dense layers."""

    hidden_dim: int = 704

    def __post_init__(self) -> None:
        require_int("hidden_dim", self.hidden_dim, minimum=1, maximum=MAX_WIDTH)

    def kept_numbers(self, dim: int, *, cast: bool) -> tuple[int, int]:
        """Activations per token saved for the backward pass: (in autocast's dtype, in fp32)."""
        return 2 * self.hidden_dim, 0


@dataclass(frozen=True, kw_only=True)
class SwiGLU(_Dense):
    """W_down (silu(W_gate x) * W_up x), Shazeer 2020."""

    kind: Literal["swiglu"] = "swiglu"

    def build(self, dim: int) -> "GatedLayer":
        return GatedLayer(dim, self.hidden_dim, F.silu)


@dataclass(frozen=True, kw_only=True)
class GeGLU(_Dense):
    """W_down (gelu(W_gate x) * W_up x), Shazeer 2020; gelu by its tanh approximation (Gemma)."""

    kind: Literal["geglu"] = "geglu"

    def build(self, dim: int) -> "GatedLayer":
        return GatedLayer(dim, self.hidden_dim, gelu)


@dataclass(frozen=True, kw_only=True)
class ReLU2(_Dense):
    """W_down relu(W_up x)^2, So et al. 2021 (Primer)."""

    kind: Literal["relu2"] = "relu2"
    hidden_dim: int = 1024

    def build(self, dim: int) -> "PlainLayer":
        return PlainLayer(dim, self.hidden_dim, relu2)


@dataclass(frozen=True, kw_only=True)
class GELU(_Dense):
    """W_down gelu(W_up x), by the tanh approximation of gelu (Hendrycks & Gimpel 2016)."""

    kind: Literal["gelu"] = "gelu"
    hidden_dim: int = 1024

    def build(self, dim: int) -> "PlainLayer":
        return PlainLayer(dim, self.hidden_dim, gelu)


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


class GatedLayer(FeedForwardLayer):
    """y = W_down (activation(g) * u) with [g | u] = W_gate_up x."""

    residual_outputs = ("down.weight",)

    def __init__(self, dim: int, hidden_dim: int, activation: Activation) -> None:
        super().__init__()
        self.gate_up = Linear(dim, 2 * hidden_dim, bias=False)
        self.down = Linear(hidden_dim, dim, bias=False)
        self.activation = activation

    def forward(self, x: Hidden, view: LayerView) -> tuple[Hidden, RouterStats | None]:
        if view.active is not None:
            return only_active(self, x, view)
        gated = self.gate_up(x, view.deltas)
        # Of a map that something wraps, such as peft, the weight is not all.
        plain = isinstance(self.down, Linear) and self.down.delta_key not in view.deltas
        if self.activation is not F.silu or not plain:
            gate, up = gated.chunk(2, dim=-1)
            return self.down(self.activation(gate) * up, view.deltas), None
        return gated_linear(gated, self.down.weight), None


class PlainLayer(FeedForwardLayer):
    """y = W_down activation(W_up x)."""

    residual_outputs = ("down.weight",)

    def __init__(self, dim: int, hidden_dim: int, activation: Activation) -> None:
        super().__init__()
        self.up = Linear(dim, hidden_dim, bias=False)
        self.down = Linear(hidden_dim, dim, bias=False)
        self.activation = activation

    def forward(self, x: Hidden, view: LayerView) -> tuple[Hidden, RouterStats | None]:
        if view.active is not None:
            return only_active(self, x, view)
        return self.down(self.activation(self.up(x, view.deltas)), view.deltas), None
