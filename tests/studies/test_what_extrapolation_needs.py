"""what-extrapolation-needs: the rule on made-up runs."""

from typing import Any

import pytest
from studies.made_up import run_of

from openmythos.studies import what_extrapolation_needs as study
from openmythos.studies.study import RunResult

ARMS = {arm.name: arm for arm in study.arms()}


def run(name: str, seed: int, first: int, last: float = 1.0) -> RunResult:
    """All is right from that snapshot of ten on, and `last` at the end."""

    def found(share: float) -> dict[str, Any]:
        return {str(h): {"12": share, "80": share / 2} for h in study.HOPS}

    steps = {str(n): found(last if n >= first else 0.1) for n in range(1, 11)}
    return run_of(name, found(last) | {"by_step": steps}, seed)


def runs(lti: int = 3, others: int = 7, full: float = 0.5) -> list[RunResult]:
    found = []
    for name in ARMS:
        first, last = (lti if name == study.LTI_ else others), 1.0
        if "full" in name:
            first, last = 10, full
        found += [run(name, seed, first, last) for seed in (0, 1)]
    return found


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "holds"),
        ({"others": 11}, "holds"),  # never
        ({"full": 0.8}, "holds in part"),
        ({"others": 5}, "does not hold here"),
        ({"lti": 11}, "premise not met"),
    ],
)
def test_lti_must_be_twice_as_fast_and_locality_needed(changes: Any, verdict: str) -> None:
    finding = study.judge(runs(**changes))
    assert finding.verdict == verdict, finding.sentence
    assert len(finding.table) == len(ARMS)
    assert len(f"{study.STUDY.headline} {finding.brief}".split()) <= 25


def test_a_bar_is_reached_for_good() -> None:
    one = run(study.LTI_, 0, 3)
    assert study.soon(one) == 3 and study.overthinks(one) == 0.5
    one.curve["by_step"]["5"]["20"]["12"] = 0.9
    assert study.soon(one) == 6
