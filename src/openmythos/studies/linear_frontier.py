"""How many positions does a loop solve, and do as many loops as that says suffice?"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from openmythos.analysis import study_plots
from openmythos.eval.accuracy import ASKED_SEED
from openmythos.eval.likelihood import logits_by_loops
from openmythos.model.mythos import OpenMythos
from openmythos.recurrence.loop_sampling import FixedLoops
from openmythos.studies.learning import TASK_TRAINING, looped, on_task
from openmythos.studies.statistics import percent, plus_minus
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
    grid_of,
    lines_of,
    percent_columns,
    table_of,
    to_json,
)
from openmythos.tasks import KHop

TRAINED = 12  # hops
LOOPS = (8, 12, 18)  # of training, an arm each
MEASURED = tuple(range(1, 61))
LONGEST = 60
ASKED = (TRAINED, 18, 24, 36)
SOLVED = 0.9  # share right up to the frontier
NEAR = 0.25  # of what n / T predicts
STRAIGHT = 0.95  # R^2
FITS, HALTS = 0.99, 0.95


def name_of(loops: int) -> str:
    return f"{loops} loops in training"


def arms() -> list[Arm]:
    return [
        Arm(
            name=name_of(loops),
            factors={"loops": str(loops)},
            run=on_task(
                replace(looped(), num_loops=loops),
                KHop(),
                replace(TASK_TRAINING, num_steps=2000, loops=FixedLoops(mean_loops=loops)),
                max_hops=TRAINED,
            ),
        )
        for loops in LOOPS
    ]


def predicted(arm: str) -> float:
    """Positions per loop that training asks for: its hops over its loops."""
    return TRAINED / next(loops for loops in LOOPS if name_of(loops) == arm)


@torch.no_grad()
def measure(model: OpenMythos, arm: Arm, quick: bool) -> dict[str, Any]:
    """Of chains of 60 hops, the frontier by loops, and the share right by hops and loops.

    Every prefix of a chain is a problem: one pass answers all numbers of hops.
    """
    hops, loops = (6, (1, 2, 3)) if quick else (LONGEST, MEASURED)
    batch = arm.task.sample(
        20 if quick else 300, hops, torch.Generator().manual_seed(ASKED_SEED)
    ).to(model.device)
    frontier: dict[int, float] = {}
    grid: dict[int, dict[int, float]] = {h: {} for h in (2, *ASKED) if h <= hops}
    for count, logits in logits_by_loops(model.eval(), batch.tokens, loops).items():
        right = (logits.argmax(dim=-1) == batch.targets).float().mean(dim=0)[1:]
        failed = (right < SOLVED).nonzero()
        frontier[count] = float(failed[0]) if len(failed) else float(hops)
        for h, row in grid.items():
            row[count] = float(right[h - 1])
    return {"frontier": to_json(frontier), "right": to_json(grid)}


def line(run: RunResult) -> tuple[float, float]:
    """(positions per loop, R^2) of a line through the frontier, while it moves on.

    That is from the first loop that solves a position to the first that solves most, or all.
    """
    frontier = curve_of(run.curve["frontier"])
    end = min(n for n, x in frontier.items() if x == max(frontier.values()))
    points = [(n, x) for n, x in sorted(frontier.items()) if x > 0 and n <= end]
    if len(points) < 3 or len({x for _, x in points}) == 1:
        return 0.0, 0.0
    loops, reached = zip(*points, strict=True)
    slope, _ = statistics.linear_regression(loops, reached)
    return slope, statistics.correlation(loops, reached) ** 2


def speed(run: RunResult) -> float:
    return line(run)[0]


def right(run: RunResult, hops: int, loops: int) -> float:
    """Share right; in a quick run, which asks less, at its most hops and loops."""
    grid = grid_of(run.curve["right"])
    row = grid[min(hops, max(grid))]
    return row[min(loops, max(row))]


def halted(run: RunResult, hops: int) -> float:
    """Share right after as many loops as the hops need at the speed of training."""
    return right(run, hops, math.ceil(hops / predicted(run.arm)))


def fits(run: RunResult) -> float:
    """Share right at the hops and loops of training."""
    return right(run, TRAINED, round(TRAINED / predicted(run.arm)))


def judge(results: Sequence[RunResult]) -> Finding:
    """Premise: every arm answers at least 99% at the 12 hops and the loops of training.

    Central: in every arm the frontier moves by n / T positions per loop, within a quarter of it
    in the mean of the seeds. A line through it has an R^2 of at least 0.95 in the mean of every
    arm. At 24 hops, twice the trained, ceil(hops T / n) loops answer at least 95% in every arm."""
    groups = by_arm(results)
    speeds = {name: statistics.mean(map(speed, runs)) for name, runs in groups.items()}
    errors = {name: abs(v / predicted(name) - 1) for name, v in speeds.items()}
    straight = min(statistics.mean(line(run)[1] for run in runs) for runs in groups.values())
    stops = min(statistics.mean(halted(run, 24) for run in runs) for runs in groups.values())
    fitted = min(statistics.mean(map(fits, runs)) for runs in groups.values())
    found = ", ".join(f"{speeds[name]:.2f} for {predicted(name):.2f} ({name})" for name in groups)
    statements = {
        f"positions per loop: {found}": max(errors.values()) <= NEAR,
        f"a line through the frontier has an R^2 of at least {straight:.3f} (at least 0.95)": (
            straight >= STRAIGHT
        ),
        f"at 24 hops as many loops as that speed needs answer at least {stops:.1%} (at least 95)": (
            stops >= HALTS
        ),
    }
    met = fitted >= FITS
    sentence = (
        f"The premise is that {TRAINED} hops are learned at every number of loops ({fitted:.1%}, "
        f"at least 99): {'met' if met else 'not met'}. {as_sentence(statements)}"
    )
    shown = ", ".join(f"{v:.1f}" for v in speeds.values())
    wanted = ", ".join(f"{predicted(name):.1f}" for name in groups)
    brief = f"Positions per loop {shown} where training asks for {wanted}; R^2 {straight:.2f}."
    return Finding(by_bars(statements, premise=met), sentence, table_of(results, COLUMNS), brief)


COLUMNS = (
    Column("trained hops and loops [%]", fits, percent),
    Column("positions per loop", speed, lambda values: plus_minus(values, digits=2), ".2f"),
    Column("asked by training", lambda run: predicted(run.arm), lambda v: f"{v[0]:.2f}", ".2f"),
    Column("R^2", lambda run: line(run)[1], plus_minus),
    *percent_columns("{} hops, halted [%]", halted, ASKED[1:]),
)


def draw(results: Sequence[RunResult]) -> tuple[Any, list[dict[str, object]]]:
    """The frontier by loops with the lines that training predicts, and accuracy when halted."""
    frontier, rows = lines_of(
        results, lambda run: curve_of(run.curve["frontier"]), "loops", "frontier"
    )
    halts, points = lines_of(
        results, lambda run: {hops: 100 * halted(run, hops) for hops in ASKED}, "hops", "right [%]"
    )
    laws = []
    for name in by_arm(results):
        v = predicted(name)
        laws.append(f"n / T = {v:.2g}")
        for loops in (1, min(MEASURED[-1], int(LONGEST / v))):
            frontier.add(laws[-1], loops, v * loops)
    figure = study_plots.line_panels(
        {"hops solved (90% right at all up to there)": frontier, "ceil(hops T / n) loops": halts},
        x_labels=["num_loops at inference", "hops"],
        y_labels=["frontier [hops]", "right [%]"],
        laws=laws,
        note=bands_note(results),
    )
    return figure, rows + points


STUDY = Study(
    name="linear-frontier",
    claim=(
        "A loop solves a fixed number of positions, the trained length over the trained loops, "
        "also beyond both; it may stop after as many loops as that says."
    ),
    headline="A loop solves n/T positions, beyond training too (linear frontier)",
    paper="v = n / T with R^2 0.99; halting at ceil(n / v)",
    source="arXiv 2607.20594",
    method=(
        "k-hop as in depth-extrapolation (20 entities, 4 relations, drawn anew for every seed; "
        "window 8), trained to 12 hops at a fixed 8, 12 or 18 loops, 2000 steps. 300 chains of "
        "60 hops are read at 1 to 60 loops; the frontier is the largest number of hops up to "
        "which each is right in at least 90%. Its line is fitted up to where it is largest."
    ),
    setups=(
        ("task", "algorithmic tasks along a sequence", "chains of lookups"),
        ("trained length and loops", "several", "12 hops, and 8, 12 or 18 loops"),
    ),
    caption=(
        "Left: hops that are solved by loops at inference go along a line, as training asks for "
        "(dashed), but for 8 loops, in which 12 hops are not learned. Right: chains right "
        "after as many loops as those lines ask for: only the slowest model stays right far beyond "
        "training."
    ),
    not_shown=(
        "Other tasks, and more positions per loop than 1.5; a window of 8 tokens allows seven.",
        "Loops drawn at random in training: then no speed is asked for.",
        "Learning rates tuned for each number of loops.",
        "12 hops in 6 loops: a trial of 900 steps on another table of facts, before the rule was "
        "fixed, did not learn them, and solved one hop per loop up to 12.",
    ),
    arms=arms,
    measure=measure,
    judge=judge,
    draw=draw,
    columns=COLUMNS,
)
