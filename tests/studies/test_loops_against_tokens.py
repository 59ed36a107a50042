"""loops-against-tokens: the verdict of made-up runs, and how answers are read and priced."""

from typing import Any

import pytest
import torch
from studies.made_up import two_runs

from openmythos import OpenMythos
from openmythos.planning import cost
from openmythos.studies import loops_against_tokens as study
from openmythos.studies.study import RunResult

ARMS = {arm.name: arm for arm in study.arms()}


def runs(
    loops: float = 0.99,
    tokens: float = 1.0,
    neither: float = 0.1,
    times: tuple[float, float] = (10.0, 100.0),
    flops: float = 1.0,
) -> list[RunResult]:
    """Tokens take 40 ms at batch 1 and 200 at 64."""
    shares = {study.LOOPS: loops, study.ALONE: 0.9, study.TOKENS: tokens, study.NEITHER: neither}
    found = []
    for name, share in shares.items():
        one, many = times if name == study.LOOPS else (40.0, 200.0)
        curve: dict[str, Any] = {
            "accuracy": {str(hops): share for hops in study.HOPS},
            "milliseconds": {"1": one, "64": many},
            "flops": flops if name == study.LOOPS else 1.0,
        }
        found += two_runs(name, curve)
    return found


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "holds"),
        ({"flops": 4.0}, "holds in part"),
        ({"flops": 4.0, "times": (10.0, 300.0)}, "holds in part"),
        ({"flops": 4.0, "times": (30.0, 300.0)}, "does not hold here"),
        ({"loops": 0.9}, "does not hold here"),
        ({"loops": 0.96}, "does not hold here"),  # within 2 points of what tokens reach
        ({"tokens": 0.9}, "premise not met"),
        ({"neither": 0.5}, "premise not met"),
    ],
)
def test_loops_must_answer_what_tokens_do_for_less(changes: Any, verdict: str) -> None:
    finding = study.judge(runs(**changes))
    assert finding.verdict == verdict, finding.sentence
    assert len(finding.table) == len(ARMS)
    assert len(f"{study.STUDY.headline} {finding.brief}".split()) <= 21  # a row of the README


def test_models_are_of_about_equal_size() -> None:
    counts = {name: cost.parameters(arm.model).total for name, arm in ARMS.items()}
    assert max(counts.values()) < 1.05 * min(counts.values())
    assert counts[study.TOKENS] == counts[study.NEITHER]


@torch.no_grad()
def test_a_written_answer_is_that_of_reading_what_was_written() -> None:
    """Decoding with a cache, against full passes over the tokens so far."""
    arm = ARMS[study.TOKENS]
    model = OpenMythos(arm.model, seed=0).eval()
    batch = arm.task.sample(5, 4, torch.Generator().manual_seed(0))
    tokens = arm.task.prompts(batch)  # type: ignore[union-attr]
    for _ in range(4):
        following = model(tokens, num_loops=1).logits[:, -1].argmax(dim=-1)
        tokens = torch.cat((tokens, following[:, None]), dim=1)
    assert study.answer(model, arm.task, batch, 4).equal(tokens[:, -1])


def test_every_token_that_is_read_is_paid_for() -> None:
    loops, tokens = (study.flops(ARMS[name], study.MOST) for name in (study.LOOPS, study.TOKENS))
    # 21 tokens through 22 layers, and 41 tokens through 3; the injection and heads are the rest.
    assert loops / tokens == pytest.approx(21 * 22 / (41 * 3), rel=0.1)
