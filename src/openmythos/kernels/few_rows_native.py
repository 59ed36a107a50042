"""The fast form of `kernels.few_rows`: its C++ library, called with pointers to the tensors.

Nothing is copied, so weights that change in place are seen. Arithmetic is fp32 whatever the dtype
of weights, cache and input: fp32 or bf16.
"""

import ctypes
import functools
from collections.abc import Iterator
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from openmythos import kernels
from openmythos.kernels import native
from openmythos.kernels.few_rows import (
    Deltas,
    DenseWeights,
    ExpertsWeights,
    GroupedWeights,
    LatentWeights,
    LayerWeights,
    Norm,
    Places,
)
from openmythos.machine import use_huge_pages

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_ACTIVATIONS = {"silu": 0, "gelu": 1, "relu2": 2}
# More rows are left to torch. At 64 rows the native form is 1.3 to 1.5 times as fast.
MOST_ROWS = 64


class _Map(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("weight", "down", "up", "which")),
        *((name, c_int64) for name in ("outputs", "inputs", "rank", "down_stride", "up_stride")),
        *((name, c_int32) for name in ("dtype", "delta_dtype")),
    ]


class _Norm(ctypes.Structure):
    _fields_ = [
        ("weight", c_void_p),
        ("present", c_int32),
        ("dtype", c_int32),
        ("eps", c_float),
    ]


_SIZES = (
    "dim kv_width heads kv_heads nope_dim value_dim latent_dim experts top_k expert_dim bias_loops"
)
_MAPS = "query_down query kv_down key value kv_up output router up down"
_HEAD_NORMS = "query_latent_norm kv_latent_norm query_norm key_norm"
_LAYER_NORMS = (
    "attention_norm attention_branch_norm attention_sum_norm "
    "feed_forward_norm feed_forward_branch_norm feed_forward_sum_norm"
)
_POINTERS = "query_bias key_bias router_bias expert_up expert_down"
_FLAGS = (
    "attention norm_by_width activation gated dense bias_dtype router_bias_dtype expert_dtype "
    "softmax_scores normalize"
)


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in _SIZES.split()),
        *((name, _Map) for name in _MAPS.split()),
        *((name, _Norm) for name in f"{_HEAD_NORMS} {_LAYER_NORMS}".split()),
        *((name, c_void_p) for name in _POINTERS.split()),
        *((name, c_int32) for name in _FLAGS.split()),
        ("route_scale", c_float),
    ]


_ARRAYS = "x out kv slot line column first loop pages writes mask cos sin"
_COUNTS = (
    "rows rotary_dim same_column slot_stride line_stride mask_stride table_stride "
    "page_columns page_row_stride same_loop"
)


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in _ARRAYS.split()),
        *((name, c_int64) for name in _COUNTS.split()),
        *((name, c_int32) for name in ("dtype", "kv_dtype")),
    ]


@functools.cache
def _library() -> ctypes.CDLL | None:
    found = native.library("few_rows")
    if found is None:
        return None
    found.few_rows_size.restype, found.few_rows_size.argtypes = c_int64, [c_int64]
    for which, struct in enumerate((_Map, _Norm, _Layer, _Call)):
        assert found.few_rows_size(which) == ctypes.sizeof(struct), struct
    found.few_rows_layer.restype = found.few_rows_linear.restype = None
    found.few_rows_linear.argtypes = [*[c_void_p] * 3, *[c_int64] * 3, c_int32, c_int32]
    return found


def available() -> bool:
    """Whether the library is there and the native forms are wanted (see `kernels.use`)."""
    return kernels.native_wanted() and _library() is not None


def accepts(x: Tensor, kv: Tensor) -> bool:
    """Whether the native form may compute a call with this input, [rows, ...], and cache."""
    return (
        x.shape[0] <= MOST_ROWS
        and accepts_input(x)
        and _is_plain(kv)
        and kv.stride()[-2:] == (kv.shape[-1], 1)
    )


def accepts_input(x: Tensor) -> bool:
    """Whether a native form may compute with this input now."""
    return (
        available()
        and not torch.is_grad_enabled()
        and _is_plain(x)
        and not torch.is_autocast_enabled("cpu")
        and not native.unseen()
    )


def _is_plain(x: Tensor) -> bool:
    return type(x) is Tensor and x.is_cpu and x.dtype in _DTYPES


def unsupported(layer: LayerWeights) -> str:
    """Why the native form cannot compute a layer; "" if it can."""
    for tensor in _tensors(layer):
        reason = _unsuited(tensor)
        if reason:
            return reason
    return ""


def accepts_weight(weight: Tensor) -> bool:
    """Whether a native form may read this tensor."""
    return not _unsuited(weight)


