"""benchmarks/serve.py measures what it says; no times are asserted."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import serve
from contenders import S

from openmythos import OpenMythos

TINY = replace(S, dim=32, heads=2, experts=4, shared_dim=16, expert_dim=8, vocab=64, context=64)


@pytest.fixture(scope="module")
def model() -> OpenMythos:
    return OpenMythos(TINY.config(), seed=0).eval()


def test_every_contender_makes_the_tokens_that_were_asked_for(model: OpenMythos) -> None:
    asked = serve.requests(TINY, 6, prompt=(3, 9), new=(2, 7), depths=(2, 3))
    wanted = sum(request.options.max_new_tokens for request in asked)
    assert {request.options.num_loops for request in asked} == {2, 3}
    limits = serve.engine_limits(3), serve.lockstep(3)
    for outcome in (
        serve.static_batches(model, asked, 4),
        *(serve.served(model, asked, each) for each in limits),
    ):
        assert outcome.tokens == wanted and outcome.seconds > 0
    first = asked[:4]
    assert serve.one_by_one(model, asked).tokens == sum(r.options.max_new_tokens for r in first)
    part = serve.served(model, asked, limits[0], full=True)
    assert part.tokens < wanted and set(part.per_token) <= {2, 3}


def test_ratios_are_of_the_same_round() -> None:
    seconds = iter([1.0, 0.5, 4.0, 1.0, 2.0, 2.0])
    run = lambda: serve.Outcome(8, next(seconds))  # noqa: E731
    found = serve.take_turns({"base": run, "other": run}, 3)
    assert found["other"]["ratios"] == [2.0, 4.0, 1.0] and found["other"]["ratio"] == 2.0
    assert found["base"]["ratio"] == 1.0
