"""Runs that never were, for the tests of verdict rules."""

from collections.abc import Mapping
from typing import Any

from openmythos.studies import depth_extrapolation
from openmythos.studies.study import RunResult


def run_of(
    arm: str,
    curve: Mapping[str, Any],
    seed: int = 0,
    *,
    rate: float = 1e-3,
    parameters: int = 1000,
    flops: float = 1.0,
) -> RunResult:
    """A run of one second that found this curve."""
    settings = {"train": {"optimizer": {"lr": rate}}}
    return RunResult(arm, seed, settings, curve, parameters, flops, 1.0, "")


def two_runs(arm: str, curve: Mapping[str, Any], *, parameters: int = 1000) -> list[RunResult]:
    """The same curve with seeds 0 and 1."""
    return [run_of(arm, curve, seed, parameters=parameters) for seed in (0, 1)]


def chain_runs(later: float = 0.0, **changes: float) -> list[RunResult]:
    """Runs of depth-extrapolation: all is solved but what layers were not trained on.

    `changes` are shares by arm and hops, as `to_5_10`; `later` is lost with three times the loops.
    """
    found = []
    for name in (arm.name for arm in depth_extrapolation.arms()):
        shares = dict.fromkeys(depth_extrapolation.HOPS, 1.0)
        if "layers" in name:
            shares = {n: float(n <= depth_extrapolation.LEARNED[name]) for n in shares}
        for key, value in changes.items():
            arm, hops = key.rsplit("_", 1)
            if getattr(depth_extrapolation, arm.upper()) == name:
                shares[int(hops)] = value
        curve = {
            "right": {str(n): share for n, share in shares.items()},
            "later": {str(n): share - later for n, share in shares.items()},
        }
        found += two_runs(name, curve)
    return found
