"""depth-extrapolation: the rule on made-up runs, and the loops of its rule."""

from typing import Any

import pytest
from studies.made_up import chain_runs

from openmythos.studies import depth_extrapolation as study

ARMS = {arm.name: arm for arm in study.arms()}


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "holds"),
        ({"to_20_60": 0.9}, "holds in part"),
        ({"to_5_10": 0.6, "later": 0.1}, "holds in part"),
        ({"to_20_30": 0.9, "to_5_10": 0.6, "later": 0.1}, "does not hold here"),
        ({"to_10_15": 0.8}, "does not hold here"),
        ({"stack_10_15": 0.6}, "does not hold here"),
        ({"stack_10_10": 0.9}, "premise not met"),
        ({"stack_20_20": 0.1}, "holds"),
    ],
)
def test_loops_extrapolate_from_an_equal_fit(changes: Any, verdict: str) -> None:
    finding = study.judge(chain_runs(**changes))
    assert finding.verdict == verdict, finding.sentence
    assert len(finding.table) == len(ARMS)
    assert len(f"{study.STUDY.headline} {finding.brief}".split()) <= 25


def test_the_rule_gives_more_loops_than_any_chain_is_long() -> None:
    assert [study.loops_for(hops) for hops in (5, 10, 60)] == [12, 18, 78]
    assert 3 * study.loops_for(max(study.HOPS)) <= 240
    assert ARMS[study.STACK_10].model.attention.window == 0  # type: ignore[union-attr]
    assert ARMS[study.STACK_10].model.effective_depth(1) == 22
