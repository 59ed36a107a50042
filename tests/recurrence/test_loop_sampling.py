"""Loop counts of a training step: pure, within bounds, with the promised means."""

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from openmythos.config import ConfigError
from openmythos.recurrence.loop_sampling import (
    FixedLoops,
    Granularity,
    LinearCurriculum,
    LogNormalPoissonLoops,
    LoopCurriculum,
    LoopSampling,
    NoCurriculum,
    PoissonLoops,
    UniformLoops,
    sample_loops,
)

SAMPLINGS = [
    replace(cls(), per=per) for cls in get_args(LoopSampling) for per in get_args(Granularity)
]
CURRICULA = [cls() for cls in get_args(LoopCurriculum)]
RANDOM = [s for s in SAMPLINGS if not isinstance(s, FixedLoops)]
every_sampling = pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
every_random_sampling = pytest.mark.parametrize("sampling", RANDOM, ids=str)
NONE = NoCurriculum()


def draw(
    sampling: LoopSampling,
    curriculum: LoopCurriculum = NONE,
    *,
    batch: int = 8,
    seed: int = 0,
    step: int = 0,
    num_steps: int = 100,
) -> Tensor:
    return sample_loops(
        sampling, curriculum, batch=batch, seed=seed, step=step, num_steps=num_steps
    )


@every_sampling
@pytest.mark.parametrize("curriculum", CURRICULA, ids=lambda c: c.kind)
@given(st.integers(0, 2**63), st.integers(0, 10**9), st.integers(1, 17))
def test_a_draw_is_a_pure_function_within_bounds(
    sampling: LoopSampling, curriculum: LoopCurriculum, seed: int, step: int, batch: int
) -> None:
    before = torch.get_rng_state()
    loops = draw(sampling, curriculum, batch=batch, seed=seed, step=step, num_steps=10**9)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    again = draw(sampling, curriculum, batch=batch, seed=seed, step=step, num_steps=10**9)
    assert torch.equal(loops, again)
    assert loops.shape == (batch,) and loops.dtype == torch.long
    assert loops.min() >= max(1, sampling.min_loops) and loops.max() <= sampling.max_loops


@every_sampling
def test_one_number_per_batch_or_one_per_sequence(sampling: LoopSampling) -> None:
    draws = torch.stack([draw(sampling, batch=16, step=step) for step in range(50)])
    differing = (draws != draws[:, :1]).any(dim=1)
    if sampling.per == "batch" or isinstance(sampling, FixedLoops):
        assert not differing.any()
    else:
        assert differing.all()
    if not isinstance(sampling, FixedLoops):
        assert len(draws[:, 0].unique()) > 2


@every_random_sampling
def test_neighbouring_seeds_and_steps_share_no_draws(sampling: LoopSampling) -> None:
    """Neither the same stream shifted by a step nor a correlated one."""
    long = {"batch": 1} if sampling.per == "batch" else {"batch": 64}
    streams = torch.stack(
        [
            torch.cat([draw(sampling, seed=seed, step=step, **long) for step in range(64)])
            for seed in range(6)
        ]
    ).double()
    size = long["batch"]
    for shift in range(3):
        ours = streams[:, : streams.shape[1] - shift * size]
        theirs = streams[:, shift * size :]
        correlation = torch.corrcoef(torch.cat((ours, theirs)))[:6, 6:]
        if shift == 0:
            correlation = correlation - torch.eye(6)
        # Six standard deviations of chance.
        assert correlation.abs().max() < 6 / ours.shape[1] ** 0.5


@pytest.mark.parametrize(
    "sampling, mean, variance",
    [
        (FixedLoops(mean_loops=5), 5, 0),
        (UniformLoops(min_loops=2, max_loops=9), 5.5, 63 / 12),
        (PoissonLoops(mean_loops=6.0, max_loops=100), 6, 6),
        (
            LogNormalPoissonLoops(mean_loops=6.0, max_loops=1000),
            6,
            6 + 36 * math.expm1(0.25),
        ),
    ],
    ids=str,
)
def test_moments(sampling: LoopSampling, mean: float, variance: float) -> None:
    assert sampling.mean_loops == mean
    size = 40_000
    loops = draw(replace(sampling, per="sequence"), batch=size).double()
    # Clipping at one loop moves the mean by P(0) = e^-6 at most, and by more for small rates.
    assert abs(loops.mean() - mean) < 5 * (variance / size) ** 0.5 + 0.03
    assert loops.var() == pytest.approx(variance, rel=0.08)


