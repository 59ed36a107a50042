"""Rotary position embedding on real numbers (Su et al. 2021), in the half-split layout.

Real cos/sin tables rather than complex numbers: complex buffers lose their imaginary part under
`.to(dtype)` and make torch.compile recompile. Tables are computed from positions in every forward
pass, so that no checkpoint depends on a maximum length.
"""

import torch
from torch import Tensor

from openmythos import kernels


def rope_tables(positions: Tensor, rotary_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and signed sin of angle_i = position * base^(-2i/d), [*positions.shape, rotary_dim] fp32.

    cos = [cos | cos],  sin = [-sin | sin]
    """
    exponent = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=torch.float32)
    frequency = base ** (-exponent / rotary_dim)
    angle = positions.to(torch.float32).unsqueeze(-1) * frequency
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((second, first), dim=-1), sin)


class _Rotation(torch.autograd.Function):
    """A rotation, whose gradient turns back: nothing of x is kept."""

    @staticmethod
    def forward(ctx, x, cos, sin):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, -sin), None, None


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i + d/2}) by its angle; tables as of `rope_tables`, broadcast."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    if not torch.is_grad_enabled() or not kernels.own_form(x):
        return _turned(x, cos, sin)
    turned: Tensor = _Rotation.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return turned
