"""With a fixed budget of compute, how many loops should a small language model train with?"""

import functools
import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openmythos.analysis import study_plots
from openmythos.eval.likelihood import depth_sweep
from openmythos.planning.cost import Flops
from openmythos.recurrence.loop_sampling import FixedLoops, PoissonLoops
from openmythos.studies.statistics import plus_minus
from openmythos.studies.study import (
    Arm,
    Column,
    Finding,
    RunResult,
    Study,
    as_sentence,
    bands_note,
    by_arm,
    by_bars,
    curve_of,
    factors_of,
    table_of,
    to_json,
)
from openmythos.studies.text import TextRun, needs_its_loops, on_two_corpora, text_training
from openmythos.train.optim import Muon

BUDGETS = (0.75, 2.25, 6.75)  # TFLOP of training
LOOPS = (1, 2, 4, 8)  # mean in training
ASKED = (1, 2, 3, 4, 6, 8, 12, 16)  # loops at inference
BATCH, LENGTH = 8, 128
RESAMPLES = 4000
PUBLISHED = 0.4  # exponent of Parcae
USED = 0.1  # nats that 8 loops gain over 1 in a model that uses its loops
FLAT = 0.005  # share of the loss by which twice the mean loops may differ from the mean loops
UNIFIED = 0.015  # error of the unified law; Parcae has 0.0085 to 0.0131


def name_of(budget: float, loops: int) -> str:
    return f"{budget:g} TFLOP, {loops} loop{'s' * (loops > 1)}"


def arms() -> list[Arm]:
    """Rates are tuned at the smallest budget, for every number of loops."""
    return [
        Arm(
            name=name_of(budget, loops),
            run=on_two_corpora(
                replace(needs_its_loops(), num_loops=loops),
                replace(
                    text_training(drawn(loops)),
                    num_steps=steps(budget, loops),
                    optimizer=Muon(lr=6e-3, adamw_lr_scale=4.0),
                ),
            ),
            factors={"budget": f"{budget:g}", "loops": str(loops)},
            rates=(3e-3, 6e-3, 1.2e-2) if budget == BUDGETS[0] else (),
            trial_seeds=2,
            tuned_as="" if budget == BUDGETS[0] else name_of(BUDGETS[0], loops),
        )
        for budget in BUDGETS
        for loops in LOOPS
    ]


def drawn(loops: int) -> FixedLoops | PoissonLoops:
    """One loop, or as many as Poisson's law draws for each sequence, at least one."""
    if loops == 1:
        return FixedLoops(mean_loops=1)
    return PoissonLoops(mean_loops=loops, max_loops=24)


def mean_drawn(loops: int) -> float:
    """The mean of what `drawn` draws: a little above `loops`, since no draw is 0."""
    return 1.0 if loops == 1 else loops + math.exp(-loops)


def steps(budget: float, loops: int) -> int:
    """Training steps that a budget pays for."""
    flops = Flops(needs_its_loops(), LENGTH)
    once, twice = flops.training(1), flops.training(2)
    per_token = once + (mean_drawn(loops) - 1) * (twice - once)
    return round(1e12 * budget / per_token / (BATCH * LENGTH))


@torch.no_grad()
def measure(trained: TextRun, arm: Arm, quick: bool) -> dict[str, Any]:
    """Held-out nats per token by loops; of what trained with one loop, at one."""
    asked = ASKED[:3] if quick else ASKED
    loops = asked[:1] if arm.model.num_loops == 1 else asked
    found = depth_sweep(trained.model, trained.held_out, loops, seq_len=LENGTH, batch_size=16)
    return to_json({n: likelihood.nats_per_token for n, likelihood in found.items()})


def at(run: RunResult, loops: int) -> float:
    """Loss after so many loops; in a quick run, which asks few, the nearest."""
    curve = curve_of(run.curve)
    return curve[min(curve, key=lambda n: abs(n - loops))]


def tokens(run: RunResult) -> int:
    """Tokens that a run was trained on."""
    train = run.settings["train"]
    return int(train["num_steps"] * train["batch_size"] * train["seq_len"])


