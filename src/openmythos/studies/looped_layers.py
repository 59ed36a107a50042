"""Does one layer looped six times do what six layers do? Three tasks, and every seed counted."""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from openmythos.analysis import study_plots
from openmythos.eval.accuracy import ASKED_SEED
from openmythos.model.mythos import OpenMythos
from openmythos.recurrence.loop_sampling import FixedLoops
from openmythos.studies.learning import TASK_TRAINING, looped_block, on_task
from openmythos.studies.statistics import percent, succeeded
from openmythos.studies.study import (
    Arm,
    Column,
    Finding,
    RunResult,
    Study,
    as_sentence,
    by_arm,
    by_bars,
    table_of,
)
from openmythos.tasks import Addition, Composition, PHop, Task
from openmythos.train.optim import WSD, AdamW

LAYERS, LOOPED, ONCE = (6, 1), (1, 6), (1, 1)  # layers in the block, loops
SHAPES = (LAYERS, LOOPED, ONCE)
# Task, fewest hops, hops at the start, most hops, steps.
TASKS: dict[str, tuple[Task, int, int, int, int]] = {
    "p-hop": (PHop(alphabet=4, length=32), 4, 4, 4, 1000),
    "addition": (Addition(digits=3, max_operands=2), 2, 2, 2, 3000),
    "S_5": (Composition(size=5, factors="adjacent"), 2, 2, 6, 2400),
}
SOLVED = 0.99
ENOUGH = 0.8  # share of the seeds that must solve a task
FEWER = 1  # seeds that the loop may solve less than layers
LOW = 0.6  # what one layer run once may reach, in the mean


def name_of(task: str, shape: tuple[int, int]) -> str:
    return f"{task}, {shape[0]} x {shape[1]}"


def arms() -> list[Arm]:
    own: dict[str, Any] = {"rates": (5e-4, 1e-3, 2e-3), "trial_seeds": 1}
    found = []
    for name in TASKS:
        same: dict[str, Any] = {"tuned_as": name_of(name, LOOPED), "most_seeds": 3}
        found += [_arm(name, shape, **(same if shape == ONCE else own)) for shape in SHAPES]
    return found


def _arm(name: str, shape: tuple[int, int], **fields: Any) -> Arm:
    task, fewest, first, most, steps = TASKS[name]
    training = replace(
        TASK_TRAINING,
        num_steps=steps,
        loops=FixedLoops(mean_loops=shape[1]),
        optimizer=AdamW(lr=1e-3, weight_decay=0.05, beta2=0.98),
        schedule=WSD(warmup=0.05, decay=0.4, final=0.03),
    )
    hops = {"min_hops": fewest, "first_hops": first, "max_hops": most}
    return Arm(
        name=name_of(name, shape),
        factors={"task": name, "shape": f"{shape[0]} x {shape[1]}"},
        run=on_task(looped_block(task, *shape), task, training, **hops),
        **fields,
    )


@torch.no_grad()
def measure(trained: OpenMythos, arm: Arm, quick: bool) -> dict[str, Any]:
    """Share of problems of the largest size answered right, all digits of a sum together."""
    hops = TASKS[arm.factors["task"]][3]
    generator = torch.Generator().manual_seed(ASKED_SEED + hops)
    batch = arm.task.sample(50 if quick else 2000, hops, generator).to(trained.device)
    right = trained.eval()(batch.tokens).logits.argmax(dim=-1) == batch.targets
    if isinstance(arm.task, Addition):
        share = right[:, -arm.task.answer_digits :].all(dim=1)
    else:
        share = right.gather(1, batch.answer_at[:, None])[:, 0]
    return {"accuracy": float(share.float().mean())}


def accuracy(run: RunResult) -> float:
    return float(run.curve["accuracy"])


def solves(runs: Sequence[RunResult]) -> int:
    """In how many seeds at least 99% are right."""
    return sum(accuracy(run) >= SOLVED for run in runs)


