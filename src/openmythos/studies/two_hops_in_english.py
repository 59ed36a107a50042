"""Two facts composed in a sentence, in a way of writing that training never used for them."""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from openmythos.analysis import study_plots
from openmythos.eval.likelihood import logits_by_loops
from openmythos.model.config import MythosConfig
from openmythos.model.mythos import OpenMythos
from openmythos.recurrence.loop_sampling import FixedLoops, UniformLoops
from openmythos.studies.learning import TASK_TRAINING, looped, on_task, stacked
from openmythos.studies.statistics import percent
from openmythos.studies.study import (
    Arm,
    Column,
    Finding,
    RunResult,
    Study,
    as_sentence,
    by_arm,
    by_bars,
    curve_of,
    table_of,
)
from openmythos.tasks import EnglishPairs
from openmythos.tasks.english import TWO
from openmythos.tasks.pairs import PARTS, Part
from openmythos.train.optim import WSD, AdamW

TASK = EnglishPairs()
DRAWN = UniformLoops(min_loops=2, max_loops=8, per="batch")
LOOPS = (2, 4, DRAWN.max_loops, 12)
KNOWN, NEW = 0, len(TWO) - 1  # ways of writing: one of training, and the one that it never uses
MOST = 500
LOOPED, DEEP, SHALLOW = "looped", "8 layers", "2 layers"
FITS, COMPOSES, NEVER = 0.95, 0.5, 0.15


def arms() -> list[Arm]:
    loop = replace(looped(window=0), prelude_layers=0, coda_layers=0, recurrent_layers=2)
    return [
        _arm(LOOPED, loop),
        _arm(DEEP, stacked(8, 64, window=0), why="depth without sharing"),
        _arm(SHALLOW, stacked(2, 64, window=0), why="parameters"),
    ]


def _arm(name: str, model: MythosConfig, why: str = "") -> Arm:
    training = replace(
        TASK_TRAINING,
        num_steps=6000,
        batch_size=128,
        loops=DRAWN if model.num_loops > 1 else FixedLoops(mean_loops=1),
        optimizer=AdamW(lr=1.5e-3, weight_decay=0.1, decay_embeddings=True, beta2=0.98),
        schedule=WSD(warmup=0.02, decay=0.6, final=0.03),
    )
    sized = replace(model, vocab_size=TASK.vocab_size)
    run = on_task(sized, TASK, training, min_hops=2, first_hops=2, max_hops=2)
    return Arm(name=name, run=run, why=why)


@torch.no_grad()
def ask(
    model: OpenMythos, task: EnglishPairs, part: Part, way: int, loops: Sequence[int], most: int
) -> dict[int, float]:
    """Share right of a part in one way of writing, by loops."""
    batch = task.asked(part, most, way).to(model.device)
    answers, found = batch.answers(), {}
    for count, logits in logits_by_loops(model.eval(), batch.tokens, loops).items():
        last = logits[torch.arange(len(answers)), batch.answer_at].float()
        found[count] = float((last.argmax(dim=-1) == answers).float().mean())
    return found


def measure(model: OpenMythos, arm: Arm, quick: bool) -> dict[str, Any]:
    """Share of pairs right by part, way of writing and loops."""
    loops = (1,) if arm.model.num_loops == 1 else LOOPS[:2] if quick else LOOPS
    task, most = arm.task, 20 if quick else MOST
    assert isinstance(task, EnglishPairs)
    return {
        f"{part}, {name}": {
            str(n): right for n, right in ask(model, task, part, way, loops, most).items()
        }
        for part in PARTS
        for name, way in (("known", KNOWN), ("new", NEW))
    }


def right(run: RunResult, part: Part, way: str = "known") -> float:
    """Share right after the most loops of training, or after the one of layers."""
    shares = curve_of(run.curve[f"{part}, {way}"])
    return shares[min(max(shares), DRAWN.max_loops)]


