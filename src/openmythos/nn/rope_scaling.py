"""Rotary frequencies, and their scaling for longer contexts."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from openmythos.config import require, require_int, require_number

_MOST = 2**31 - 1


@runtime_checkable
class RopeFrequencies(Protocol):
    """Interface of RoPE scalings."""

    @property
    def amplitude(self) -> float:
        """The factor on cos and sin."""

    def frequencies(self, rotary_dim: int, base: float, device: torch.device) -> Tensor:
        """The angle per position of each channel pair, [rotary_dim / 2] in fp32."""


@dataclass(frozen=True, kw_only=True)
class NoScaling:
    """No scaling: base^(-2i / d) for i < d / 2 (Su et al. 2021, arXiv 2104.09864)."""

    kind: Literal["none"] = "none"
    amplitude: ClassVar[float] = 1.0

    def frequencies(self, rotary_dim: int, base: float, device: torch.device) -> Tensor:
        exponent = torch.arange(0, rotary_dim, 2, device=device, dtype=torch.float32)
        frequencies: Tensor = base ** (-exponent / rotary_dim)
        return frequencies


NO_SCALING = NoScaling()


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """All frequencies divided by `factor` (position interpolation, arXiv 2306.15595)."""

    kind: Literal["linear"] = "linear"
    amplitude: ClassVar[float] = 1.0
    factor: float = 4.0

    def __post_init__(self) -> None:
        require_number("factor", self.factor, at_least=1, at_most=1e6)

    def frequencies(self, rotary_dim: int, base: float, device: torch.device) -> Tensor:
        return NO_SCALING.frequencies(rotary_dim, base, device) / self.factor


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Divide low frequencies by `factor`, keep high ones, interpolate in between (Llama 3.1).

    Low: fewer than `low_frequency` turns in `original_context` tokens; high: more than
    `high_frequency`.
    """

    kind: Literal["llama3"] = "llama3"
    amplitude: ClassVar[float] = 1.0
    factor: float = 8.0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    original_context: int = 8192

    def __post_init__(self) -> None:
        require_number("factor", self.factor, at_least=1, at_most=1e6)
        require_int("original_context", self.original_context, minimum=1, maximum=_MOST)
        require_number("low_frequency", self.low_frequency, above=0)
        allowed = f"must be above low_frequency = {self.low_frequency}"
        fits = self.high_frequency > self.low_frequency
        require(fits, "high_frequency", self.high_frequency, allowed)

    def frequencies(self, rotary_dim: int, base: float, device: torch.device) -> Tensor:
        plain = NO_SCALING.frequencies(rotary_dim, base, device)
        turns = self.original_context * plain / (2 * math.pi)
        share = (turns - self.low_frequency) / (self.high_frequency - self.low_frequency)
        share = share.clamp(0, 1)
        return plain * (share + (1 - share) / self.factor)


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): divide frequencies below `slow` turns in `original_context` tokens
    by `factor`, keep those above `fast`, interpolate; scale cos and sin by 0.1 ln(factor) + 1.
    """

    kind: Literal["yarn"] = "yarn"
    factor: float = 4.0
    fast: float = 32.0
    slow: float = 1.0
    original_context: int = 4096

    def __post_init__(self) -> None:
        require_number("factor", self.factor, at_least=1, at_most=1e6)
        require_int("original_context", self.original_context, minimum=1, maximum=_MOST)
        require_number("slow", self.slow, above=0)
        require(self.fast > self.slow, "fast", self.fast, f"must be above slow = {self.slow}")

    @property
    def amplitude(self) -> float:
        return 0.1 * math.log(self.factor) + 1

    def frequencies(self, rotary_dim: int, base: float, device: torch.device) -> Tensor:
        plain = NO_SCALING.frequencies(rotary_dim, base, device)

        def pair(turns: float) -> float:
            """Index of the channel pair that makes `turns` turns in the original context."""
            length = self.original_context / (2 * math.pi * turns)
            return rotary_dim * math.log(length) / (2 * math.log(base))

        first = max(0, math.floor(pair(self.fast)))
        last = min(rotary_dim - 1, math.ceil(pair(self.slow)))
        ramp = (torch.arange(len(plain), device=device) - first) / max(last - first, 1e-3)
        stretched = ramp.clamp(0, 1)
        return plain * (1 - stretched + stretched / self.factor)


RopeScaling = NoScaling | LinearScaling | Llama3Scaling | YarnScaling
