"""Initial state h_0: zeros, the encoded input, or noise (at inference a function of position)."""

import math
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from openmythos.config import require_number
from openmythos.types import Hidden

_LOW_32 = 0xFFFFFFFF
# Odd multipliers of the hash, so that neighbouring positions and features start far apart.
_POSITION, _FEATURE, _SEED = 0x2545F491, 0x1B873593, 0x4F6CDD1D


def _mix(x: Tensor) -> Tensor:
    """A 32-bit bijection, in int64: one flipped input bit flips half of the output bits.

    A multiply-xorshift hash (Wellons, hash-prospector); both factors are below 2^31, so that no
    product overflows.
    """
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _LOW_32
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _LOW_32
    return x ^ (x >> 15)


def position_noise(
    positions: Tensor, dim: int, *, seed: int = 0, truncate: float = math.inf
) -> Tensor:
    """Standard normal numbers [*positions.shape, dim] in fp32, on the device of positions.

    A number depends only on its position, feature and the seed: it is the same in any batch, with
    prefill or cache. Only these tokens are computed, without a generator or table, hence without
    device synchronisation. Absolute values are at most `truncate`, and at most 5.3.
    """
    feature = torch.arange(dim, device=positions.device)
    start = (seed * _SEED) & _LOW_32
    by_position = _mix((positions.long() * _POSITION + start) & _LOW_32)
    by_feature = _mix((feature * _FEATURE + 1) & _LOW_32)
    bits = _mix(_mix(by_position[..., None] ^ by_feature) ^ start) >> 9
    # 23 bits, at interval midpoints: never -1 or 1, where erfinv is infinite.
    uniform = (2 * bits + 1).float() * 2.0**-23 - 1
    uniform *= math.erf(truncate / math.sqrt(2))
    return torch.erfinv(uniform).mul_(math.sqrt(2))


@runtime_checkable
class InitialState(Protocol):
    """Interface of the initial states."""

    def draw(self, encoded: Hidden, positions: Tensor, *, fresh: bool) -> Hidden:
        """h_0 for the prelude's output [batch, seq, dim] at positions [batch or 1, seq].

        `fresh`: new random numbers, as in training; otherwise equal in every call.
        """


@dataclass(frozen=True, kw_only=True)
class ZeroState:
    """h_0 = 0."""

    kind: Literal["zeros"] = "zeros"

    def draw(self, encoded: Hidden, positions: Tensor, *, fresh: bool) -> Hidden:
        return torch.zeros_like(encoded)


@dataclass(frozen=True, kw_only=True)
class EncodedState:
    """h_0 = e: the prelude's output, normed if the prelude has a norm."""

    kind: Literal["encoded"] = "encoded"

    def draw(self, encoded: Hidden, positions: Tensor, *, fresh: bool) -> Hidden:
        return encoded


@dataclass(frozen=True, kw_only=True)
class NormalState:
    """h_0 ~ N(0, scale * 2 / (5 dim)), as in Huginn (arXiv 2502.05171) and Parcae (2604.12946).

    `truncate` > 0 truncates at that many standard deviations (Huginn: 3). At inference the noise is
    a function of the position: the same logits in any batch or cache.
    """

    kind: Literal["normal"] = "normal"
    scale: float = 1.0
    truncate: float = 0.0

    def __post_init__(self) -> None:
        require_number("scale", self.scale, above=0, at_most=1e6)
        require_number("truncate", self.truncate, at_least=0, at_most=100)

    def draw(self, encoded: Hidden, positions: Tensor, *, fresh: bool) -> Hidden:
        std = (self.scale * 2 / (5 * encoded.shape[-1])) ** 0.5
        if not fresh:
            limit = self.truncate or math.inf
            noise = position_noise(positions, encoded.shape[-1], truncate=limit)
            return (noise * std).to(encoded.dtype).expand_as(encoded)
        if not self.truncate:
            return torch.randn_like(encoded) * std
        drawn = torch.empty_like(encoded)
        limit = self.truncate * std
        return torch.nn.init.trunc_normal_(drawn, std=std, a=-limit, b=limit)


@dataclass(frozen=True, kw_only=True)
class SineHashState:
    """h_0 ~ N(0, 1 / dim); at inference xLLM-Loop's hash of position and feature.

    u = frac(43758.5453123 sin(0.013579 feature + 0.021713 position + 0.123457)). The factor
    magnifies rounding to the third digit of u; here the sine is rounded once, so that it is the
    same on every device. xLLM-Loop also hashes the row of the batch or the example; here every row
    is row 0, so that no row depends on its batch.
    """

    kind: Literal["sine_hash"] = "sine_hash"

    def draw(self, encoded: Hidden, positions: Tensor, *, fresh: bool) -> Hidden:
        std = encoded.shape[-1] ** -0.5
        if fresh:
            return torch.randn_like(encoded) * std
        feature = torch.arange(encoded.shape[-1], device=positions.device, dtype=torch.float32)
        angle = feature * 0.013579 + positions[..., None].float() * 0.021713 + 0.123457
        value = angle.double().sin().float() * 43758.5453123
        uniform = (value - value.floor()).clamp(1e-6, 1 - 1e-6)
        noise = torch.erfinv(2 * uniform - 1) * (math.sqrt(2) * std)
        return noise.to(encoded.dtype).expand_as(encoded)


StateInit = ZeroState | EncodedState | NormalState | SineHashState
