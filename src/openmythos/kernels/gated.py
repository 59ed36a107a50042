"""A gated linear map: y = W (silu(g) * u) (Shazeer 2020, arXiv 2002.05202)."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from openmythos import kernels
from openmythos.kernels import elementwise
from openmythos.kernels.precision import as_autocast

# Numbers of [g | u] in a piece of the backward pass on a CPU: 256 KiB in fp32.
CACHED = 1 << 16


def reference(gated: Tensor, weight: Tensor) -> Tensor:
    """The formula."""
    gate, up = gated.chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, weight)


def gated_linear(gated: Tensor, weight: Tensor) -> Tensor:
    """W (silu(g) * u) of gated = [g | u], [..., 2 * hidden_dim], and weight [dim, hidden_dim]."""
    if kernels.fast(gated.device) is None:
        return reference(gated, weight)
    if not torch.is_grad_enabled():
        return F.linear(activated(gated), weight)
    # On every device, to save memory: the formula saves twice as much for the backward pass.
    out: Tensor = _GatedLinear.apply(as_autocast(gated), as_autocast(weight))  # type: ignore[no-untyped-call]
    return out


def activated(gated: Tensor) -> Tensor:
    """silu(g) * u of gated = [g | u], without gradient."""
    if elementwise.accepts(gated, fewest=elementwise.FEWEST):
        return elementwise.gate(gated)
    gate, up = gated.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def gradients(grad: Tensor, gated: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of gated, silu(g) * u) from the gradient of silu(g) * u, which is overwritten."""
    if elementwise.accepts(gated, grad):
        return elementwise.gate_backward(grad, gated)
    if gated.device.type != "cpu" or torch.compiler.is_compiling():
        gate, up = gated.chunk(2, dim=-1)
        silu = F.silu(gate)
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return torch.cat((grad_gate, grad.mul_(silu)), dim=-1), silu.mul_(up)
    # Contiguous, so that the pieces below are views of them.
    found, grad = gated.new_empty(gated.shape), grad.contiguous()
    for parts in _pieces(gated, grad, found):
        _gradients(*parts)
    return found, grad


def _gradients(gated: Tensor, grad: Tensor, found: Tensor) -> None:
    """Write the gradient of gated to `found`, and silu(g) * u to `grad`."""
    (gate, up), (grad_gate, grad_up) = gated.chunk(2, dim=-1), found.chunk(2, dim=-1)
    if gated.dtype.itemsize < 4:  # bf16 would round the intermediates below
        silu = F.silu(gate)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
    else:
        # dsilu/dg = sigmoid + silu - silu * sigmoid: one exponential, not two.
        sigmoid = gate.sigmoid()
        silu = sigmoid * gate
        torch.addcmul(silu, silu, sigmoid, value=-1, out=grad_gate)
        grad_gate.add_(sigmoid).mul_(torch.mul(grad, up, out=sigmoid))
    torch.mul(grad, silu, out=grad_up)
    torch.mul(silu, up, out=grad)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each tensor [..., width], so few that a piece of the first is cached."""
    number = tensors[0].numel() // CACHED
    if number < 2:
        return iter([tensors])
    return zip(*(x.flatten(0, -2).tensor_split(number) for x in tensors), strict=True)


class _GatedLinear(torch.autograd.Function):
    """Saves only [g | u]; the backward pass recomputes silu(g) * u."""

    @staticmethod
    def forward(ctx, gated, weight):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(gated, weight)
        return F.linear(activated(gated), weight)

    @staticmethod
    @kernels.first_order
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        gated, weight = ctx.saved_tensors
        grad_gated, hidden = gradients(grad @ weight, gated)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = grad.flatten(0, -2).t() @ hidden.flatten(0, -2)
        return grad_gated, grad_weight
