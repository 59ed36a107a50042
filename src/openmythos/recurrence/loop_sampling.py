"""How many loops a training step runs: a distribution, per batch or per sequence, a curriculum.

A draw depends only on (seed, step) and covers the global batch, so that every rank knows the loops
of all ranks without communication.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from openmythos.config import require, require_int, require_number
from openmythos.types import LoopCounts

Granularity = Literal["batch", "sequence"]
# Upper limit of configured loop counts: more would exhaust memory or never finish.
MOST_LOOPS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class FixedLoops:
    """Always `mean_loops` (a whole number)."""

    kind: Literal["fixed"] = "fixed"
    mean_loops: int = 4
    per: Granularity = "batch"

    def __post_init__(self) -> None:
        require_int("mean_loops", self.mean_loops, minimum=1, maximum=MOST_LOOPS)

    @property
    def min_loops(self) -> int:
        return 1

    @property
    def max_loops(self) -> int:
        return self.mean_loops

    def draw(self, size: int, mean: float, generator: torch.Generator) -> Tensor:
        return torch.full((size,), float(mean))


@dataclass(frozen=True, kw_only=True)
class UniformLoops:
    """Uniform over min_loops ... max_loops."""

    kind: Literal["uniform"] = "uniform"
    min_loops: int = 1
    max_loops: int = 8
    per: Granularity = "sequence"

    def __post_init__(self) -> None:
        require_int("min_loops", self.min_loops, minimum=1)
        require_int("max_loops", self.max_loops, minimum=self.min_loops, maximum=MOST_LOOPS)

    @property
    def mean_loops(self) -> float:
        return (self.min_loops + self.max_loops) / 2

    def draw(self, size: int, mean: float, generator: torch.Generator) -> Tensor:
        # A curriculum's smaller mean lowers the upper end of the range.
        top = max(self.min_loops, round(2 * mean - self.min_loops))
        return torch.randint(self.min_loops, top + 1, (size,), generator=generator).float()


@dataclass(frozen=True, kw_only=True)
class PoissonLoops:
    """Poisson(mean_loops), clipped to min_loops ... max_loops (Parcae, arXiv 2604.12946)."""

    kind: Literal["poisson"] = "poisson"
    mean_loops: float = 4.0
    min_loops: int = 1
    max_loops: int = 16
    per: Granularity = "sequence"

    def __post_init__(self) -> None:
        _check_clipped(self.mean_loops, self.min_loops, self.max_loops)

    def draw(self, size: int, mean: float, generator: torch.Generator) -> Tensor:
        return torch.poisson(torch.full((size,), mean), generator=generator)


@dataclass(frozen=True, kw_only=True)
class LogNormalPoissonLoops:
    """Poisson(r), r log-normal with mean mean_loops and log-variance sigma^2 (arXiv 2502.05171)."""

    kind: Literal["log_normal_poisson"] = "log_normal_poisson"
    mean_loops: float = 4.0
    sigma: float = 0.5
    min_loops: int = 1
    max_loops: int = 16
    per: Granularity = "sequence"

    def __post_init__(self) -> None:
        _check_clipped(self.mean_loops, self.min_loops, self.max_loops)
        require_number("sigma", self.sigma, above=0, at_most=10)

    def draw(self, size: int, mean: float, generator: torch.Generator) -> Tensor:
        normal = torch.randn(size, generator=generator)
        rate = mean * torch.exp(self.sigma * normal - self.sigma**2 / 2)
        return torch.poisson(rate, generator=generator)


LoopSampling = FixedLoops | UniformLoops | PoissonLoops | LogNormalPoissonLoops


def _check_clipped(mean_loops: float, min_loops: int, max_loops: int) -> None:
    require_int("min_loops", min_loops, minimum=1)
    require_int("max_loops", max_loops, minimum=min_loops, maximum=MOST_LOOPS)
    require_number("mean_loops", mean_loops, above=0)
    require(
        min_loops <= mean_loops <= max_loops,
        "mean_loops",
        mean_loops,
        f"must lie between min_loops = {min_loops} and max_loops = {max_loops}",
    )


@dataclass(frozen=True, kw_only=True)
class NoCurriculum:
    """The target mean from the first step on."""

    kind: Literal["none"] = "none"

    def mean(self, target: float, progress: float) -> float:
        return target


@dataclass(frozen=True, kw_only=True)
class LinearCurriculum:
    """The mean grows from start_loops to its target over the first `fraction` of the steps.

    Retrofitted recurrence (arXiv 2511.07384) uses a quarter of the steps.
    """

    kind: Literal["linear"] = "linear"
    start_loops: float = 1.0
    fraction: float = 0.25

    def __post_init__(self) -> None:
        require_number("start_loops", self.start_loops, at_least=1, at_most=MOST_LOOPS)
        require_number("fraction", self.fraction, above=0, at_most=1)

    def mean(self, target: float, progress: float) -> float:
        share = min(1.0, progress / self.fraction)
        return self.start_loops + (target - self.start_loops) * share


LoopCurriculum = NoCurriculum | LinearCurriculum


def sample_loops(
    sampling: LoopSampling,
    curriculum: LoopCurriculum,
    *,
    batch: int,
    seed: int,
    step: int,
    num_steps: int,
) -> LoopCounts:
    """Loops of each of `batch` sequences in a step: a pure function of its arguments."""
    generator = torch.Generator().manual_seed(_mix(seed, step))
    mean = curriculum.mean(float(sampling.mean_loops), step / max(1, num_steps))
    size = batch if sampling.per == "sequence" else 1
    drawn = sampling.draw(size, mean, generator).round()
    loops = drawn.clamp(sampling.min_loops, sampling.max_loops)
    return loops.long().expand(batch).contiguous()


def _mix(seed: int, step: int) -> int:
    """One 63-bit seed from two numbers, so that neighbouring seeds and steps share no draws."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step + 1) & 0xFFFFFFFFFFFFFFFF
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (mixed ^ (mixed >> 31)) >> 1
