"""The native forms of norm, gate and rotation: C++ functions that read their input once or twice.

torch computes each as a chain of operators, and every operator reads and writes memory.
"""

import ctypes
import functools
from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor

from openmythos import kernels
from openmythos.kernels import native

# The native forms use one thread. With more than two threads (not measured), torch computes tensors
# of more numbers than this, since it divides them among its threads.
MOST_NUMBERS = 1 << 15
# Below, the forward pass of the native form takes as long as torch's.
FEWEST = 1 << 12
_SIGNATURES = {
    "norm": (*[c_void_p] * 4, c_int64, c_int64, c_float),
    "norm_backward": (*[c_void_p] * 6, c_int64, c_int64),
    "gate": (*[c_void_p] * 2, c_int64, c_int64),
    "gate_backward": (*[c_void_p] * 3, c_int64, c_int64),
    "rotate": (*[c_void_p] * 4, *[ctypes.POINTER(c_int64)] * 3, c_int64, c_float),
}


@functools.cache
def _library() -> ctypes.CDLL | None:
    found = native.library("elementwise")
    if found is not None:
        for name, signature in _SIGNATURES.items():
            function = getattr(found, f"elementwise_{name}")
            function.argtypes, function.restype = signature, None
    return found


def accepts(*tensors: Tensor, fewest: int = 1) -> bool:
    """Whether the native forms may compute with these tensors now; the first is the largest.

    Not with fewer than `fewest` numbers in the first.
    """
    return (
        # First: to compare the size of a tensor would tie compiled code to some sizes.
        kernels.native_wanted()
        and tensors[0].numel() >= fewest
        and all(
            type(x) in (Tensor, torch.nn.Parameter) and x.is_cpu and x.dtype == torch.float32
            for x in tensors
        )
        and (tensors[0].numel() <= MOST_NUMBERS or torch.get_num_threads() <= 2)
        and not native.unseen()
        and _library() is not None
    )


def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x s weight, s) for x [..., dim], s = 1 / sqrt(mean(x^2) + eps) [..., 1]."""
    x, weight, dim = x.contiguous(), weight.contiguous(), x.shape[-1]
    y, scale = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1)
    _call("norm", x, weight, y, scale)(scale.numel(), dim, eps)
    return y, scale


def norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of x, gradient of weight) of `norm`, from that of its first result."""
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    call = _call("norm_backward", grad, x, weight, scale, grad_x, grad_weight)
    call(scale.numel(), x.shape[-1])
    return grad_x, grad_weight


def gate(gated: Tensor) -> Tensor:
    """silu(g) u of gated = [g | u], [..., 2 * width]."""
    gated, width = gated.contiguous(), gated.shape[-1] // 2
    y = gated.new_empty(*gated.shape[:-1], width)
    _call("gate", gated, y)(y.numel() // width, width)
    return y


def gate_backward(grad: Tensor, gated: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of gated, silu(g) u) from the gradient of silu(g) u, which is overwritten."""
    grad, gated = grad.contiguous(), gated.contiguous()
    found, width = torch.empty_like(gated), grad.shape[-1]
    _call("gate_backward", gated, grad, found)(grad.numel() // width, width)
    return found, grad


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """x [batch, heads, seq, dim] rotated by tables [batch or 1, 1, seq, dim]."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    y = torch.empty_like(x)
    row = cos[0].numel() if len(cos) > 1 else 0
    shapes = (_counts(*x.shape), _counts(*x.stride()), _counts(*y.stride()))
    _call("rotate", x, cos, sin, y)(*shapes, row, -1.0 if inverse else 1.0)
    return y


_counts = c_int64 * 4


def _call(name: str, *tensors: Tensor) -> functools.partial[None]:
    function = getattr(_library(), f"elementwise_{name}")
    return functools.partial(function, *(x.data_ptr() for x in tensors))