@functools.cache
def trained_loops() -> dict[str, int]:
    """The mean loops of every arm in training, by its name."""
    return {name: int(factors["loops"]) for name, factors in factors_of(arms()).items()}


def own(run: RunResult) -> float:
    """Loss after the mean number of loops in training."""
    return at(run, trained_loops()[run.arm])


def best_loops(losses: Tensor) -> Tensor:
    """The minimum of the parabola through losses [..., 4] at 1, 2, 4 and 8 loops, on a log scale.

    Between 1 and 8; if the parabola has none, the best of the four.
    """
    x = torch.tensor([math.log2(n) for n in LOOPS], dtype=torch.double)
    fit = torch.linalg.pinv(torch.stack((x**2, x, torch.ones_like(x)), dim=1))
    curved, slope, _ = (losses.double() @ fit.T).unbind(dim=-1)
    inside = (-slope / (2 * curved)).clamp(x[0], x[-1])
    return torch.exp2(torch.where(curved > 0, inside, x[losses.argmin(dim=-1)]))


class Exponent(NamedTuple):
    """Of the best loops as a power of compute, with its 95% interval, and the best loops."""

    value: float
    low: float
    high: float
    best: list[float]  # by budget


def exponent(results: Sequence[RunResult]) -> Exponent:
    """A line through log best loops against log compute; its interval by a bootstrap over seeds."""
    groups = by_arm(results)
    generator = torch.Generator().manual_seed(0)
    means, drawn_means = [], []
    for budget, loops in itertools.product(BUDGETS, LOOPS):
        losses = torch.tensor(
            [own(run) for run in groups[name_of(budget, loops)]], dtype=torch.double
        )
        picked = torch.randint(len(losses), (RESAMPLES, len(losses)), generator=generator)
        means.append(losses.mean())
        drawn_means.append(losses[picked].mean(dim=1))
    shape = (-1, len(BUDGETS), len(LOOPS))
    best = best_loops(torch.stack(means).view(shape))[0]
    resampled = best_loops(torch.stack(drawn_means, dim=1).view(shape))
    compute = torch.tensor(BUDGETS).double().log()
    centred = compute - compute.mean()

    def slope(loops: Tensor) -> Tensor:
        return loops.log() @ centred / centred.square().sum()

    low, high = torch.quantile(slope(resampled), torch.tensor([0.025, 0.975]).double())
    return Exponent(float(slope(best)), float(low), float(high), best.tolist())


class Point(NamedTuple):
    """A loss of the mean of an arm's seeds."""

    loops: int  # mean in training
    tokens: int
    asked: int  # loops at inference
    loss: float


def points(results: Sequence[RunResult], budgets: Sequence[float]) -> list[Point]:
    """Every loss of some budgets, mean over seeds."""
    groups = by_arm(results)
    found = []
    for budget, loops in itertools.product(budgets, LOOPS):
        runs = groups[name_of(budget, loops)]
        found += [
            Point(loops, tokens(runs[0]), asked, statistics.mean(at(run, asked) for run in runs))
            for asked in curve_of(runs[0].curve)
        ]
    return found


def unified(known: Sequence[Point], asked: Sequence[Point]) -> list[float]:
    """L = E + A mu^-a + B D^-b + Z e^(-z T / mu), fitted to known points, at those asked for.

    mu: mean loops in training, D: tokens, T: loops at inference. E, A, B and Z by least squares
    for each a, b, z of a grid, of which the best with B and Z above 0 are taken.
    """
    exponents = torch.tensor(
        list(
            itertools.product(
                (0.25, 0.5, 0.75, 1.0, 1.5, 2.0),
                [0.1 * k for k in range(1, 11)],
                torch.logspace(-0.5, 1.0, 13).tolist(),
            )
        )
    ).double()
    design, losses = (
        _design(known, exponents),
        torch.tensor([p.loss for p in known], dtype=torch.double),
    )
    target = losses.expand(len(exponents), -1)[..., None]
    solved = torch.linalg.pinv(design) @ target
    errors = (design @ solved - target).square().sum(dim=(1, 2))
    allowed = (solved[:, 2:, 0] > 0).all(dim=1)
    if allowed.any():
        errors[~allowed] = math.inf
    best = int(errors.argmin())
    predicted: list[float] = (_design(asked, exponents[best : best + 1]) @ solved[best])[
        0, :, 0
    ].tolist()
    return predicted