def _unsuited(tensor: Tensor) -> str:
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return f"a weight is a {type(tensor).__name__}"
    if tensor.device.type != "cpu":
        return f"weights are on {tensor.device}"
    if tensor.dtype not in _DTYPES:
        return f"weights are {tensor.dtype}"
    return "" if tensor.is_contiguous() else "a weight is not contiguous"


def _tensors(part: Any) -> Iterator[Tensor]:
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, Norm):
        yield from () if part.weight is None else (part.weight,)
    elif is_dataclass(part):
        for field in fields(part):
            yield from _tensors(getattr(part, field.name))


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _map(weight: Tensor) -> _Map:
    outputs, inputs = weight.shape
    return _Map(
        weight=weight.data_ptr(), outputs=outputs, inputs=inputs, dtype=_DTYPES[weight.dtype]
    )


def _norm(part: Norm | None) -> _Norm:
    if part is None:
        return _Norm()
    weight = part.weight
    dtype = 0 if weight is None else _DTYPES[weight.dtype]
    return _Norm(weight=_pointer(weight), present=1, dtype=dtype, eps=part.eps)


def _attention(w: LatentWeights | GroupedWeights) -> dict[str, Any]:
    made = {
        "heads": w.heads,
        "kv_width": w.kv_width,
        "query": _map(w.query),
        "output": _map(w.output),
        "query_norm": _norm(w.query_norm),
        "key_norm": _norm(w.key_norm),
    }
    if isinstance(w, LatentWeights):
        if w.query_down is not None:
            made["query_down"] = _map(w.query_down)
        return made | {
            "nope_dim": w.nope_dim,
            "value_dim": w.value_dim,
            "latent_dim": w.latent_dim,
            "kv_down": _map(w.kv_down),
            "kv_up": _map(w.kv_up),
            "query_latent_norm": _norm(w.query_latent_norm),
            "kv_latent_norm": _norm(w.kv_latent_norm),
        }
    bias = w.query_bias
    return made | {
        "attention": 1,
        "kv_heads": w.kv_heads,
        "value_dim": w.head_dim,
        "key": _map(w.key),
        "value": _map(w.value),
        "norm_by_width": w.norm_by_width,
        "query_bias": _pointer(bias),
        "key_bias": _pointer(w.key_bias),
        "bias_dtype": 0 if bias is None else _DTYPES[bias.dtype],
    }


def _feed_forward(w: DenseWeights | ExpertsWeights | None) -> dict[str, Any]:
    if w is None:
        return {}
    if isinstance(w, DenseWeights):
        return {
            "dense": 1,
            "up": _map(w.up),
            "down": _map(w.down),
            "activation": _ACTIVATIONS[w.activation],
            "gated": w.gated,
        }
    # Routed experts are always SwiGLU, as the shared ones are.
    return (
        {"activation": 0, "gated": 1}
        | _feed_forward(w.shared)
        | {
            "experts": len(w.down),
            "top_k": w.top_k,
            "expert_dim": w.down.shape[2],
            "router": _map(w.router),
            "bias_loops": w.router_bias.numel() // len(w.down),
            "router_bias": w.router_bias.data_ptr(),
            "router_bias_dtype": _DTYPES[w.router_bias.dtype],
            "expert_up": w.gate_up.data_ptr(),
            "expert_down": w.down.data_ptr(),
            "expert_dtype": _DTYPES[w.down.dtype],
            "softmax_scores": w.softmax,
            "normalize": w.normalize,
            "route_scale": w.route_scale,
        }
    )


class NativeLayer:
    """A layer whose weights the kernel supports; valid while they keep their memory."""

    def __init__(self, weights: LayerWeights) -> None:
        library = _library()
        assert library is not None and not unsupported(weights)
        self._weights = weights  # keeps their memory alive
        for tensor in _tensors(weights):
            use_huge_pages(tensor.data_ptr(), tensor.nbytes)
        norms = {name: _norm(getattr(weights, name)) for name in _LAYER_NORMS.split()}
        dim = weights.attention.output.shape[0]
        attention, feed_forward = weights.attention, weights.feed_forward
        self._layer = _Layer(
            dim=dim, **_attention(attention), **_feed_forward(feed_forward), **norms
        )
        self._run = library.few_rows_layer

    def __call__(self, x: Tensor, places: Places, deltas: Deltas) -> Tensor:
        """x [rows, dim] -> [rows, dim], in the dtype of x; as `few_rows.reference`."""
        x = x.contiguous()
        return self.prepared(torch.empty_like(x), places, deltas)(x)

    def prepared(self, out: Tensor, places: Places, deltas: Deltas) -> "PreparedLayer":
        """A call that writes to out [rows, dim], contiguous; it may be repeated."""
        rows = len(out)
        layer = self._with(deltas, rows) if deltas else self._layer
        return PreparedLayer(self._run, layer, *_call(out, places), out)

    def _with(self, deltas: Deltas, rows: int) -> _Layer:
        """A copy with the deltas of this call: another thread may be using the layer."""
        layer = _Layer.from_buffer_copy(self._layer)
        for name, (down, up, which) in deltas.items():
            one = getattr(layer, name)
            one.down, one.up, one.rank = down.data_ptr(), up.data_ptr(), down.shape[-2]
            one.delta_dtype = _DTYPES[down.dtype]
            if down.ndim == 3 and len(down) > 1:
                one.down_stride, one.up_stride = down.stride(0), up.stride(0)
                if which is not None:
                    assert len(which) == rows and which.is_contiguous()
                    one.which = which.data_ptr()
        return layer


