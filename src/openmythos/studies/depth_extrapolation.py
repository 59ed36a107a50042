"""Does a loop answer longer chains than it was trained on, where layers that fit as well do not?"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from openmythos.analysis import study_plots
from openmythos.eval.accuracy import accuracy_map
from openmythos.model.config import MythosConfig
from openmythos.model.mythos import OpenMythos
from openmythos.recurrence.loop_sampling import FixedLoops
from openmythos.studies.learning import TASK_TRAINING, looped, on_task, stacked
from openmythos.studies.statistics import percent
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
    percent_columns,
    table_of,
    to_json,
)
from openmythos.tasks import KHop
from openmythos.train.optim import AdamW

HOPS = (5, 8, 10, 12, 15, 20, 25, 30, 40, 60)
TO_20, TO_10, TO_5 = "looped, to 20 hops", "looped, to 10 hops", "looped, to 5 hops"
STACK_10, STACK_20 = "22 layers, to 10 hops", "22 layers, to 20 hops"
LEARNED = {TO_20: 20, TO_10: 10, TO_5: 5, STACK_10: 10, STACK_20: 20}  # most hops in training
FITS = 0.99  # at the most hops of training
BAR_30, BAR_60, BAR_SHORT = 0.99, 0.95, 0.9
LOOP_15, STACK_15 = 0.9, 0.5  # at 15 hops, of what fits 10
OVERTHINKS = 0.02  # points lost from T to 3T loops


def loops_for(hops: int) -> int:
    """How often to loop, fixed before any run: about one loop per hop, and some more."""
    return math.ceil(1.2 * hops) + 6


def arms() -> list[Arm]:
    full = stacked(22, 64, window=0)
    return [
        _arm(TO_20, looped(), steps=1600, why="the claim"),
        _arm(TO_10, looped(), steps=1400, why="range of training, and equal fit with layers"),
        _arm(TO_5, looped(), steps=2400, why="range of training"),
        replace(
            _arm(STACK_10, full, steps=4800, why="depth without sharing, full attention"),
            rates=(1e-3, 2e-3, 4e-3),
            trial_seeds=1,
            most_seeds=3,
        ),
        replace(
            _arm(STACK_20, full, steps=3200, why="the same at twice the loops' steps"),
            tuned_as=STACK_10,
            most_seeds=2,
        ),
    ]


def _arm(name: str, model: MythosConfig, steps: int, why: str) -> Arm:
    training = replace(TASK_TRAINING, num_steps=steps)
    if model.num_loops == 1:
        adamw = AdamW(lr=1e-3, weight_decay=0.05, beta1=0.9, beta2=0.98)
        training = replace(training, loops=FixedLoops(mean_loops=1), optimizer=adamw)
    run = on_task(model, KHop(), training, max_hops=LEARNED[name])
    return Arm(name=name, run=run, why=why)


def measure(model: OpenMythos, arm: Arm, quick: bool) -> dict[str, Any]:
    """Accuracy by hops at the loops of the rule, and at three times as many."""
    found: dict[str, dict[int, float]] = {"right": {}, "later": {}}
    for hops in (2, 4) if quick else HOPS:
        loops = loops_for(hops) if arm.model.num_loops > 1 else 1
        asked = (loops, 3 * loops) if loops > 1 else (1,)
        by_loops = accuracy_map(model, arm.task, (hops,), asked, examples=20 if quick else 400)
        found["right"][hops] = by_loops[hops][asked[0]]
        found["later"][hops] = by_loops[hops][asked[-1]]
    return {name: to_json(shares) for name, shares in found.items()}


def right(run: RunResult, hops: int) -> float:
    """Share right at so many hops; in a quick run at the nearest that it asks."""
    shares = curve_of(run.curve["right"])
    return shares[min(shares, key=lambda n: abs(n - hops))]


def lost(run: RunResult) -> float:
    """The largest drop in accuracy with three times the loops, over the hops that are solved."""
    shares, later = curve_of(run.curve["right"]), curve_of(run.curve["later"])
    solved = [hops for hops, share in shares.items() if share >= BAR_SHORT]
    return max((shares[hops] - later[hops] for hops in solved), default=0.0)


def judge(results: Sequence[RunResult]) -> Finding:
    """Premise: trained to 10 hops, loop and layers each answer at least 99% at 10 hops, in the
    mean of the seeds, so that they are compared at equal fit.

    Central: of these, at 15 hops, the loop answers at least 90% and the layers at most 50%. Trained
    to 20 hops the loop answers at least 99% at 30 and 95% at 60. Trained to 5 it answers at least
    90% at 10. Three times the loops cost no arm with a loop more than 2 points anywhere that it
    answers 90%. Loops are those of a rule, 1.2 per hop and 6 more."""
    groups = by_arm(results)

    def mean(arm: str, hops: int) -> float:
        return statistics.mean(right(run, hops) for run in groups[arm])

    fits = {arm: mean(arm, LEARNED[arm]) for arm in LEARNED}
    met = min(fits[TO_10], fits[STACK_10]) >= FITS
    most_lost = max(lost(run) for name in (TO_20, TO_10, TO_5) for run in groups[name])
    statements = {
        f"trained to 10 hops, at 15 the loop answers {mean(TO_10, 15):.1%} (at least 90), 22 "
        f"layers {mean(STACK_10, 15):.1%} (at most 50)": (
            mean(TO_10, 15) >= LOOP_15 and mean(STACK_10, 15) <= STACK_15
        ),
        f"trained to 20, {mean(TO_20, 30):.1%} at 30 hops (at least 99) and {mean(TO_20, 60):.1%} "
        "at 60 (at least 95)": mean(TO_20, 30) >= BAR_30 and mean(TO_20, 60) >= BAR_60,
        f"trained to 5, {mean(TO_5, 10):.1%} at 10 (at least 90)": mean(TO_5, 10) >= BAR_SHORT,
        f"three times the loops cost at most {100 * most_lost:.1f} points (at most 2)": (
            most_lost <= OVERTHINKS
        ),
    }
    sentence = (
        f"The premise is equal fit: at 10 hops the loop answers {fits[TO_10]:.1%}, 22 layers "
        f"{fits[STACK_10]:.1%} (at least 99): {'met' if met else 'not met'}. "
        f"{as_sentence(statements)} Without a bar: 22 layers trained to 20 hops answer "
        f"{fits[STACK_20]:.1%} there and {mean(STACK_20, 30):.1%} at 30."
    )
    brief = (
        f"20 to 60 hops: {mean(TO_20, 60):.1%}, 10 to 15: {mean(TO_10, 15):.0%}, "
        f"5 to 10: {mean(TO_5, 10):.0%}."
    )
    return Finding(by_bars(statements, premise=met), sentence, table_of(results, COLUMNS), brief)


COLUMNS = (
    *percent_columns("{} hops [%]", right, (5, 10, 15, 20, 30, 60)),
    Column("lost by 3 times the loops [%]", lost, percent),
)


def draw(results: Sequence[RunResult]) -> tuple[Any, list[dict[str, object]]]:
    """Accuracy by hops at the loops of the rule, and at three times as many."""
    panels = {"right": study_plots.Lines(), "later": study_plots.Lines()}
    rows: list[dict[str, object]] = []
    for run in results:
        for name, lines in panels.items():
            for hops, share in curve_of(run.curve[name]).items():
                if name == "right" or "looped" in run.arm:
                    lines.add(run.arm, hops, share)
                row = {"arm": run.arm, "seed": run.seed, "hops": hops, "loops": name}
                rows.append(row | {"accuracy": share})
    titles = ("1.2 loops per hop and 6 more", "three times as many")
    figure = study_plots.line_panels(
        dict(zip(titles, panels.values(), strict=True)),
        x_labels=["hops"],
        y_labels=["right [%]"],
        percent=True,
        note=bands_note(results),
    )
    return figure, rows


STUDY = Study(
    name="depth-extrapolation",
    claim="A looped model answers longer chains than it was trained on by looping more.",
    headline="More loops answer longer chains (Loop, Think & Generalize)",
    paper="20-22 hops trained, up to 40 answered; also 5 to 10 (30 M parameters)",
    source="Loop, Think & Generalize; OpenMythos announcement",
    method=(
        "k-hop over parametric facts (20 entities, 4 relations that are random permutations, drawn "
        "anew for every seed), a target at every prefix; curriculum on the hops, loops in training "
        "= hops + uniform(0 to 6). One prelude, one recurrent and one coda layer of width 64, "
        "window 8, for 1600 (to 20 hops), 1400 (to 10) and 2400 steps (to 5); 22 layers of the "
        "same width with full attention for 4800 (to 10 hops) and 3200 steps (to 20) at the best "
        "of three rates. 400 unseen chains per number of hops."
    ),
    setups=(
        ("model", "30 M, full attention, NoPE, read-out token", "0.15 M, window 8, RoPE"),
        ("training", "to 20-22 hops, answer only", "to 20, 10 or 5 hops, every prefix"),
        ("loops at inference", "best, or by entropy", "a rule fixed beforehand"),
    ),
    caption=(
        "A loop that was trained on chains of 20 answers 60, one trained on 10 answers 15 to 30, "
        "and one trained on 5 nothing longer. 22 layers learn 10 and fail at 15. Chains answered "
        "right, at 1.2 loops per hop and 6 more (left), and at three times as many (right)."
    ),
    not_shown=(
        "Language: the task is synthetic and its facts fit in the weights.",
        "The papers' model: see ltg-as-published. Window, targets at every prefix, and loops that "
        "follow the hops help the loop here; what-extrapolation-needs takes some of them away.",
        "The loops' learning rate is one that was found on another table of facts; the layers' is "
        "tuned.",
    ),
    deviations=(
        "In a first run the 22 layers trained to 10 hops had 2,400 steps and answered 61.6% at 10 "
        "hops: too few for the premise. They were trained anew with twice the steps; the rule and "
        "all other arms are as they were.",
    ),
    arms=arms,
    measure=measure,
    judge=judge,
    draw=draw,
    columns=COLUMNS,
)