def _design(at_points: Sequence[Point], exponents: Tensor) -> Tensor:
    """The four terms without their factors, [exponents, points, 4]."""
    loops, seen, asked, _ = torch.tensor(at_points, dtype=torch.double).unbind(dim=1)
    a, b, z = exponents[:, None].unbind(dim=-1)
    terms = (
        torch.ones_like(a * loops),
        loops**-a,
        (seen / 1e6) ** -b,
        torch.exp(-z * asked / loops),
    )
    return torch.stack(terms, dim=-1)


def relative_error(predicted: Sequence[float], asked: Sequence[Point]) -> float:
    """Mean of |predicted - measured| / measured."""
    return statistics.mean(
        abs(value - point.loss) / point.loss for value, point in zip(predicted, asked, strict=True)
    )


def held_out_errors(results: Sequence[RunResult]) -> tuple[float, float]:
    """At the largest budget: of the unified law fitted to the others, and of the one before."""
    known, asked = points(results, BUDGETS[:-1]), points(results, BUDGETS[-1:])
    before = [point.loss for point in points(results, BUDGETS[-2:-1])]
    return relative_error(unified(known, asked), asked), relative_error(before, asked)


def rate_of_loops(run: RunResult) -> float | None:
    """z of L = L_inf + Z e^(-z T / mu), fitted to one run by least squares over a grid of z."""
    mu, curve = trained_loops()[run.arm], curve_of(run.curve)
    if mu == 1:
        return None
    losses = torch.tensor([*curve.values()], dtype=torch.double)
    rates = torch.logspace(-1, 1.5, 101, dtype=torch.double)
    shape = torch.exp(-rates[:, None] * torch.tensor([*curve], dtype=torch.double) / mu)
    design = torch.stack((torch.ones_like(shape), shape), dim=-1)
    solved = torch.linalg.pinv(design) @ losses
    left = losses - (design @ solved[..., None])[..., 0]
    return float(rates[left.square().sum(dim=-1).argmin()])


def beyond(run: RunResult) -> float:
    """Change of the loss from the mean loops in training to twice as many, as a share."""
    return at(run, 2 * trained_loops()[run.arm]) / own(run) - 1


COLUMNS = (
    Column(
        "tokens [M]",
        lambda run: tokens(run) / 1e6,
        lambda values: f"{values[0]:.2f}",
        ".2f",
    ),
    Column("loss at the mean loops", own),
    Column("at 1 loop", lambda run: at(run, 1)),
    Column("at 16 loops", lambda run: at(run, 16) if trained_loops()[run.arm] > 1 else None),
    Column("z", rate_of_loops, lambda values: plus_minus(values, digits=2), ".2f"),
)


def judge(results: Sequence[RunResult]) -> Finding:
    """Premise: at the largest budget the model trained with 8 loops gains at least 0.1 nats from 1
    to 8. Central: the best mean loops grow with compute, as a power whose bootstrap interval is
    above 0. It contains 0.40. Twice the mean loops are within 0.5% of the mean loops, in every run
    with two or more. The unified law, fitted to the two smaller budgets, errs by at most 1.5% at
    the largest, and by less than the losses of the middle one would."""
    groups, found = by_arm(results), exponent(results)
    gains = [at(run, 1) - own(run) for run in groups[name_of(BUDGETS[-1], LOOPS[-1])]]
    met = statistics.mean(gains) >= USED
    drift = max(abs(beyond(run)) for run in results if trained_loops()[run.arm] > 1)
    error, before = held_out_errors(results)
    interval = f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"
    best = ", ".join(f"{loops:.1f}" for loops in found.best)
    statements = {
        f"the best mean loops are {best} at {', '.join(map(str, BUDGETS))} TFLOP, a power of "
        f"{interval} of compute, above 0": found.low > 0,
        f"its interval contains {PUBLISHED:.2f}": found.low <= PUBLISHED <= found.high,
        f"twice the mean loops change the loss by at most {drift:.2%} (at most 0.5%)": (
            drift <= FLAT
        ),
        f"the unified law errs by {error:.2%} at the largest budget (at most 1.5%, and less than "
        f"the {before:.2%} of the losses of the middle one)": error <= min(UNIFIED, before),
    }
    sentence = (
        f"The premise is that the model uses its loops (8 against 1 are worth {plus_minus(gains)} "
        f"nats, at least {USED}): {'met' if met else 'not met'}. {as_sentence(statements)}"
    )
    brief = f"{best} loops: exponent {interval}; unified law errs {error:.1%}."
    return Finding(by_bars(statements, premise=met), sentence, table_of(results, COLUMNS), brief)


