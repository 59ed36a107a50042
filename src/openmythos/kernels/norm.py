"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension (arXiv 1910.07467)."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from openmythos import kernels
from openmythos.kernels import elementwise


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula, computed in fp32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = wide * (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return (y * weight).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., dim] normalised and times weight [dim], in the dtype of x."""
    tuned = kernels.fast(x.device)
    if tuned is None:
        return reference(x, weight, eps)
    weight = weight.to(x.dtype)  # torch's fused GPU kernel needs the dtype of x
    # Fake tensors and other subclasses must not be mixed with the cached eps of `_norm`.
    plain = not torch.compiler.is_compiling() and type(x) is Tensor
    if not (tuned.own_forms and plain):
        return F.rms_norm(x, weight.shape, weight, eps)
    if not torch.is_grad_enabled():
        return _norm(x, weight, eps)[0]
    y: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return y


@functools.cache
def _tensor(eps: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(eps, device="cpu", dtype=dtype)


def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y, 1 / sqrt(mean(x^2) + eps)), the latter [..., 1] in fp32 at least.

    In torch it uses few operators, hence eps as a tensor: a decoded token runs dozens of norms.
    """
    if x.numel() >= elementwise.FEWEST and elementwise.accepts(x, weight):
        return elementwise.norm(x, weight, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    scale = torch.addcmul(_tensor(eps, wide), length, length, value=1 / x.shape[-1]).rsqrt_()
    return (x * scale).mul_(weight).to(x.dtype), scale


class _RMSNorm(torch.autograd.Function):
    """With s = 1 / sqrt(mean(x^2) + eps) and p = grad * x:

    y = s w x,   dw = sum_rows s p,   dx = s w grad - x s^3 (p . w) / dim

    Only x and s are saved. On a CPU, torch's is a chain of operators that saves three times that.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):  # type: ignore[no-untyped-def]
        y, scale = _norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @kernels.first_order
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight, scale = ctx.saved_tensors
        if elementwise.accepts(x, weight, grad):
            return *elementwise.norm_backward(grad, x, weight, scale), None
        shape, dim, dtype = x.shape, x.shape[-1], x.dtype
        x, grad, scale = (t.to(scale.dtype).reshape(-1, t.shape[-1]) for t in (x, grad, scale))
        wide = weight.to(scale.dtype)
        product = grad * x
        grad_weight = torch.mv(product.t(), scale[:, 0])
        along = torch.mv(product, wide)[:, None].mul_(scale**3).mul_(1 / dim)
        grad_x = torch.mul(grad, wide, out=product).mul_(scale).addcmul_(x, along, value=-1)
        return grad_x.view(shape).to(dtype), grad_weight.to(weight.dtype), None
