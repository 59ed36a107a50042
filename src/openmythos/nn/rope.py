"""Rotary position embedding on real numbers (Su et al. 2021), in the half-split layout.

Real cos/sin tables rather than complex numbers: complex buffers lose their imaginary part under
`.to(dtype)` and make torch.compile recompile. Tables are computed from positions in every forward
pass, so that no checkpoint depends on a maximum length.
"""

import torch
from torch import Tensor


def rope_tables(positions: Tensor, rotary_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin, each [*positions.shape, rotary_dim / 2] in fp32, of positions * base^(-2i/d)."""
    exponent = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=torch.float32)
    frequency = base ** (-exponent / rotary_dim)
    angle = positions.to(torch.float32).unsqueeze(-1) * frequency
    return angle.cos(), angle.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i + d/2}) by its angle; cos, sin broadcast against half of x."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
