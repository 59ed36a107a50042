"""inside-the-loop: the rule on made-up runs, and a swap that does what it says."""

from typing import Any

import pytest
import torch
from studies.made_up import two_runs

from openmythos import OpenMythos
from openmythos.studies import inside_the_loop as study
from openmythos.studies.study import RunResult


def runs(
    known: float = 1.0,
    bridge: float = 0.95,
    flips: float = 0.9,
    fixed: float = 0.5,
    drawn: float = 1.0,
) -> list[RunResult]:
    """`fixed` and `drawn`: held-out pairs right at 16 loops."""
    found = []
    for name, later in ((study.DRAWN, drawn), (study.FIXED, fixed)):
        right = {n: known if n < study.MOST else later * known for n in study.LOOPS}
        rows: dict[str, Any] = {
            "right": right,
            "bridge": dict.fromkeys(study.LOOPS, bridge),
            "late": dict.fromkeys(study.LOOPS, 0.0),
            "margin": {n: -abs(n - 4) for n in study.LOOPS},
        }
        part = {what: {str(n): x for n, x in row.items()} for what, row in rows.items()}
        curve = {"held_out": part, "ood": part, "flips": flips}
        found += two_runs(name, curve)
    return found


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "holds"),
        ({"fixed": 0.95}, "holds in part"),
        ({"drawn": 0.9}, "holds in part"),
        ({"bridge": 0.8}, "does not hold here"),
        ({"flips": 0.7}, "does not hold here"),
        ({"known": 0.8}, "premise not met"),
    ],
)
def test_the_bridge_must_be_read_and_used(changes: Any, verdict: str) -> None:
    finding = study.judge(runs(**changes))
    assert finding.verdict == verdict, finding.sentence
    assert "largest at 4, 4 loops" in finding.sentence and len(finding.table) == 2
    assert len(f"{study.STUDY.headline} {finding.brief}".split()) <= 25


@torch.no_grad()
def test_a_swapped_state_is_that_of_the_other_question() -> None:
    """A question swapped with itself is unchanged; with another it changes where that is read."""
    arm = study.arms()[0]
    model = OpenMythos(arm.model, seed=0).eval()
    tokens = torch.tensor([[1, 30, 40], [1, 30, 40]])
    plain = model(tokens, num_loops=4).logits
    with study.replaced_bridge(model, 1):
        torch.testing.assert_close(model(tokens, num_loops=4).logits, plain)
    other = torch.tensor([[1, 30, 40], [2, 33, 40]])
    apart = model(other, num_loops=4).logits
    with study.replaced_bridge(model, 1):
        swapped = model(other, num_loops=4).logits
    torch.testing.assert_close(swapped[1], apart[1])  # the donor is left alone
    torch.testing.assert_close(swapped[0, 0], apart[0, 0])
    assert not torch.allclose(swapped[0, 2], apart[0, 2])
    torch.testing.assert_close(model(other, num_loops=4).logits, apart)  # the hook is gone
