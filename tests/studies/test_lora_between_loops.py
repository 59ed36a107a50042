"""lora-between-loops: the rule on made-up runs, and what full rank means."""

from typing import Any

import pytest
from studies.made_up import run_of

from openmythos.planning import cost
from openmythos.studies import lora_between_loops as study
from openmythos.studies.study import RunResult

ARMS = {arm.name: arm for arm in study.arms()}


def runs(
    full: tuple[float, float] = (3.8, 3.81),
    eight: float = 3.88,
    four: float = 3.95,
    deep: float = 0,
) -> list[RunResult]:
    """Shared weights have a loss of 4.0 and 4.01 nats."""
    losses = {0: (4.0, 4.01), 4: (four, four), 8: (eight, eight + 0.01), study.FULL: full}
    return [
        run_of(
            study.name_of(rank),
            {str(n): own[seed] + deep * (n > 4) for n in study.LOOPS},
            seed,
            parameters=1000 + 10 * rank,
        )
        for rank, own in losses.items()
        for seed in (0, 1)
    ]


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "holds"),
        ({"deep": 0.05}, "holds in part"),
        ({"four": 3.8}, "holds in part"),
        ({"eight": 3.95}, "does not hold here"),
        ({"full": (4.1, 4.11)}, "premise not met"),
        ({"full": (3.8, 4.0)}, "premise not met"),  # in the mean, but not surely
    ],
)
def test_where_sharing_costs_something_rank_8_must_win_it_back(changes: Any, verdict: str) -> None:
    finding = study.judge(runs(**changes))
    assert finding.verdict == verdict, finding.sentence
    assert len(finding.table) == len(ARMS)
    assert len(f"{study.STUDY.headline} {finding.brief}".split()) <= 25


def test_full_rank_is_the_width_of_the_model() -> None:
    counts = {name: cost.parameters(arm.model).total for name, arm in ARMS.items()}
    own, shared = counts["full rank"], counts["shared weights"]
    assert ARMS["full rank"].model.dim == study.FULL
    # Of a map from a to b features, 96 (a + b) weights per loop: all of any change, and more.
    assert own - shared > 4 * (4 * 96**2 + 3 * 96 * 256)
