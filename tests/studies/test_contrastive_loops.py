"""contrastive-loops: the rule on made-up runs."""

from typing import Any

import pytest
from studies.made_up import run_of

from openmythos.inference.contrast import LoopContrast
from openmythos.studies import contrastive_loops as study
from openmythos.studies.study import RunResult


def runs(
    default: float = 0.01, others: float = 0.01, nats: float = -0.1, used: float = 0.5
) -> list[RunResult]:
    """What contrasts add to the share right, with 0.001 of noise by seed, and to the loss."""

    def curve(seed: int) -> dict[str, Any]:
        noise = 0.001 * seed
        found = {study.PLAIN: [4.0, 0.3], "1 loop alone": [4.0 + used, 0.2]}
        found |= {name: [4.0 + nats, 0.3 + others + noise] for name in study.contrasts()}
        found[study.CHOSEN] = [4.0 + nats, 0.3 + default + noise]
        return found

    return [run_of(study.TEXT, curve(s), s) for s in (0, 1, 2)]


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "holds"),
        ({"nats": 0.1}, "holds in part"),
        ({"nats": 0.1, "others": 0.0}, "does not hold here"),
        ({"default": -0.001}, "does not hold here"),  # its interval includes 0
        ({"used": 0.05}, "premise not met"),
    ],
)
def test_a_contrast_must_raise_what_is_right(changes: Any, verdict: str) -> None:
    finding = study.judge(runs(**changes))
    assert finding.verdict == verdict, finding.sentence
    assert len(finding.table) == 2 + len(study.contrasts())
    assert len(f"{study.STUDY.headline} {finding.brief}".split()) <= 25


def test_the_default_is_one_of_the_contrasts() -> None:
    assert study.contrasts()[study.CHOSEN] == LoopContrast(cap=1.0, early=1)
    assert len(study.contrasts()) == 12
