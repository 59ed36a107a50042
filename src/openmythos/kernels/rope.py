"""Rotary positions on real numbers (Su et al. 2021, arXiv 2104.09864), in the half-split layout."""

import torch
from torch import Tensor

from openmythos import kernels
from openmythos.kernels import elementwise


def reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The formula, with tables in the dtype of x."""
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((second, first), dim=-1), sin)


def rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Rotate each pair (x_i, x_{i + dim/2}) of x [batch, heads, seq, dim] by its angle.

    Tables [batch or 1, 1, seq, dim] from `nn.layout.rope_tables`; None: no rotary positions, x is
    returned unchanged.
    """
    if cos is None or sin is None:
        return x
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    tuned = kernels.fast(x.device)
    if tuned is None or not tuned.own_forms:
        return reference(x, cos, sin)
    if not torch.is_grad_enabled():
        return _turned(x, cos, sin, fewest=elementwise.FEWEST)
    rotated: Tensor = _Rotation.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return rotated


def _turned(
    x: Tensor, cos: Tensor, sin: Tensor, *, fewest: int = 1, inverse: bool = False
) -> Tensor:
    if elementwise.accepts(x, cos, sin, fewest=fewest) and x.ndim == 4:
        tables = (len(x), 1, *x.shape[2:]), (1, 1, *x.shape[2:])
        if cos.shape in tables and cos.shape == sin.shape:
            return elementwise.rotate(x, cos, sin, inverse=inverse)
    return reference(x, cos, -sin if inverse else sin)


class _Rotation(torch.autograd.Function):
    """A rotation; its gradient is the inverse rotation, so x is not saved."""

    @staticmethod
    def forward(ctx, x, cos, sin):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, inverse=True), None, None
