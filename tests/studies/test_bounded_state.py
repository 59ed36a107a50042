"""bounded-state: the rule on made-up runs, and what counts as failing."""

import math
from typing import Any

import pytest
from studies.made_up import run_of

from openmythos import OpenMythos
from openmythos.analysis.stability import spectral_radius
from openmythos.planning import cost
from openmythos.studies import bounded_state as study
from openmythos.studies.study import RunResult

ARMS = {arm.name: arm for arm in study.arms()}


def run(name: str, seed: int = 0, **changes: Any) -> RunResult:
    curve: dict[str, Any] = {
        "fp32": {"8": 5.0, "64": 5.0 + changes.get("rise", 0.0)},
        "bf16": {"8": 5.0, "64": 5.0 + changes.get("rise_bf16", 0.0)},
        "state": {"8": 2.0, "64": changes.get("size", 2.0)},
        "radius": changes.get("radius", 0.9),
        "spikes": 0,
        "not_finite": 0,
    }
    return run_of(name, curve, seed, rate=float(ARMS[name].factors["rate"]))


def runs(concat: dict[str, Any], lti: dict[str, Any]) -> list[RunResult]:
    changes = {study.CONCAT: concat, study.LTI_: lti}
    return [
        run(name, seed, **changes.get(arm.factors["injection"], {}))
        for name, arm in ARMS.items()
        for seed in (0, 1)
    ]


@pytest.mark.parametrize(
    ("concat", "lti", "verdict"),
    [
        ({"radius": 1.2}, {}, "holds"),
        ({"size": None}, {}, "holds"),
        ({"rise_bf16": 0.2}, {}, "holds"),
        ({}, {}, "holds in part"),
        ({"radius": 1.2}, {"size": 4.0}, "does not hold here"),
        ({"radius": 1.2}, {"rise_bf16": 0.03}, "does not hold here"),
    ],
)
def test_lti_must_stay_and_concat_must_not(concat: Any, lti: Any, verdict: str) -> None:
    finding = study.judge(runs(concat, lti))
    assert finding.verdict == verdict, finding.sentence
    assert len(finding.table) == len(ARMS)
    assert len(f"{study.STUDY.headline} {finding.brief}".split()) <= 25


def test_a_failure_far_above_the_best_rate_does_not_count() -> None:
    """Concat is best at 1e-3, so that what it does at 16 times that rate is no evidence."""
    made = [
        run(one.arm, one.seed, radius=1.5) if one.arm == "concat, 0.016" else one
        for one in runs({}, {})
    ]
    assert study.judge(made).verdict == "holds in part"
    assert math.isinf(study.growth(run("add, 0.001", size=None)))


def test_injections_start_alike_where_they_say_so() -> None:
    radii = {
        name: spectral_radius(
            OpenMythos(ARMS[study.name_of(name, 4e-3)].model, seed=0).recurrent.injection
        )
        for name in study.INJECTIONS
    }
    for name in (study.LTI_, study.FREE, study.EYE):
        assert radii[name] == pytest.approx(study.START, abs=1e-5)
    assert radii[study.ADD] == 1.0 and radii[study.CONCAT] != pytest.approx(study.START, abs=1e-3)
    counts = {name: cost.parameters(arm.model).total for name, arm in ARMS.items()}
    assert counts["concat, 0.001"] - counts["add, 0.001"] == 2 * 96**2