def judge(results: Sequence[RunResult]) -> Finding:
    """Premise: loop and 8 layers learn at least 95% of the pairs of training, in the mean.

    Central: of pairs of facts that training only asked alone the loop answers at least 50%, 8
    layers at most 15%. It answers at least 95% of held-out pairs, and at least 90% of these in the
    way of writing that training never uses for two hops."""
    groups = by_arm(results)

    def mean(arm: str, part: Part, way: str = "known") -> float:
        return statistics.mean(right(run, part, way) for run in groups[arm])

    met = min(mean(LOOPED, "train"), mean(DEEP, "train")) >= FITS
    statements = {
        f"pairs never composed: loop {mean(LOOPED, 'ood'):.1%} (at least 50), 8 layers "
        f"{mean(DEEP, 'ood'):.1%} (at most 15)": (
            mean(LOOPED, "ood") >= COMPOSES and mean(DEEP, "ood") <= NEVER
        ),
        f"held-out pairs: loop {mean(LOOPED, 'held_out'):.1%} (at least 95)": (
            mean(LOOPED, "held_out") >= FITS
        ),
        f"in the new way of writing {mean(LOOPED, 'held_out', 'new'):.1%} (at least 90)": (
            mean(LOOPED, "held_out", "new") >= FITS - 0.05
        ),
    }
    sentence = (
        f"The premise is that both learn what is asked in training (loop "
        f"{mean(LOOPED, 'train'):.1%}, 8 layers {mean(DEEP, 'train'):.1%}, at least 95): "
        f"{'met' if met else 'not met'}. {as_sentence(statements)} Without a bar: 2 layers answer "
        f"{mean(SHALLOW, 'held_out'):.1%} of held-out pairs."
    )
    brief = (
        f"Pairs never composed {mean(LOOPED, 'ood'):.0%}, 8 layers {mean(DEEP, 'ood'):.0%}; new "
        f"wording {mean(LOOPED, 'held_out', 'new'):.0%}."
    )
    return Finding(by_bars(statements, premise=met), sentence, table_of(results, COLUMNS), brief)


def _column(part: Part, way: str) -> Column:
    return Column(f"{part}, {way} [%]", lambda run: right(run, part, way), percent)


COLUMNS = tuple(_column(part, way) for part in PARTS for way in ("known", "new"))


def draw(results: Sequence[RunResult]) -> tuple[Any, list[dict[str, object]]]:
    """Every seed's share right by part, in the known and in the new way of writing."""
    panels = study_plots.Panels()
    rows: list[dict[str, object]] = []
    for run in results:
        for part in PARTS:
            for way in ("known", "new"):
                share = right(run, part, way)
                panels.add(f"{way} wording", run.arm, part, 100 * share)
                row = {"arm": run.arm, "seed": run.seed, "part": part, "wording": way}
                rows.append(row | {"right": share})
    figure = study_plots.dot_panels(
        panels, order=PARTS, x_label="pairs; a dot per seed", y_label="right [%]"
    )
    return figure, rows


STUDY = Study(
    name="two-hops-in-english",
    claim="A looped model composes in English sentences facts that it has only seen alone.",
    headline="Loops compose facts in sentences (Loop, Think & Generalize)",
    paper="none at this size; announcement: language models memorise, loops compose",
    source="OpenMythos announcement; Loop, Think & Generalize",
    method=(
        "The facts and pairs of unseen-compositions as sentences of words, such as 'the S of the R "
        "of A is', each in one of four ways; two hops are never asked in the fourth way in "
        "training. The only target is the answer. A block of two layers of width 64 looped 2 to 8 "
        "times with full attention, 8 and 2 layers; 6000 steps of 128 sentences, 40% of them "
        "single facts, weight decay 0.1, one rate for all."
    ),
    caption=(
        "All learn every pair that training asks. Held-out pairs, of facts that training composes "
        "in other pairs, begin to be answered in one seed of three each by the loop (50%) and by 8 "
        "layers (36%); pairs of facts never composed (ood) by none. Right: in a way of writing "
        "that training never used for two hops the loop answers 9% of the pairs that it knows, 8 "
        "layers 35%."
    ),
    deviations=(
        "In a first run, of 3000 steps with a weight decay of 0.9, rates were chosen by the ood "
        "loss. It is lowest where nothing is learned (a rate of 0.024, all arms at 1 to 6% of all "
        "pairs), so that the premise failed. Decay and rate are now those with which 8 layers in a "
        "trial of 3000 steps on facts that no run has, learned what training asks and 5% of "
        "held-out pairs; the loop was still learning, so the steps were doubled. Neither that run "
        "nor these trials are kept. The rule is as it was.",
    ),
    not_shown=(
        "A training of thousands of epochs, after which such models are reported to compose; here "
        "a pair is asked about a hundred times. In unseen-compositions, where the first hop is a "
        "target, too, the loop composes nine of ten.",
        "Learning rates tuned for each arm, other weight decays.",
        "Natural text: the sentences are of eight patterns, and names and relations are tokens.",
        "An upper bound by written steps.",
    ),
    arms=arms,
    measure=measure,
    judge=judge,
    draw=draw,
    columns=COLUMNS,
)
