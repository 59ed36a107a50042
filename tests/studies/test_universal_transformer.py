"""universal-transformer: the rule on made-up runs."""

from typing import Any

import pytest
from studies.made_up import two_runs

from openmythos.studies import universal_transformer as study
from openmythos.studies.study import RunResult

ARMS = {arm.name: arm for arm in study.arms()}


def runs(
    fits: float = 1.0, far: float = 0.95, rise: float = 3.0, without: float = 0.95
) -> list[RunResult]:
    """Of the Universal Transformer; the loops of ACT rise evenly with the letters."""
    found = []
    for name, arm in ARMS.items():
        beyond = {study.UT: far, study.NO_ACT: without}.get(arm.factors["model"], 0.5)
        right = {n: fits if n <= study.TRAINED else beyond for n in study.LENGTHS}
        loops = {n: 4 + rise * (n - 2) / 18 for n in study.LENGTHS}
        curve: dict[str, Any] = {
            "right": {str(n): x for n, x in right.items()},
            "loops": {str(n): x for n, x in loops.items()},
        }
        found += two_runs(name, curve)
    return found


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "holds"),
        ({"rise": 1.0}, "holds in part"),
        ({"without": 1.0, "far": 0.91}, "holds in part"),
        ({"rise": 1.0, "without": 1.0, "far": 0.91}, "does not hold here"),
        ({"far": 0.8}, "does not hold here"),
        ({"fits": 0.9}, "premise not met"),
    ],
)
def test_it_must_go_further_and_halt_later(changes: Any, verdict: str) -> None:
    finding = study.judge(runs(**changes))
    assert finding.verdict == verdict, finding.sentence
    assert len(finding.table) == len(ARMS)
    assert len(f"{study.STUDY.headline} {finding.brief}".split()) <= 25


def test_models_differ_in_one_thing_at_a_time() -> None:
    act, bare, lti, _ = (
        ARMS[study.name_of("parity", m)].model
        for m in (study.UT, study.NO_ACT, study.LTI_, study.LAYERS)
    )
    assert act.halting.kind == "act" and bare.halting.kind == "none"
    assert act.injection == bare.injection and lti.injection.kind == "lti"
    assert act.attention == bare.attention == lti.attention
