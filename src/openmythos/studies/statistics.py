"""Means, intervals, paired differences and success counts, as studies print them."""

import math
import statistics
from collections.abc import Mapping, Sequence

from scipy.special import bdtr, betaincinv, stdtrit


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of the 95% interval by Student's t; one value has none (nan)."""
    if len(values) < 2:
        return values[0], math.nan
    quantile = float(stdtrit(len(values) - 1, 0.975))
    return statistics.mean(values), quantile * statistics.stdev(values) / len(values) ** 0.5


def plus_minus(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    """Numbers as "3.141 ± 0.027"."""
    mean, half = mean_and_half_width(values)
    text = f"{mean:{sign}.{digits}f}"
    return text if math.isnan(half) else f"{text} ± {half:.{digits}f}"


def percent(values: Sequence[float]) -> str:
    """Shares in percent: "97.3 ± 1.2", or "82.0 (10.1 to 100.0)" if that would leave 0 to 100."""
    mean, half = mean_and_half_width([100 * value for value in values])
    if half > min(mean, 100 - mean) and half > 0:
        return f"{mean:.1f} ({100 * min(values):.1f} to {100 * max(values):.1f})"
    return plus_minus([100 * value for value in values], digits=1)


def differs(values: Sequence[float]) -> bool:
    """Whether the 95% interval of the mean of paired differences excludes 0.

    A single difference has no interval: then never.
    """
    mean, half = mean_and_half_width(values)
    return abs(mean) > half


def below(values: Sequence[float], bar: float = 0.0) -> bool:
    """Whether the mean and its whole 95% interval are below the bar; never of a single value."""
    mean, half = mean_and_half_width(values)
    return mean + half < bar


def above(values: Sequence[float], bar: float = 0.0) -> bool:
    """Whether the mean and its whole 95% interval are above the bar; never of a single value."""
    return below([-value for value in values], -bar)


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> list[float]:
    """first - second of every seed that both have, by seed."""
    return [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]


def clopper_pearson(successes: int, trials: int) -> tuple[float, float]:
    """The exact 95% interval of a success rate (Clopper and Pearson 1934)."""
    low = float(betaincinv(successes, trials - successes + 1, 0.025)) if successes else 0.0
    high = (
        float(betaincinv(successes + 1, trials - successes, 0.975)) if successes < trials else 1.0
    )
    return low, high


def mcnemar(pairs: Sequence[tuple[bool, bool]]) -> float:
    """Two-sided p of the exact McNemar test that two methods are right equally often.

    `pairs`: for each problem, whether the first and whether the second is right.
    """
    first, second = pairs.count((True, False)), pairs.count((False, True))
    return min(1.0, 2 * float(bdtr(min(first, second), first + second, 0.5)))


def succeeded(values: Sequence[float], bar: float) -> str:
    """How many values reach the bar, such as "4 of 5 (28 to 99%)"."""
    count = sum(value >= bar for value in values)
    low, high = clopper_pearson(count, len(values))
    return f"{count} of {len(values)} ({100 * low:.0f} to {100 * high:.0f}%)"
