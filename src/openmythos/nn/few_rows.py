"""A layer of a decoded token as one native call (`kernels.few_rows`), where that is possible.

It takes the place of a layer's modules at inference on a CPU, for one new token per row in a cache.
Whatever else changes what a layer computes - hooks, adapters, autocast, a compiled layer, halted
positions - leaves it to the modules. The weights are the modules' own tensors; a change of them in
place is seen, and one that moves them makes the native layer anew.
"""

import contextlib
import logging
import threading
from collections.abc import Iterator, Mapping
from typing import cast
from weakref import WeakKeyDictionary

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from openmythos.kernels import few_rows_native
from openmythos.kernels.few_rows import (
    Activation,
    Delta,
    DenseWeights,
    ExpertsWeights,
    GroupedWeights,
    LatentWeights,
    LayerWeights,
    Norm,
    Places,
)
from openmythos.kernels.few_rows_native import NativeLayer, PreparedLayer
from openmythos.nn.block import Block, Layers
from openmythos.nn.feed_forward import GatedLayer, PlainLayer, gelu, relu2
from openmythos.nn.grouped_query import GroupedQueryAttentionLayer
from openmythos.nn.latent_attention import LatentAttentionLayer
from openmythos.nn.layout import AttentionContext
from openmythos.nn.linear import Deltas, Linear
from openmythos.nn.moe import Experts, MoELayer, Router
from openmythos.nn.norm import RMSNorm
from openmythos.nn.pages import Paged
from openmythos.nn.view import Cached, CachedRows, Halting, LayerView

LOGGER = logging.getLogger(__name__)
_ACTIVATIONS: dict[object, Activation] = {F.silu: "silu", gelu: "gelu", relu2: "relu2"}


class UnsupportedError(Exception):
    """The native form does not cover a layer; the message says what."""


def decode(block: Block, x: Tensor, view: LayerView) -> Tensor | None:
    """The layer's output for one new token per row, x [rows, 1, dim]; None: run the modules."""
    halting = view.kv if isinstance(view.kv, Halting) else None
    if halting is not None and (halting.active is not None or halting.columns is not None):
        return None
    kv = view.kv if halting is None else halting.inner
    if view.active is not None or view.collects:
        return None
    if type(kv) is Paged:
        places = _paged(kv, view.context)
    elif type(kv) is Cached and kv.seq == 1:
        places = _cached(kv, view.context)
    elif type(kv) is CachedRows:
        places = _cached_rows(kv, view.context)
    else:
        return None
    if not few_rows_native.accepts(x, places.kv):
        return None
    if view.loop is not None:
        places.loop = int(view.loop) if len(view.loop) == 1 else view.loop
    layer = native_layer(block)
    if layer is None:
        return None
    out = layer.run(x[:, 0], places, view.deltas)
    if halting is not None and kv.writes is not False:
        halting.kv = kv.own()
    return out[:, None]


def _cached(kv: Cached, context: AttentionContext) -> Places:
    return Places(
        kv=kv.storage[None],
        column=kv.start,
        writes=kv.writes,
        mask=None if context.mask is None else context.mask.view(-1, kv.start + 1),
        cos=_table(context.cos),
        sin=_table(context.sin),
    )


def _cached_rows(kv: CachedRows, context: AttentionContext) -> Places:
    return Places(
        kv=kv.storage[None] if kv.slot is None else kv.storage,
        column=kv.column,
        slot=kv.slot,
        writes=True if kv.writes is None else kv.writes,
        mask=None if context.mask is None else context.mask.view(-1, kv.total),
        cos=_table(context.cos),
        sin=_table(context.sin),
    )


def _paged(kv: Paged, context: AttentionContext) -> Places:
    first = None
    if context.window:
        first = (kv.position - context.window + 1).clamp_min(0)
    return Places(
        kv=kv.pool.storage,
        column=kv.position,
        pages=kv.pages,
        first=first,
        writes=True if kv.writes is None else kv.writes,
        cos=_table(context.cos),
        sin=_table(context.sin),
    )


def _table(x: Tensor | None) -> Tensor | None:
    """A rotary table as [rows or 1, rotary_dim]."""
    return None if x is None else x.view(-1, x.shape[-1])


Layers.decode = staticmethod(decode)