def test_uniform_reaches_both_ends_equally() -> None:
    counts = draw(UniformLoops(min_loops=3, max_loops=6), batch=4000).bincount()
    assert counts[:3].sum() == 0 and len(counts) == 7
    assert ((counts[3:] - 1000).abs() < 150).all()


def test_poisson_is_clipped_at_both_ends() -> None:
    loops = draw(PoissonLoops(mean_loops=4.0, min_loops=3, max_loops=5), batch=500)
    assert loops.unique().tolist() == [3, 4, 5]


def test_a_batch_draw_has_the_same_distribution() -> None:
    sampling = PoissonLoops(mean_loops=6.0, max_loops=100, per="batch")
    loops = torch.stack([draw(sampling, batch=1, step=step)[0] for step in range(3000)]).double()
    assert abs(loops.mean() - 6) < 5 * (6 / 3000) ** 0.5 + 0.03


def test_a_linear_curriculum_raises_the_mean_and_then_holds_it() -> None:
    curriculum = LinearCurriculum(start_loops=2.0, fraction=0.5)
    means = [curriculum.mean(10.0, progress) for progress in (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)]
    assert means == [2, 4, 6, 10, 10, 10]
    for sampling in (
        PoissonLoops(mean_loops=10.0, max_loops=100),
        LogNormalPoissonLoops(mean_loops=10.0, max_loops=1000),
        UniformLoops(min_loops=1, max_loops=19),
    ):
        for step, mean in ((0, 2), (12, 3.92), (25, 6), (50, 10), (99, 10)):
            loops = draw(sampling, curriculum, batch=20_000, step=step).double()
            # Clipping at one loop lifts small means by at most the chance of zero loops.
            assert abs(loops.mean() - mean) < (0.35 if mean < 4 else 0.2), (sampling, step)


def test_a_curriculum_moves_fixed_loops_too() -> None:
    curriculum = LinearCurriculum(start_loops=1.0, fraction=1.0)
    sampling = FixedLoops(mean_loops=8)
    seen = [int(draw(sampling, curriculum, step=step, num_steps=70)[0]) for step in range(71)]
    assert seen[0] == 1 and seen[-1] == 8
    assert seen == sorted(seen) and set(seen) == set(range(1, 9))


def test_no_curriculum_keeps_the_mean() -> None:
    assert [NONE.mean(7.0, progress) for progress in (0.0, 0.5, 1.0)] == [7, 7, 7]


def test_all_ranks_know_the_global_batch() -> None:
    """A rank draws for all and takes its share: the same numbers on every rank."""
    whole = draw(PoissonLoops(), batch=12, seed=3, step=9)
    shares = [draw(PoissonLoops(), batch=12, seed=3, step=9)[rank::4] for rank in range(4)]
    assert torch.equal(torch.stack(shares, dim=1).flatten(), whole)


@pytest.mark.parametrize(
    "cls, fields, message",
    [
        (FixedLoops, {"mean_loops": 0}, "mean_loops = 0: must be an integer, at least 1"),
        (UniformLoops, {"min_loops": 0}, "min_loops = 0: must be an integer, at least 1"),
        (UniformLoops, {"min_loops": 5, "max_loops": 4}, "max_loops = 4: must be .* at least 5"),
        (PoissonLoops, {"mean_loops": 17.0}, "mean_loops = 17.0: must lie between min_loops = 1"),
        (PoissonLoops, {"mean_loops": 0.5}, "mean_loops = 0.5: must lie between"),
        (LogNormalPoissonLoops, {"sigma": 0.0}, "sigma = 0.0: must be a number, above 0"),
        (LogNormalPoissonLoops, {"max_loops": 0}, "max_loops = 0: must be an integer, at least 1"),
        (LinearCurriculum, {"start_loops": 0.5}, "start_loops = 0.5: must be .* at least 1"),
        (
            LinearCurriculum,
            {"start_loops": 1e39},
            "start_loops = 1e.39: must be .* at most 1000000",
        ),
        (PoissonLoops, {"max_loops": 10**26}, "max_loops = 10+: must be .* at most 1000000"),
        (LinearCurriculum, {"fraction": 0.0}, "fraction = 0.0: must be a number, above 0"),
    ],
)
def test_impossible_settings_are_refused(cls: type, fields: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cls(**fields)
