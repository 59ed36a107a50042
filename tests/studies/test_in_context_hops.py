"""in-context-hops: the rule on made-up runs."""

from typing import Any

import pytest
from studies.made_up import two_runs

from openmythos.planning import cost
from openmythos.studies import in_context_hops as study
from openmythos.studies.study import RunResult

ARMS = {arm.name: arm for arm in study.arms()}


def runs(**changes: float) -> list[RunResult]:
    """All is solved within training, and beyond by the loop; `changes` by arm and hops."""
    found = []
    for name in ARMS:
        shares = {h: float(h <= study.TRAINED or name == study.LOOPED) for h in study.HOPS}
        for key, value in changes.items():
            arm, hops = key.split("_")
            if name.startswith(arm):
                shares[int(hops)] = value
        curve: dict[str, Any] = {str(h): x for h, x in shares.items()}
        found += two_runs(name, curve)
    return found


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "holds"),
        ({"12 layers_8": 0.5}, "holds in part"),
        ({"looped_8": 0.8}, "does not hold here"),
        ({"12 layers_5": 0.9}, "premise not met"),
        ({"looped_5": 0.9}, "premise not met"),
        ({"3 layers, equal parameters_5": 0.2}, "holds"),
    ],
)
def test_the_loop_must_go_further_from_an_equal_fit(changes: Any, verdict: str) -> None:
    finding = study.judge(runs(**changes))
    assert finding.verdict == verdict, finding.sentence
    assert len(finding.table) == len(ARMS)
    assert len(f"{study.STUDY.headline} {finding.brief}".split()) <= 25


def test_three_layers_have_the_parameters_of_the_loop() -> None:
    counts = {name: cost.parameters(arm.model).total for name, arm in ARMS.items()}
    assert counts[study.EQUAL] == pytest.approx(counts[study.LOOPED], rel=0.02)
    assert study.MORE > study.DRAWN.max_loops > study.TRAINED
