"""capacity-and-manipulation: the rule on made-up runs, and bits of a known loss."""

import math
from typing import Any

import pytest
from studies.made_up import two_runs

from openmythos.planning import cost
from openmythos.studies import capacity_and_manipulation as study
from openmythos.studies.study import RunResult

ARMS = {arm.name: arm for arm in study.arms()}


def runs(
    nats: tuple[float, float, float] = (2.0, 2.0, 2.0),
    hops: tuple[float, float, float] = (0.3, 0.95, 0.9),
    held: float = 0.6,
    known: float = 1.0,
) -> list[RunResult]:
    """Of one layer once, looped, and 4 layers; all with as many parameters."""
    found = []
    for place, shape in enumerate(study.SHAPES):
        curves: dict[str, dict[str, Any]] = {
            "facts": {"nats": nats[place], "facts": held},
            "chains": {"nats": 0.1, "facts": known, "two_hops": hops[place]},
        }
        for task, curve in curves.items():
            found += two_runs(study.name_of(task, *shape), curve, parameters=20_000)
    return found


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "holds"),
        ({"nats": (2.0, 2.0, 1.0)}, "holds in part"),
        ({"nats": (2.0, 1.0, 1.0)}, "does not hold here"),
        ({"hops": (0.8, 0.95, 0.9)}, "does not hold here"),
        ({"held": 0.95}, "premise not met"),
        ({"known": 0.9}, "premise not met"),
    ],
)
def test_loops_must_combine_and_not_hold_more(changes: Any, verdict: str) -> None:
    finding = study.judge(runs(**changes))
    assert finding.verdict == verdict, finding.sentence
    assert len(finding.table) == len(ARMS)
    assert len(f"{study.STUDY.headline} {finding.brief}".split()) <= 25


def test_bits_are_what_the_loss_is_below_guessing() -> None:
    (one, *_) = runs(nats=(math.log(100), 0, 0))
    assert study.bits(one) == pytest.approx(0, abs=1e-9)
    (one, *_) = runs(nats=(math.log(50), 0, 0))  # one bit of each fact
    assert study.bits(one) == pytest.approx(10_000 / 20_000)


def test_there_are_more_facts_than_parameters_for_them() -> None:
    counts = {name: cost.parameters(arm.model).total for name, arm in ARMS.items()}
    assert counts["facts, 1 x 1"] == counts["facts, 1 x 4"] < counts["facts, 4 x 1"]
    assert 10_000 * math.log2(100) > 2 * counts["facts, 1 x 1"]
