"""ltg-as-published: the rule on made-up runs, and the paper's recipe."""

from typing import Any

import pytest
import torch
from studies.made_up import two_runs

from openmythos.studies import ltg_as_published as study
from openmythos.studies.study import RunResult


def runs(learned: int = 6, beyond: float = 0.95, once: float = 0.1) -> list[RunResult]:
    def curve(name: str) -> dict[str, Any]:
        if name == study.ONCE:
            return {str(h): {"1": once} for h in study.HOPS}
        return {
            str(h): {
                str(n): 1.0 if h <= learned else beyond * (n > study.MOST) for n in study.LOOPS
            }
            for h in study.HOPS
        }

    return [run for name in (study.LOOPED, study.ONCE) for run in two_runs(name, curve(name))]


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "holds"),
        ({"once": 0.5}, "holds in part"),
        ({"learned": 5}, "does not hold here"),
        ({"beyond": 0.8}, "does not hold here"),
        ({"learned": 2}, "premise not met"),
    ],
)
def test_it_must_learn_and_go_further(changes: Any, verdict: str) -> None:
    finding = study.judge(runs(**changes))
    assert finding.verdict == verdict, finding.sentence
    assert len(f"{study.STUDY.headline} {finding.brief}".split()) <= 25


def test_the_recipe_is_the_papers() -> None:
    run = study.arms()[0].run
    assert run.model.attention.position == "none"  # type: ignore[union-attr]
    assert run.model.injection.kind == "none" and run.model.zero_init_outputs
    batch = study.TASK.sample(4, 3, torch.Generator().manual_seed(0))
    assert batch.tokens.shape == (4, study.LONGEST + 2)
    assert (batch.targets != -100).sum() == 4  # the answer alone
