"""looped-scaling: minima, exponents and laws recovered from made-up runs, and the verdict."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch

from openmythos.planning.cost import Flops
from openmythos.recurrence.loop_sampling import NoCurriculum, sample_loops
from openmythos.studies import looped_scaling as study
from openmythos.studies.study import RunResult

ARMS = {arm.name: arm for arm in study.arms()}
Loss = Callable[[float, int, int, int], float]  # of budget, mean loops, tokens, loops asked


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "RESAMPLES", 400)


def law(budget: float, mean: int, tokens: int, asked: int, z: float = 3.0) -> float:
    return 3.0 + 0.6 / mean + 1.5 * (tokens / 1e6) ** -0.4 + 2.0 * math.exp(-z * asked / mean)


def parabola(power: float) -> Loss:
    """The best mean loops are 3 at the middle budget and grow as that power of compute."""

    def loss(budget: float, mean: int, tokens: int, asked: int) -> float:
        best = math.log2(3 * (budget / study.BUDGETS[1]) ** power)
        own = 4.0 - 0.1 * math.log(budget) + 0.05 * (math.log2(mean) - best) ** 2
        return own + math.exp(-6.0 * asked / mean)

    return loss


def runs(loss: Loss, noise: float = 0.0) -> list[RunResult]:
    found = []
    for (budget, mean), seed in itertools.product(
        itertools.product(study.BUDGETS, study.LOOPS), (0, 1)
    ):
        steps = ARMS[study.name_of(budget, mean)].run.train.num_steps
        train = {"num_steps": steps, "batch_size": 8, "seq_len": 128, "optimizer": {"lr": 1e-3}}
        asked = study.ASKED[:1] if mean == 1 else study.ASKED
        shift = noise * (seed - 0.5) * (1 if mean > 2 else -1)
        curve = {str(n): loss(budget, mean, 1024 * steps, n) + shift for n in asked}
        name = study.name_of(budget, mean)
        found.append(RunResult(name, seed, {"train": train}, curve, 1000, 1.0, 1.0, ""))
    return found


@pytest.mark.parametrize("mean", study.LOOPS)
def test_budgets_are_spent(mean: int) -> None:
    drawn = torch.cat(
        [
            sample_loops(
                study.drawn(mean), NoCurriculum(), batch=100, seed=0, step=step, num_steps=100
            )
            for step in range(100)
        ]
    )
    assert float(drawn.double().mean()) == pytest.approx(study.mean_drawn(mean), rel=0.02)
    flops = Flops(ARMS[study.name_of(study.BUDGETS[0], mean)].model, study.LENGTH)
    each = [flops.training(int(loops)) for loops in drawn]
    for budget in study.BUDGETS:
        tokens = 1024 * ARMS[study.name_of(budget, mean)].run.train.num_steps
        assert tokens * sum(each) / len(each) == pytest.approx(1e12 * budget, rel=0.02)


def test_the_best_loops_are_those_of_the_parabola() -> None:
    x = torch.tensor([0.0, 1.0, 2.0, 3.0])
    losses = torch.stack([(x - best) ** 2 for best in (0.5, 2.0, 4.0, -1.0)] + [-((x - 2) ** 2)])
    assert study.best_loops(losses).tolist() == pytest.approx([2**0.5, 4.0, 8.0, 1.0, 1.0])


def test_an_exponent_is_found_with_its_interval() -> None:
    for power in (0.4, 0.0, -0.3):
        sure = study.exponent(runs(parabola(power)))
        assert sure.value == pytest.approx(power, abs=1e-6)
        assert sure.low == pytest.approx(sure.high)
        assert sure.best[1] == pytest.approx(3.0)
    unsure = study.exponent(runs(parabola(0.4), noise=0.02))
    assert unsure.low < 0.39 and unsure.high > 0.41 and unsure.value == pytest.approx(0.4)


def test_the_unified_law_predicts_a_budget_it_has_not_seen() -> None:
    made = runs(law)
    error, before = study.held_out_errors(made)
    assert error < 0.003 < 0.02 < before
    (one,) = (run for run in made[:7] if run.arm == study.name_of(0.75, 8) and run.seed == 0)
    assert study.rate_of_loops(one) == pytest.approx(3.0, rel=0.05)


def test_scaling_is_judged_by_its_exponent_and_its_laws() -> None:
    def judged(loss: Loss, noise: float = 0.005) -> str:
        finding = study.judge(runs(loss, noise))
        assert len(finding.table) == len(ARMS)
        assert len(f"{study.STUDY.headline} {finding.brief}".split()) <= 21  # a row of the README
        return finding.verdict

    assert judged(parabola(0.4)) == "holds"
    assert judged(parabola(0.8)) == "holds in part"
    assert judged(parabola(0.0)) == judged(parabola(-0.4)) == "does not hold here"

    def idle(budget: float, mean: int, tokens: int, asked: int) -> float:
        return parabola(0.4)(budget, mean, tokens, 1000)

    assert judged(idle) == "premise not met"

    def overthinks(budget: float, mean: int, tokens: int, asked: int) -> float:
        return parabola(0.4)(budget, mean, tokens, asked) + 0.1 * max(0, asked - mean)

    assert judged(overthinks) == "holds in part"
