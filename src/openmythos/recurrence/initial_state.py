"""Noise that is a function of (seed, position, feature): the random initial state at inference."""

import math

import torch
from torch import Tensor

_LOW_32 = 0xFFFFFFFF
# Odd, so that neighbouring positions and features start far apart.
_POSITION, _FEATURE, _SEED = 0x2545F491, 0x1B873593, 0x4F6CDD1D


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers, in int64, that flips half of the bits for one that changes.

    A multiply-xorshift hash (Wellons, hash-prospector); both factors are below 2^31, so that no
    product overflows.
    """
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _LOW_32
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _LOW_32
    return x ^ (x >> 15)


def position_noise(positions: Tensor, dim: int, *, seed: int = 0) -> Tensor:
    """Standard normal numbers [*positions.shape, dim] in fp32, on the device of positions.

    A number depends on its position, its feature and the seed alone: the same in any batch, prefill
    or cache, at the cost of the tokens asked for. No generator and no table, hence no wait for the
    device. Numbers lie within 5.3 standard deviations.
    """
    feature = torch.arange(dim, device=positions.device)
    start = (seed * _SEED) & _LOW_32
    by_position = _mix((positions.long() * _POSITION + start) & _LOW_32)
    by_feature = _mix((feature * _FEATURE + 1) & _LOW_32)
    bits = _mix(_mix(by_position[..., None] ^ by_feature) ^ start) >> 9
    # 23 bits, in the middle of their interval: never -1 or 1, which would be infinite.
    uniform = (2 * bits + 1).float() * 2.0**-23 - 1
    return torch.erfinv(uniform).mul_(math.sqrt(2))
