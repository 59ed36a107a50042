"""The native form of attention with few keys, in fp32: a C++ function that takes head after head.

All of a head stays in the processor's cache. torch's fused kernel is made for long sequences: with
a few dozen keys most of its time is overhead.
"""

import ctypes
import functools
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p

import torch
from torch import Tensor

from openmythos import kernels
from openmythos.kernels import elementwise, native

# Up to so many keys it is faster than torch's fused kernel and than blocks, forward and backward.
MOST_KEYS = 512
_POINTERS = {"forward": 7, "backward": 11}


class _Sizes(Structure):
    """As in few_keys.cpp; distances are strides of batch, head and position."""

    _fields_ = (
        *((name, c_int64) for name in ("batch", "kv_heads", "group", "queries", "keys")),
        *((name, c_int64) for name in ("width", "value_width")),
        *((name, c_int64 * 3) for name in ("q", "k", "v", "o", "dq", "dk", "dv")),
        ("mask", c_int64 * 2),
        ("is_causal", c_int64),
        ("scale", c_float),
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    found = native.library("few_keys")
    if found is not None:
        for name, pointers in _POINTERS.items():
            function = getattr(found, f"few_keys_{name}")
            function.argtypes = (POINTER(_Sizes), *[c_void_p] * pointers)
            function.restype = None
    return found


def accepts(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the native form may compute with these tensors now, and is the fastest."""
    return (
        elementwise.accepts(query, key, value)
        and query.shape[2] > 1
        and key.shape[2] <= MOST_KEYS
        # It uses one thread; torch divides larger tensors among its threads.
        and (query.numel() <= elementwise.MOST_NUMBERS or torch.get_num_threads() == 1)
        and _library() is not None
    )


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """softmax(scale q k^T) v; shapes as in `kernels.attention`.

    `is_causal`: query i of the last positions of the keys sees none that is later, with or without
    a mask [batch or 1, 1, seq or 1, total].
    """
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    if mask is not None:
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
        mask = mask.expand(len(query), 1, query.shape[2], key.shape[2])
    if not torch.is_grad_enabled():
        return _forward(query, key, value, mask, is_causal, scale)[0]
    out: Tensor = _FewKeys.apply(query, key, value, mask, is_causal, scale)  # type: ignore[no-untyped-call]
    return out


def _beside(like: Tensor, width: int) -> Tensor:
    """Room for [batch, heads, seq, width]; in memory heads are beside width, as maps have them."""
    batch, heads, seq, _ = like.shape
    return like.new_empty(batch, seq, heads, width).transpose(1, 2)


def _call(
    name: str,
    inputs: tuple[Tensor, Tensor, Tensor],
    results: tuple[Tensor, ...],
    mask: Tensor | None,
    others: tuple[Tensor, ...],
    *,
    is_causal: bool,
    scale: float,
) -> None:
    """`results`: o, and the gradients of the inputs if they are computed."""
    query, key, value = inputs
    distances = [(c_int64 * 3)(*x.stride()[:3]) for x in (*inputs, *results)]
    batch, heads, queries, width = query.shape
    sizes = _Sizes(
        batch,
        key.shape[1],
        heads // key.shape[1],
        queries,
        key.shape[2],
        width,
        value.shape[3],
        *distances,
        *[(c_int64 * 3)()] * (7 - len(distances)),
        (0, 0) if mask is None else (mask.stride(0), mask.stride(2)),
        is_causal,
        scale,
    )
    masked = None if mask is None else mask.data_ptr()
    o, *gradients = (x.data_ptr() for x in results)
    pointers = [x.data_ptr() for x in inputs]
    rest = (x.data_ptr() for x in others)
    getattr(_library(), f"few_keys_{name}")(sizes, *pointers, masked, o, *rest, *gradients)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(o, greatest score, 1 / sum of exp(score - greatest)); the latter [batch, heads, seq]."""
    out = _beside(query, value.shape[3])
    tops, parts = query.new_empty(query.shape[:3]), query.new_empty(query.shape[:3])
    inputs, kept = (query, key, value), (tops, parts)
    _call("forward", inputs, (out,), mask, kept, is_causal=is_causal, scale=scale)
    return out, tops, parts


class _FewKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, mask, is_causal, scale):  # type: ignore[no-untyped-def]
        out, *kept = _forward(query, key, value, mask, is_causal, scale)
        ctx.save_for_backward(query, key, value, mask, out, *kept)
        ctx.how = {"is_causal": is_causal, "scale": scale}
        return out

    @staticmethod
    @kernels.first_order
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        *inputs, mask, out, tops, parts = ctx.saved_tensors
        if grad.stride() != out.stride():
            grad = torch.empty_like(out).copy_(grad)
        gradients = [_beside(x, x.shape[3]) for x in inputs]
        results, others = (out, *gradients), (tops, parts, grad)
        _call("backward", tuple(inputs), results, mask, others, **ctx.how)
        return *gradients, None, None, None