class PreparedLayer:
    """Calls of a layer on the same arrays, one after the other, in the order of x."""

    def __init__(
        self, run: Any, layer: _Layer, call: _Call, kept: tuple[Any, ...], out: Tensor
    ) -> None:
        self._run, self._call, self._out = run, call, out
        self._kept = (layer, kept)
        self._layer_at, self._call_at = ctypes.byref(layer), ctypes.byref(call)

    def some(self, x: Tensor, out: Tensor) -> None:
        """out [rows, dim] of x for as many rows as x has, the first of those arranged."""
        call = self._call
        call.x, call.out, call.rows = x.data_ptr(), out.data_ptr(), x.shape[0]
        self._run(self._layer_at, self._call_at)

    def __call__(self, x: Tensor, column: int | None = None) -> Tensor:
        """The output of x [rows, dim], contiguous; with `column`, at this column in every row."""
        self._call.x = x.data_ptr()
        if column is not None:
            self._call.same_column = column
        self._run(self._layer_at, self._call_at)
        return self._out


def _call(out: Tensor, places: Places) -> tuple[_Call, tuple[Any, ...]]:
    """(a call without its x, what must live as long)."""
    kv, cos, mask, rows = places.kv, places.cos, places.mask, len(out)
    call = _Call(out=out.data_ptr(), kv=kv.data_ptr(), rows=rows)
    call.dtype, call.kv_dtype = _DTYPES[out.dtype], _DTYPES[kv.dtype]
    call.slot_stride, call.line_stride = kv.stride(0), kv.stride(1)
    column, writes = places.column, places.writes
    if writes is False:
        writes = _no_writes(rows)
    names = ("slot", "line", "first", "column", "loop", "writes")
    given = (places.slot, places.line, places.first, column, places.loop, writes)
    kept = [_of_rows(one, rows) if isinstance(one, Tensor) else None for one in given]
    for name, array in zip(names, kept, strict=True):
        setattr(call, name, _pointer(array))
    if not isinstance(column, Tensor):
        call.same_column = column
    if not isinstance(places.loop, Tensor):
        call.same_loop = places.loop
    if places.pages is not None:
        call.page_columns, call.page_row_stride = kv.shape[1], _row_stride(places.pages)
        call.pages = places.pages.data_ptr()
    if mask is not None:
        call.mask, call.mask_stride = mask.data_ptr(), _row_stride(mask)
    if cos is not None and places.sin is not None:
        call.cos, call.sin = cos.data_ptr(), places.sin.data_ptr()
        call.table_stride, call.rotary_dim = _row_stride(cos), cos.shape[-1]
    return call, (places, kept)


def _of_rows(array: Tensor, rows: int) -> Tensor:
    """The array, contiguous; the kernel reads a number of it for every row."""
    assert len(array) == rows, f"{len(array)} numbers for {rows} rows"
    return array.contiguous()


def _row_stride(x: Tensor) -> int:
    """Numbers between the rows of x [rows or 1, n]; 0: one for all."""
    return x.stride(0) if x.shape[0] > 1 else 0


@functools.cache
def _no_writes(rows: int) -> Tensor:
    return torch.zeros(rows, dtype=torch.bool)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """weight x, weight [out, in], for x [..., in]; both contiguous, each in fp32 or bf16."""
    library = _library()
    assert library is not None and not _unsuited(weight)
    y = x.new_empty(*x.shape[:-1], len(weight))
    outputs, inputs = weight.shape
    library.few_rows_linear(
        weight.data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
        x.numel() // inputs,
        outputs,
        inputs,
        _DTYPES[weight.dtype],
        _DTYPES[x.dtype],
    )
    return y


def fast(x: Tensor, layer: LayerWeights, places: Places, deltas: Deltas) -> Tensor:
    """`few_rows.reference`, natively, on contiguous tensors of fp32 or bf16."""
    return NativeLayer(layer)(x, places, deltas)