def judge(results: Sequence[RunResult]) -> Finding:
    """A task tests the claim if 6 layers solve it (99% right) in at least 4 of 5 seeds, and one
    layer run once answers at most 60% in the mean. Premise: at least two of three tasks do.

    On each of these one layer looped six times solves the task in at least 4 of 5 seeds, and in at
    most one seed fewer than 6 layers do. The first of them is central."""
    groups = by_arm(results)
    statements: dict[str, bool] = {}
    unfit, parts, untested = [], [], []
    for task in TASKS:
        deep, looped, once = (groups[name_of(task, shape)] for shape in SHAPES)
        low = statistics.mean(map(accuracy, once))
        if solves(deep) < ENOUGH * len(deep) or low > LOW:
            unfit.append(f"{task} (6 layers {solves(deep)} of {len(deep)}, one layer {low:.0%})")
            shares = (statistics.mean(map(accuracy, runs)) for runs in (looped, deep))
            untested.append("{} {:.0%}, 6 layers {:.0%}".format(task, *shares))
            continue
        fine = solves(looped) >= max(ENOUGH * len(looped), solves(deep) - FEWER)
        statements[
            f"{task}: 1 x 6 solves it in {solves(looped)} of {len(looped)} seeds, 6 x 1 in "
            f"{solves(deep)}; 1 x 1 answers {low:.0%}"
        ] = fine
        parts.append(f"{task} {solves(looped)}/{len(looped)}")
    met = len(statements) >= 2
    left = f" Tasks that do not test it: {', '.join(unfit)}." if unfit else ""
    sentence = (
        "The premise is two tasks that 6 layers solve and one does not: "
        f"{'met' if met else 'not met'}. {as_sentence(statements)}{left}"
    )
    solved = f"Solved by seeds: {', '.join(parts)}" if parts else "No task tests it"
    brief = f"{'; '.join([solved, *untested])}."
    verdict = by_bars(statements or {"": False}, premise=met)
    return Finding(verdict, sentence, table_of(results, COLUMNS), brief)


COLUMNS = (
    Column("right [%]", accuracy, percent, ".4f"),
    Column("seeds at 99%", accuracy, lambda values: succeeded(values, SOLVED), ".4f"),
)


def draw(results: Sequence[RunResult]) -> tuple[Any, list[dict[str, object]]]:
    """Accuracy of every seed by shape, a panel per task."""
    panels = study_plots.Panels()
    rows: list[dict[str, object]] = []
    for run in results:
        task, shape = run.arm.split(", ")
        kind = "looped" if shape == "1 x 6" else "layers of their own"
        panels.add(task, kind, shape, 100 * accuracy(run))
        rows.append({"task": task, "shape": shape, "seed": run.seed, **run.curve})
    figure = study_plots.dot_panels(
        panels,
        order=["1 x 1", "1 x 6", "6 x 1"],
        x_label="layers x loops; a dot per seed",
        y_label="right [%]",
    )
    return figure, rows


STUDY = Study(
    name="looped-layers",
    claim="One layer looped 6 times does what 6 layers do, with a sixth of their parameters.",
    headline="One layer looped 6 times equals 6 layers (Saunshi et al.)",
    paper="p-hop 99.9 against 99.9%; sums 99.9 against 100% (1 layer looped 6 or 12 times)",
    source="Saunshi et al. (arXiv 2502.17416)",
    method=(
        "p-hop induction (p = 4, 4 symbols, 32 places), sums of two numbers of 3 digits (right if "
        "every digit is), and words of 6 swaps of neighbours in the symmetric group S_5; width "
        "64, no prelude, no coda, no injection; 1000, 3000 and 2400 steps of 32 problems. Rates: "
        "the best of three for 1 x 6 and for 6 x 1, by the validation loss of one other seed; 1 x "
        "1 has the rate of 1 x 6. 2000 problems."
    ),
    setups=(
        ("p-hop", "p = 16 and 32, 256 places", "p = 4, 32 places"),
        ("sums", "8 to 32 operands of 3 digits", "2 operands of 3 digits"),
        ("group words", "as i-GSM and math tasks; S_5 here from Barrington", "6 letters"),
    ),
    caption=(
        "One layer looped 6 times solves p-hop and sums as 6 layers do, where one layer run once "
        "fails. On words of S_5, which neither solves in these steps, it stays 21 points behind. "
        "Problems answered right; a dot per seed."
    ),
    deviations=(
        "After the runs, the line for the table of all studies was made to name the task that "
        "does not count, S_5. The bars and the verdict are as they were.",
        "Seeds 5 to 7 came later than the others; with 0 to 4 the loop solved p-hop in 5 of 5.",
    ),
    not_shown=(
        "That it holds where 6 layers are not perfect: on words of S_5, which the rule leaves out "
        "for that, the loop is behind in every seed. Longer training was not tried.",
        "The papers' sizes, and language.",
        "Rates that are safe for the worst seed: one trial seed may miss a rate at the cliff.",
        "Blocks of several layers looped, such as 2 x 3 and 3 x 2.",
    ),
    arms=arms,
    measure=measure,
    judge=judge,
    draw=draw,
    columns=COLUMNS,
)