class DecodedLayer:
    """A block's native layer, with what shows that the block has changed since it was made."""

    def __init__(self, block: Block) -> None:
        self.reason, self._native, self._keys = "", None, {}
        modules = list(block.modules())
        # These grow with hooks, adapters, a forward pass set from outside, `compile`.
        self._dicts = [
            each
            for m in modules
            for each in (m.__dict__, m._modules, m._forward_hooks, m._forward_pre_hooks)
        ]
        self._size = sum(map(len, self._dicts))
        held = [
            (where, name, one)
            for m in modules
            for where in (m._modules, m._parameters, m._buffers)
            for name, one in where.items()
            if one is not None
        ]
        self._where, self._names, self._held = zip(*held, strict=True)
        self._ids = [*map(id, self._held)]
        self._tensors = [one for one in self._held if isinstance(one, Tensor)]
        self._memory = [x.data_ptr() for x in self._tensors]
        self._dtypes = [x.dtype for x in self._tensors]
        try:
            for m in modules:
                _check_plain(m)
            weights = layer_weights(block)
            self._keys = _delta_keys(block)
        except UnsupportedError as error:
            self.reason = str(error)
            return
        self.reason = few_rows_native.unsupported(weights)
        if not self.reason:
            self._native = NativeLayer(weights)

    def is_fresh(self) -> bool:
        """Whether the block still has the modules and tensors that it had."""
        return (
            sum(map(len, self._dicts)) == self._size
            and [*map(id, map(dict.get, self._where, self._names))] == self._ids
            and [x.data_ptr() for x in self._tensors] == self._memory
            and [x.dtype for x in self._tensors] == self._dtypes
        )

    @property
    def supported(self) -> bool:
        return self._native is not None

    def run(self, x: Tensor, places: Places, deltas: Deltas) -> Tensor:
        """x [rows, dim] -> [rows, dim]; see `kernels.few_rows`. `deltas` by `delta_key`."""
        assert self._native is not None
        return self._native(x, places, self._named(deltas, len(x)))

    def prepared(self, out: Tensor, places: Places, deltas: Deltas) -> PreparedLayer:
        """Calls that write to out [rows, dim], for as long as the layer is fresh."""
        assert self._native is not None
        return self._native.prepared(out, places, self._named(deltas, len(out)))

    def _named(self, deltas: Deltas, rows: int) -> dict[str, Delta]:
        if not deltas:
            return {}
        return {
            name: Delta(
                delta.down.contiguous(),
                delta.up.contiguous(),
                None if delta.which is None else delta.which.expand(rows).contiguous(),
            )
            for name, key in self._keys.items()
            if (delta := deltas.get(key)) is not None
        }


class _Checked(threading.local):
    """The layers that have been checked for changes in a block of `unchanged`; None outside."""

    layers: dict[Block, DecodedLayer] | None = None


_CHECKED = _Checked()


@contextlib.contextmanager
def unchanged() -> Iterator[None]:
    """Look for changes of a layer only once, for a caller that changes nothing meanwhile."""
    before, _CHECKED.layers = _CHECKED.layers, {}
    try:
        yield
    finally:
        _CHECKED.layers = before


Layers.unchanged = staticmethod(unchanged)

_LAYERS: WeakKeyDictionary[Block, DecodedLayer] = WeakKeyDictionary()
_REASONS: set[str] = set()


def native_layer(block: Block) -> DecodedLayer | None:
    """The native form of a block as it is now; None, after one log line, if there is none."""
    checked = _CHECKED.layers
    if checked is not None and block in checked:
        return checked[block]
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return None
    layer = _LAYERS.get(block)
    if layer is None or not layer.is_fresh():
        layer = _LAYERS[block] = DecodedLayer(block)
        if layer.reason and layer.reason not in _REASONS:
            _REASONS.add(layer.reason)
            LOGGER.info("a layer is decoded by torch, not by the native kernel: %s", layer.reason)
    if not layer.supported:
        return None
    if checked is not None:
        checked[block] = layer
    return layer


# Weights of a block


def layer_weights(block: Block) -> LayerWeights:
    """The tensors of a block as the kernel takes them; an UnsupportedError names what it cannot."""
    names = [f"{f}_{place}" for f in _BRANCHES for place in ("norm", "branch_norm", "sum_norm")]
    norms = {name: _norm(getattr(block, name)) for name in names}
    feed_forward = block.feed_forward
    return LayerWeights(
        attention=_attention(block.attention),
        feed_forward=_experts(feed_forward)
        if isinstance(feed_forward, MoELayer)
        else _dense(feed_forward),
        **norms,
    )