def draw(results: Sequence[RunResult]) -> tuple[Any, list[dict[str, object]]]:
    """Loss by mean loops in training, a line per budget; by loops asked for, at the largest."""
    by_mean = study_plots.Lines()
    by_asked = study_plots.Lines()
    rows: list[dict[str, object]] = []
    factors = factors_of(arms())
    for run in results:
        budget, loops = factors[run.arm]["budget"], trained_loops()[run.arm]
        by_mean.add(f"{budget} TFLOP", loops, own(run))
        for asked, loss in curve_of(run.curve).items():
            rows.append({"arm": run.arm, "seed": run.seed, "loops": asked, "nats": loss})
            if float(budget) == BUDGETS[-1]:
                by_asked.add(f"trained with {loops}", asked, loss)
    figure = study_plots.line_panels(
        {"": by_mean, f"{BUDGETS[-1]:g} TFLOP": by_asked},
        x_labels=["mean loops in training", "num_loops at inference"],
        y_labels=["held-out loss [nats / token]"],
        log_x=True,
        note=bands_note(results),
    )
    return figure, rows


STUDY = Study(
    name="looped-scaling",
    claim="The more compute, the more loops a model should train with: a power law of 0.40.",
    headline="Best mean loops grow with compute (Parcae)",
    paper="mean loops ~ C^0.40; unified law errs by 0.85 to 1.31% (140 M and 370 M)",
    source="Parcae (arXiv 2604.12946)",
    method=(
        "The model that needs its loops (one layer, 0.25 M parameters) with 1, 2, 4 or 8 mean "
        "loops in training, drawn per sequence, at three budgets of training FLOPs; what a loop "
        "costs is paid in tokens. Loss of held-out text after the mean loops. The best mean loops "
        "of a budget are the minimum of a parabola in log2 of the loops. Learning rates are tuned "
        "for each number of loops at the smallest budget. Interval of the exponent: percentiles "
        "of 4000 draws of seeds."
    ),
    setups=(
        ("model", "140 M and 370 M", "0.25 M, one layer"),
        ("budgets", "1e18 to 1e20 FLOP", "0.75e12 to 6.75e12 FLOP"),
        ("mean loops", "1 to 12", "1, 2, 4, 8"),
        ("text", "FineWeb-Edu", "24 MB, at most 5 M tokens seen"),
    ),
    caption=(
        "At each of the three budgets one loop is best: more tokens are worth more than more "
        "loops. What 2 loops cost falls from 0.20 to 0.07 nats as compute grows 9 times, what 8 "
        "cost from 0.63 to 0.33. Left: held-out loss by mean loops in training, at equal training "
        "FLOPs. Right: by loops at inference, for the largest budget."
    ),
    not_shown=(
        "Models that grow with compute: this one is so small that loops are the only way to "
        "compute more per token.",
        "The exponent of tokens: at a fixed size it follows from that of loops.",
        "Budgets beyond a factor of 9, and more than two seeds: the bootstrap draws from these.",
        "Whether more than one loop is best at still larger budgets: what loops cost is falling.",
        "Learning rates tuned at every budget; truncated backpropagation.",
    ),
    arms=arms,
    measure=measure,
    judge=judge,
    draw=draw,
    columns=COLUMNS,
)
