"""linear-frontier: the rule on made-up runs, and a frontier that is known."""

from typing import Any

import pytest
import torch
from studies.made_up import two_runs

from openmythos.studies import linear_frontier as study
from openmythos.studies.study import RunResult

ARMS = {arm.name: arm for arm in study.arms()}


def runs(
    speed: float = 1.0, halted: float = 1.0, fits: float = 1.0, bend: float = 0.0
) -> list[RunResult]:
    """Every arm's frontier moves at `speed` times what training asks for."""
    found = []
    for name in ARMS:
        v = speed * study.predicted(name)
        frontier = {n: min(60.0, v * n + bend * (n % 2) * n) for n in study.MEASURED}
        right = {h: dict.fromkeys(study.MEASURED, halted) for h in study.ASKED}
        right[study.TRAINED] = dict.fromkeys(study.MEASURED, fits)
        curve: dict[str, Any] = {
            "frontier": {str(n): x for n, x in frontier.items()},
            "right": {str(h): {str(n): x for n, x in row.items()} for h, row in right.items()},
        }
        found += two_runs(name, curve)
    return found


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "holds"),
        ({"speed": 1.2}, "holds"),
        ({"halted": 0.9}, "holds in part"),
        ({"speed": 1.4}, "does not hold here"),
        ({"bend": 2.0}, "does not hold here"),
        ({"fits": 0.9}, "premise not met"),
    ],
)
def test_the_speed_must_be_that_of_training(changes: Any, verdict: str) -> None:
    finding = study.judge(runs(**changes))
    assert finding.verdict == verdict, finding.sentence
    assert len(finding.table) == len(ARMS)
    assert len(f"{study.STUDY.headline} {finding.brief}".split()) <= 25


def test_a_line_is_fitted_where_the_frontier_moves() -> None:
    (one, *_) = runs()
    assert study.line(one) == pytest.approx((1.5, 1.0))  # up to 40 loops, not the flat rest
    for n in study.MEASURED:
        one.curve["frontier"][str(n)] = 0.0
    assert study.line(one) == (0.0, 0.0)


def test_a_frontier_ends_at_the_first_hop_that_is_not_solved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stand-in solves n hops after n loops, and one beyond a gap that does not count."""
    arm = ARMS["12 loops in training"]

    def answers(_: Any, tokens: torch.Tensor, loops: Any, **__: Any) -> dict[int, torch.Tensor]:
        batch = arm.task.sample(20, 6, torch.Generator().manual_seed(study.ASKED_SEED))
        assert batch.tokens.equal(tokens)
        found = {}
        for n in loops:
            given = batch.targets.clamp_min(0)
            given[:, 1 + n : 6] = -1
            one_hot = torch.zeros(*given.shape, arm.task.vocab_size)
            known = given >= 0
            one_hot[known] = torch.eye(arm.task.vocab_size)[given[known]]
            one_hot[~known, -1] = 1.0
            found[n] = one_hot
        return found

    class Model:
        device = torch.device("cpu")

        def eval(self) -> "Model":
            return self

    monkeypatch.setattr(study, "logits_by_loops", answers)
    found = study.measure(Model(), arm, True)  # type: ignore[arg-type]
    assert found["frontier"] == {"1": 1.0, "2": 2.0, "3": 3.0}
    assert found["right"]["2"] == {"1": 0.0, "2": 1.0, "3": 1.0}
