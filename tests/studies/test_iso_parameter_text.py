"""iso-parameter-text: phi recovered from made-up runs, matched arms, and the verdict."""

import math
from typing import Any

import pytest
from studies.made_up import run_of

from openmythos.planning import cost
from openmythos.studies import iso_parameter_text as study
from openmythos.studies.study import RunResult

ARMS = {arm.name: arm for arm in study.arms()}
SHAPES = study.shapes()


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "RESAMPLES", 60)


def runs(phi: float = 0.46, noise: float = 0.03, scale: float = 0.5) -> list[RunResult]:
    """Losses of the law, and of arms outside of it."""

    def run(name: str, seed: int) -> RunResult:
        loss = 4.1
        if name in SHAPES:
            layers, loops, tokens = SHAPES[name]
            loss = 3.0 + scale * (layers * loops**phi) ** -0.5 + 0.6 * tokens**-0.4
        factors = ARMS[name].factors
        flops = (0.56 + 0.8 * int(factors["depth"])) * float(factors["tokens"])
        # Different noise for every arm, but not a different one each time.
        shift = noise * math.sin(7 * seed + 3 * list(ARMS).index(name))
        return run_of(name, {"nats": loss + shift}, seed, flops=flops)

    return [run(name, seed) for name in ARMS for seed in (0, 1)]


def fitted(made: list[RunResult]) -> study.Law:
    return study.fitted({run.arm: [study.nats(run)] for run in made if run.arm in SHAPES})


def test_phi_is_recovered_with_its_interval() -> None:
    for phi in (0.0, 0.44, 1.0):
        law = fitted(runs(phi, noise=0.0))
        assert (law.phi, law.low, law.high) == pytest.approx((phi,) * 3, abs=1e-6)
        assert law.a == pytest.approx(0.5) and law.b == pytest.approx(0.4)
        assert law.solution.tolist() == pytest.approx([3.0, 0.5, 0.6], abs=1e-6)
        assert law.loss(study.Shape(2, 1, 0.9)) == pytest.approx(
            3.0 + 0.5 * 2**-0.5 + 0.6 * 0.9**-0.4
        )


def test_layers_and_loops_are_matched() -> None:
    counts = {name: cost.parameters(arm.model) for name, arm in ARMS.items()}
    for name, (layers, loops, _) in SHAPES.items():
        one = counts[study.name_of("layers", 1, study.TOKENS[0])]
        assert counts[name].recurrent == pytest.approx(layers * one.recurrent, rel=1e-3), name
        flops = cost.Flops(ARMS[name].model, study.LENGTH).forward(loops)
        other = study.name_of("layers", layers * loops, SHAPES[name].tokens)
        assert flops == cost.Flops(ARMS[other].model, study.LENGTH).forward(1)
    four = counts[study.name_of("loops", 4, study.TOKENS[1])].total
    for name in (study.LATENT, study.INJECTED):
        assert counts[name].total == pytest.approx(four, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "holds"),
        ({"phi": 0.9}, "holds in part"),  # another exponent
        ({"phi": 1.1}, "does not hold here"),  # a loop is worth more than a layer
        ({"phi": 0.0}, "does not hold here"),
        ({"scale": 0.05}, "premise not met"),
    ],
)
def test_a_loop_is_worth_less_than_a_layer(changes: Any, verdict: str) -> None:
    finding = study.judge(runs(**changes))
    assert finding.verdict == verdict, finding.sentence
    assert len(finding.table) == len(ARMS)
    assert len(f"{study.STUDY.headline} {finding.brief}".split()) <= 21  # a row of the README


def test_equal_compute_is_one_loop_on_more_tokens() -> None:
    made = runs(noise=0.0)
    looped, once = study.at_equal_flops(made, fitted(made))
    assert looped == pytest.approx(study.nats(made[2 * list(ARMS).index("4 loops, 0.35 M tokens")]))
    more = 0.35 * (0.56 + 3.2) / (0.56 + 0.8)
    assert once == pytest.approx(3.0 + 0.5 + 0.6 * more**-0.4, abs=0.005)
