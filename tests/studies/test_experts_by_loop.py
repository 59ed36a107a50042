"""The rule of the study on the experts of every loop, and its controls."""

from typing import Any

import pytest
from studies.made_up import run_of

from openmythos.planning import cost
from openmythos.studies import experts_by_loop as routing
from openmythos.studies.study import Arm, Finding, RunResult


def test_distinct_experts_are_judged_by_what_they_are_worth() -> None:
    def judged(nats: float = 0.1, points: float = 0.5, dense: float = 4.2, **rest: Any) -> Finding:
        def run(arm: Arm, seed: int) -> RunResult:
            noise = 0.01 * seed
            if "dense" in arm.name:
                curve: dict[str, Any] = {"score": {"as chosen": dense + noise}}
            else:
                base, forced = (
                    (0.9, 0.9 - points) if arm.name == routing.HOPS else (4.0, 4.0 + nats)
                )
                score = {"as chosen": base, "first loop's": forced, "previous loop's": base}
                curve = {"score": score, "distinct": {"2": 1.2, "4": 1.5, "8": 1.7}}
                curve |= {"jaccard": 0.6, "max_violation": 0.1, "max_violation_by_loop": [0.1, 0.4]}
            return run_of(arm.name, curve | (rest if nats else {}), seed)

        return routing.judge([run(arm, seed) for arm in routing.arms() for seed in (0, 1)])

    assert judged().verdict == "holds"
    assert judged(nats=0.01).verdict == "does not hold here"
    assert judged(points=0.1).verdict == "does not hold here"
    assert judged(dense=3.99).verdict == "holds in part"
    assert judged(max_violation_by_loop=[0.1, 0.6]).verdict == "holds in part"


def test_dense_controls_are_of_the_active_and_of_the_whole_size() -> None:
    counts = {arm.name: cost.parameters(arm.model) for arm in routing.arms()}
    shared = counts[routing.SHARED]
    assert counts[routing.ACTIVE].total == pytest.approx(shared.active, rel=0.05)
    assert counts[routing.TOTAL].total == pytest.approx(shared.total, rel=0.05)