_BRANCHES = ("attention", "feed_forward")
_KNOWN = (
    Block,
    LatentAttentionLayer,
    GroupedQueryAttentionLayer,
    GatedLayer,
    PlainLayer,
    MoELayer,
    Experts,
    Router,
    Linear,
    RMSNorm,
    nn.Identity,
)


def _check_plain(module: nn.Module) -> None:
    """Raise UnsupportedError if a module computes what its class does not say."""
    if type(module) not in _KNOWN:
        raise UnsupportedError(f"it has a {type(module).__name__}")
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        raise UnsupportedError(f"a {type(module).__name__} has hooks")
    if module._compiled_call_impl is not None:
        raise UnsupportedError("it is compiled")


def _norm(module: nn.Module | None) -> Norm | None:
    return Norm(module.weight, module.eps) if isinstance(module, RMSNorm) else None


def _attention(layer: nn.Module) -> LatentWeights | GroupedWeights:
    if isinstance(layer, LatentAttentionLayer):
        return _latent(layer)
    if not isinstance(layer, GroupedQueryAttentionLayer):
        raise UnsupportedError(f"its attention is a {type(layer).__name__}")
    c = layer.config
    return GroupedWeights(
        heads=c.num_heads,
        kv_heads=c.num_kv_heads,
        query=layer.query.weight,
        key=layer.key.weight,
        value=layer.value.weight,
        output=layer.output.weight,
        query_norm=_norm(layer.query_norm),
        key_norm=_norm(layer.key_norm),
        norm_by_width=c.qk_norm_kind == "width",
        query_bias=layer.query_bias if c.qk_bias else None,
        key_bias=layer.key_bias if c.qk_bias else None,
    )


def _latent(layer: LatentAttentionLayer) -> LatentWeights:
    c, small = layer.config, layer.config.q_latent_dim > 0
    return LatentWeights(
        heads=c.num_heads,
        nope_dim=c.nope_head_dim,
        value_dim=c.value_head_dim,
        query=layer.query_up.weight if small else layer.query.weight,
        kv_down=layer.kv_down.weight,
        kv_up=layer.kv_up.weight,
        output=layer.output.weight,
        kv_latent_norm=cast("Norm", _norm(layer.kv_latent_norm)),
        query_down=layer.query_down.weight if small else None,
        query_latent_norm=_norm(layer.query_latent_norm) if small else None,
        query_norm=_norm(layer.query_norm),
        key_norm=_norm(layer.key_norm),
    )


def _dense(layer: nn.Module) -> DenseWeights:
    if not isinstance(layer, GatedLayer | PlainLayer):
        raise UnsupportedError(f"its feed-forward is a {type(layer).__name__}")
    activation, gated = _ACTIVATIONS.get(layer.activation), isinstance(layer, GatedLayer)
    if activation is None:
        raise UnsupportedError(f"its activation is {layer.activation}")
    up = layer.gate_up if isinstance(layer, GatedLayer) else layer.up
    return DenseWeights(up=up.weight, down=layer.down.weight, activation=activation, gated=gated)


def _experts(layer: MoELayer) -> ExpertsWeights:
    if layer.dispatcher is not None:
        raise UnsupportedError("its experts are spread over ranks")
    c = layer.config
    return ExpertsWeights(
        router=layer.router.weight,
        router_bias=layer.router.router_bias,
        gate_up=layer.experts.gate_up,
        down=layer.experts.down,
        top_k=c.top_k,
        softmax=c.score == "softmax",
        normalize=c.normalize_top_k,
        route_scale=c.route_scale,
        shared=None if layer.shared_expert is None else _dense(layer.shared_expert),
    )


def _delta_keys(block: Block) -> dict[str, str]:
    """The `delta_key` of every map that has one, by its name in the kernel."""
    return {name: one.delta_key for name, one in _maps(block) if one.delta_key}


def _maps(block: Block) -> Iterator[tuple[str, Linear]]:
    names: Mapping[str, str] = {"query_up": "query", "gate_up": "up"}
    for name, module in block.named_modules():
        if isinstance(module, Linear):
            last = name.rpartition(".")[2]
            yield names.get(last, last), module
