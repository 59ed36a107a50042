"""Runs that never were, for the tests of verdict rules."""

from collections.abc import Mapping
from typing import Any

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
