"""What do more loops buy a language model at inference, and what do shortcuts of looping cost?"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from openmythos.analysis import study_plots
from openmythos.eval.likelihood import decoded_loss, depth_sweep
from openmythos.nn.cache import (
    CachePolicy,
    ExactCache,
    FirstLoopCache,
    GroupedLoopCache,
    LastLoopCache,
)
from openmythos.studies.statistics import above, paired, plus_minus
from openmythos.studies.study import (
    Arm,
    Column,
    Curve,
    Finding,
    RunResult,
    Study,
    as_sentence,
    bands_note,
    by_arm,
    by_bars,
    curve_of,
    table_of,
    to_json,
)
from openmythos.studies.text import (
    MEAN_LOOPS,
    TextRun,
    drawn_loops,
    long_training,
    needs_its_loops,
    on_two_corpora,
)

LOOPS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48)
FITTED = MEAN_LOOPS  # laws are fitted up to this many loops and tested beyond
USED = 0.1  # nats that 6 loops gain over 1 in a model that uses its loops; Parcae's 140M gains 0.33
FLAT = 0.02  # nats between 8 times the trained loops and the trained loops
APART = 0.05  # nats at 1 loop between loops drawn per batch and per sequence
BASE, PER_BATCH, OUTER = "per sequence", "per batch", "prelude and coda"
LAWS = ("exponential", "power law")
POLICIES: dict[str, CachePolicy] = {
    "exact": ExactCache(),
    "groups of 2": GroupedLoopCache(group=2),
    "last loop": LastLoopCache(),
    "first loop": FirstLoopCache(),
}


def arms() -> list[Arm]:
    model, training = needs_its_loops(), long_training()
    whole = replace(training, loops=drawn_loops(per="batch"))
    outer = replace(model, prelude_layers=1, coda_layers=1)
    return [
        Arm(name=BASE, run=on_two_corpora(model, training), rates=(3e-3, 6e-3, 1.2e-2)),
        Arm(name=PER_BATCH, run=on_two_corpora(model, whole), tuned_as=BASE),
        Arm(name=OUTER, run=on_two_corpora(outer, training), tuned_as=BASE),
    ]


@torch.no_grad()
def measure(trained: TextRun, arm: Arm, quick: bool) -> dict[str, Any]:
    """Held-out nats per token by loops, and by cache policy at 6 loops."""
    loops = LOOPS[:3] if quick else LOOPS
    found = depth_sweep(trained.model, trained.held_out, loops, seq_len=128, batch_size=16)
    policies = {
        name: decoded_loss(
            trained.model,
            trained.held_out,
            policy,
            num_loops=2 if quick else MEAN_LOOPS,
            window=16 if quick else 128,
            windows=2 if quick else 64,
        )
        for name, policy in POLICIES.items()
    }
    by_loops = to_json({n: likelihood.nats_per_token for n, likelihood in found.items()})
    return {"nats_by_loops": by_loops, "nats_by_policy": policies}


def law_error(curve: Mapping[int, float], law: str) -> tuple[float, float]:
    """Largest errors of `fitted`: (up to FITTED loops, beyond)."""
    predicted = fitted(curve, law)
    errors = {n: abs(predicted[n] - loss) for n, loss in curve.items()}
    beyond = [error for n, error in errors.items() if n > FITTED]
    return max(error for n, error in errors.items() if n <= FITTED), max(beyond, default=0.0)


def fitted(curve: Mapping[int, float], law: str) -> dict[int, float]:
    """The curve predicted by L + a e^(-b T) or L + a T^(-b), fitted to its first FITTED loops.

    L and a by least squares for each b of a fine grid; the b with the least squared error is taken.
    """
    loops = torch.tensor(sorted(curve), dtype=torch.double)
    values = torch.tensor([curve[int(n)] for n in loops], dtype=torch.double)
    near = loops <= FITTED
    best: tuple[float, torch.Tensor] | None = None
    for b in torch.logspace(-2, 1, 121, dtype=torch.double):
        shape = torch.exp(-b * loops) if law == "exponential" else loops**-b
        design = torch.stack((torch.ones_like(shape), shape), dim=1)
        solution = torch.linalg.lstsq(design[near], values[near, None]).solution
        predicted = (design @ solution)[:, 0]
        squared = float((predicted - values)[near].square().sum())
        if best is None or squared < best[0]:
            best = squared, predicted
    assert best is not None
    return {int(n): float(value) for n, value in zip(loops, best[1], strict=True)}


def nats(result: RunResult) -> Curve:
    """Held-out loss by loops."""
    return curve_of(result.curve["nats_by_loops"])


def at(result: RunResult, loops: int) -> float:
    """Loss at so many loops; in a quick run, which measures few, at the nearest."""
    curve = nats(result)
    return curve[min(curve, key=lambda n: abs(n - loops))]


def gain(result: RunResult) -> float:
    """Nats that the mean number of loops in training saves against one loop."""
    return at(result, 1) - at(result, MEAN_LOOPS)


def drift(result: RunResult) -> float:
    """Nats that the largest number of loops costs against the mean in training."""
    return at(result, LOOPS[-1]) - at(result, MEAN_LOOPS)


def added(result: RunResult, policy: str) -> float:
    """Nats that a cache policy costs over the exact one."""
    by_policy: Mapping[str, float] = result.curve["nats_by_policy"]
    return by_policy[policy] - by_policy["exact"]


def _nats_at(loops: int) -> Column:
    return Column(f"{loops} loop{'s' * (loops > 1)}", lambda run: at(run, loops))


def _error_of(law: str) -> Column:
    return Column(
        f"{law}, error beyond {FITTED}",
        lambda run: law_error(nats(run), law)[1],
        lambda values: plus_minus(values, digits=4),
        ".4f",
    )


def _cost_of(policy: str) -> Column:
    return Column(f"cache: {policy}", lambda run: added(run, policy))


COLUMNS = (
    *(_nats_at(loops) for loops in (1, 2, 4, 6, 12, 48)),
    *(_error_of(law) for law in LAWS),
    *(_cost_of(policy) for policy in POLICIES if policy != "exact"),
)


def judge(results: Sequence[RunResult]) -> Finding:
    """Premise: 6 loops gain at least 0.1 nats over 1, in the mean of the base's seeds.

    Central: fitted on 1 to 6 loops, the exponential's largest error up to 48 loops is less than
    half of the power law's in at least 4 of 5 seeds. 48 loops are within 0.02 nats of 6. At 1 loop,
    drawing loops per batch costs at least 0.05 nats more than per sequence, by the paired interval.
    Keeping the last loop's keys and values costs less than a quarter of keeping the first loop's.
    """
    groups = by_arm(results)
    base, whole = groups[BASE], groups[PER_BATCH]
    used = plus_minus(list(map(gain, base)))
    met = sum(map(gain, base)) / len(base) >= USED
    wins = sum(
        law_error(nats(run), LAWS[0])[1] < law_error(nats(run), LAWS[1])[1] / 2 for run in base
    )
    largest = max(abs(drift(run)) for run in base)
    one = paired({r.seed: at(r, 1) for r in whole}, {r.seed: at(r, 1) for r in base})
    last, first = (sum(added(r, name) for r in base) for name in ("last loop", "first loop"))
    statements = {
        "fitted on 1 to 6 loops, an exponential errs less than half as much as a power law up to "
        f"48 loops in {wins} of {len(base)} seeds": wins >= 0.8 * len(base),
        f"48 loops are within {largest:.3f} nats of 6 (at most {FLAT})": largest <= FLAT,
        f"at 1 loop, drawing loops per batch costs {plus_minus(one, sign='+')} nats (at least "
        f"{APART})": above(one, APART),
        f"the last loop's cache costs {last / len(base):+.3f} nats, the first loop's "
        f"{first / len(base):+.3f}": last < first / 4,
    }
    sentence = (
        f"The premise is a model that uses its loops (6 against 1 are worth {used} nats, at least "
        f"{USED}): {'met' if met else 'not met'}. {as_sentence(statements)}"
    )
    brief = f"6 loops save {used} nats against 1; exponential law in {wins} of {len(base)} seeds."
    verdict = by_bars(statements, premise=met)
    return Finding(verdict, sentence, table_of(results, COLUMNS), brief)


def draw(results: Sequence[RunResult]) -> tuple[Any, list[dict[str, object]]]:
    """Held-out loss against loops above that at 6 loops, and the two laws of the base."""
    by_loops = study_plots.Lines()
    laws = study_plots.Lines()
    rows: list[dict[str, object]] = []
    for run in results:
        reference = at(run, MEAN_LOOPS)
        for loops, loss in nats(run).items():
            by_loops.add(run.arm, loops, loss - reference)
            rows.append({"arm": run.arm, "seed": run.seed, "loops": loops, "nats": loss})
        for law in LAWS if run.arm == BASE else ():
            for loops, loss in fitted(nats(run), law).items():
                laws.add(law, loops, loss - reference)
        for policy, loss in run.curve["nats_by_policy"].items():
            rows.append({"arm": run.arm, "seed": run.seed, "policy": policy, "nats": loss})
    beyond = {
        name: {n: values for n, values in points.items() if n >= 2}
        for name, points in ({"measured": by_loops[BASE]} | laws).items()
    }
    figure = study_plots.line_panels(
        {"loops at inference": by_loops, f"laws fitted on 1 to {FITTED} loops": beyond},
        x_labels=["num_loops at inference"],
        y_labels=["loss above that at 6 loops [nats]"],
        log_x=True,
        laws=LAWS,
        note=bands_note(results),
    )
    return figure, rows


STUDY = Study(
    name="test-time-depth",
    claim=(
        "More loops at inference lower the loss of a language model along an exponential that "
        "saturates at the depth of training, and do no harm beyond it."
    ),
    headline="Loops lower text loss exponentially (Parcae)",
    paper="0.33 nats from 1 to 8 loops; exponential beats power law beyond training (140 M)",
    source="Parcae (arXiv 2604.12946); Huginn (arXiv 2502.05171)",
    method=(
        "The model that needs its loops: one recurrent layer, no prelude, no coda, 0.2 M "
        "parameters (one arm has a prelude and a coda of one layer), 1500 steps of 8 x 128 tokens "
        "of Python's standard library and an English dictionary, loops from Poisson(6) up to 16. "
        "Both laws are fitted on 1 to 6 loops. Cache: what keeping fewer loops' keys and values "
        "adds in nats per token, decoding the second halves of 64 windows of 128 tokens at 6 loops."
    ),
    setups=(
        ("model", "140 M to 1.3 B parameters, 2/2/2 to 8/8/8 layers", "0.2 M, 0/1/0 and 1/1/1"),
        ("text", "FineWeb-Edu, billions of tokens", "24 MB, 1.5 M tokens seen"),
        ("loops", "Poisson(8)", "Poisson(6), at most 16"),
        ("gain of the trained depth over 1 loop", "0.33 nats (140 M)", "see the table"),
    ),
    caption=(
        "Held-out loss by loops at inference, against that at 6 loops (left); of the base from two "
        "loops on, with the laws fitted to its first six (right): the exponential goes through "
        "what follows, the power law falls on."
    ),
    deviations=(
        "A second edition. The first used a model with prelude and coda, which hardly used its "
        "loops: its premise was not met.",
        "The arms per batch and with prelude and coda use the learning rate tuned for the base.",
        "The laws are fitted by least squares, not by a Huber loss: there are no outliers.",
    ),
    not_shown=(
        "Models and training of the papers' size.",
        "Tasks other than predicting text.",
        "That a gain from loops is worth having: with a prelude and a coda, and twice the "
        "parameters, the loss is lower at every number of loops, and loops bring an eighth.",
    ),
    arms=arms,
    measure=measure,
    judge=judge,
    draw=draw,
    columns=COLUMNS,
)
