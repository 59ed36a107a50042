"""Written steps, latents, pauses, loops or depth: what lets two layers follow a chain?"""

import functools
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openmythos.analysis import study_plots
from openmythos.eval.accuracy import ASKED_SEED, VALIDATION_SEED, answers
from openmythos.inference.generation import Request, latent_step, prefill
from openmythos.kernels.cross_entropy import IGNORE
from openmythos.model.config import MythosConfig
from openmythos.model.mythos import OpenMythos
from openmythos.planning.cost import Flops
from openmythos.recurrence.loop_sampling import FixedLoops
from openmythos.studies.learning import TASK_TRAINING, looped_block, on_task
from openmythos.studies.loops_against_tokens import MFLOP, milliseconds
from openmythos.studies.statistics import mcnemar, percent, plus_minus
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
    lines_of,
    percent_columns,
    table_of,
    to_json,
)
from openmythos.tasks import KHop, Task, TaskBatch
from openmythos.tasks.reasoning import (
    LatentThoughts,
    NoThoughts,
    PauseThoughts,
    Thoughts,
    WrittenThoughts,
)
from openmythos.train.config import RunConfig, TaskData, TiedLoops
from openmythos.train.optim import AdamW

MOST = 6  # hops
TASK = KHop(supervision="answer", readout="padded", max_hops=MOST)
MORE = 2  # loops beyond the hops
STEPS, BATCH = 2500, 64
PLAIN, WRITTEN, LATENTS = "2 layers", "2 layers, written steps", "2 layers, latents"
PAUSES, LOOPS, DEEP = "2 layers, pauses", "2 layers, looped", "8 layers"
SOLVED, CLOSE, GAIN, SURE = 0.9, 0.05, 0.15, 0.01
NEEDED = 1 - GAIN  # what two layers alone may reach at most, so that the gain has room


def arms() -> list[Arm]:
    rates = (1e-3, 2e-3, 4e-3)
    return [
        Arm(name=PLAIN, run=_run(NoThoughts()), rates=rates, trial_seeds=1),
        Arm(name=WRITTEN, run=_run(WrittenThoughts()), rates=rates, trial_seeds=1),
        Arm(name=LATENTS, run=_run(LatentThoughts()), tuned_as=WRITTEN),
        Arm(
            name=PAUSES,
            run=_run(PauseThoughts()),
            why="the same positions and curriculum, but nothing is fed back",
            tuned_as=WRITTEN,
        ),
        Arm(name=LOOPS, run=_run(NoThoughts(), loops=MOST + MORE), tuned_as=PLAIN),
        Arm(name=DEEP, run=_run(NoThoughts(), layers=8), why="depth alone", tuned_as=PLAIN),
    ]


def _run(thoughts: Thoughts, layers: int = 2, loops: int = 1) -> RunConfig:
    model: MythosConfig = looped_block(TASK, layers, loops)
    model = replace(model, vocab_size=TASK.vocab_size + 1)  # a blank in every arm
    training = replace(
        TASK_TRAINING,
        num_steps=STEPS,
        batch_size=BATCH,
        optimizer=AdamW(lr=2e-3, weight_decay=0.05, beta2=0.98),
        loops=TiedLoops(extra=2 * MORE) if loops > 1 else FixedLoops(mean_loops=1),
    )
    hops = {"min_hops": 1, "first_hops": MOST, "max_hops": MOST}
    return on_task(model, TASK, training, thoughts=thoughts, **hops)


def _data(run: RunConfig) -> TaskData:
    assert isinstance(run.data, TaskData)
    return run.data


def loops_for(run: RunConfig, hops: int) -> int:
    """The number of loops at inference."""
    return hops + MORE if run.model.num_loops > 1 else 1


@torch.no_grad()
def score(model: OpenMythos, run: RunConfig) -> float:
    """Mean loss of what is learned at the end of the curriculum, on problems of every length."""
    losses = []
    for hops in range(1, MOST + 1):
        generator = torch.Generator().manual_seed(VALIDATION_SEED + hops)
        batch = _data(run).problems(200, hops, generator).to(model.device)
        loops = loops_for(run, hops)
        logits = model.eval()(batch.tokens, latents=batch.latents, num_loops=loops).logits
        rows, targets = logits.flatten(0, 1).float(), batch.targets.flatten()
        losses.append(float(F.cross_entropy(rows, targets, ignore_index=IGNORE)))
    return statistics.mean(losses)


@torch.no_grad()
def measure(model: OpenMythos, arm: Arm, quick: bool) -> dict[str, Any]:
    """Accuracy by hops; of the longest problems each answer, FLOPs and milliseconds."""
    model.eval()
    found: dict[int, float] = {}
    for hops in range(1, MOST + 1):
        batch = _problems(model, arm.task, 20 if quick else 1000, hops)
        right = _answer(model, arm, batch, hops) == batch.answers()
        found[hops] = float(right.float().mean())
    curve: dict[str, Any] = {"accuracy": to_json(found)}
    curve["right"] = "".join("01"[hit] for hit in right.tolist())
    thoughts = _data(arm.run).thoughts
    if isinstance(thoughts, LatentThoughts):
        blind = without_latents(model, batch.tokens, MOST) == batch.answers()
        curve["zeroed"] = float(blind.float().mean())
    one = _problems(model, arm.task, 1, MOST)
    work = functools.partial(_answer, model, arm, one, MOST)
    positions = one.tokens.shape[1] + (MOST if thoughts.kind != "none" else 0)
    curve["flops"] = positions * Flops(arm.model, positions).forward(loops_for(arm.run, MOST))
    curve["milliseconds"] = milliseconds(work, repeats=2 if quick else 30)
    return curve


def _problems(model: OpenMythos, task: Task, count: int, hops: int) -> TaskBatch:
    generator = torch.Generator().manual_seed(ASKED_SEED + hops)
    return task.sample(count, hops, generator).to(model.device)


def _answer(model: OpenMythos, arm: Arm, batch: TaskBatch, hops: int) -> Tensor:
    thoughts, loops = _data(arm.run).thoughts, loops_for(arm.run, hops)
    return answers(model, arm.task, thoughts, batch.tokens, hops, num_loops=loops)


def without_latents(model: OpenMythos, tokens: Tensor, hops: int) -> Tensor:
    """The answers after as many latent steps, each of which is fed zeros."""
    request, (batch, seq) = Request(num_loops=1), tokens.shape
    cache = model.new_cache(batch, seq + hops, num_loops=1)
    logits, _ = prefill(model, tokens, request, cache)
    for _ in range(hops):
        assert cache.hidden is not None
        cache.hidden = torch.zeros_like(cache.hidden)
        logits, _ = latent_step(model, request, cache)
    return logits.argmax(dim=-1)


def accuracy(run: RunResult, hops: int = MOST) -> float:
    """Share right at so many hops."""
    return curve_of(run.curve["accuracy"])[hops]


def _zeroed(run: RunResult) -> float | None:
    found = run.curve.get("zeroed")
    return None if found is None else float(found)


COLUMNS = (
    *percent_columns("{} hops [%]", accuracy, (1, 2, 3, 4, MOST)),
    Column("latents zeroed [%]", _zeroed, percent),
    MFLOP,
    Column(
        "CPU ms per answer",
        lambda run: float(run.curve["milliseconds"]),
        lambda values: plus_minus(values, digits=2),
        ".2f",
    ),
)


def judge(results: Sequence[RunResult]) -> Finding:
    """Premise: at 6 hops two layers alone are right in at most 85%, and the best arm in at least
    90%, so that the problems were learned.

    Central: looped they are right in at least 90%, and at most 5 points less than with written
    steps, while they emit the answer alone. Latents gain at least 15 points over two layers alone;
    they are right more often than pauses under the same curriculum (McNemar's exact test on all
    problems of all seeds, p < 0.01); feeding zeros in their place costs at least 15 points. Means
    of the seeds."""
    groups = by_arm(results)
    share = {name: statistics.mean(map(accuracy, runs)) for name, runs in groups.items()}
    zeroed = statistics.mean(run.curve["zeroed"] for run in groups[LATENTS])
    first, second = (
        {run.seed: run.curve["right"] for run in groups[name]} for name in (LATENTS, PAUSES)
    )
    both = [
        (a == "1", b == "1")
        for seed in first.keys() & second.keys()
        for a, b in zip(first[seed], second[seed], strict=True)
    ]
    chance = mcnemar(both)
    enough = max(SOLVED, share[WRITTEN] - CLOSE)
    gained, lost = share[LATENTS] - share[PLAIN], share[LATENTS] - zeroed
    statements = {
        f"looped, two layers answer {share[LOOPS]:.1%} (at least {enough:.1%}; with written steps "
        f"{share[WRITTEN]:.1%})": share[LOOPS] >= enough,
        f"latents gain {100 * gained:+.1f} points over two layers alone": gained >= GAIN,
        f"latents {share[LATENTS]:.1%} against pauses {share[PAUSES]:.1%}, p = {chance:.2g}": (
            share[LATENTS] > share[PAUSES] and chance < SURE
        ),
        f"without what they feed back {100 * lost:.1f} points are lost": lost >= GAIN,
    }
    best = max(share.values())
    met = share[PLAIN] <= NEEDED and best >= SOLVED
    sentence = (
        f"The premise is that two layers alone do not suffice for {MOST} hops ({share[PLAIN]:.1%}, "
        f"at most {NEEDED:.0%}), and that some arm does ({best:.1%}, at least {SOLVED:.0%}): "
        f"{'met' if met else 'not met'}. {as_sentence(statements)} Without a bar: 8 layers answer "
        f"{share[DEEP]:.1%}."
    )
    brief = (
        f"Alone {share[PLAIN]:.0%}, looped {share[LOOPS]:.0%}, written {share[WRITTEN]:.0%}, "
        f"latents {share[LATENTS]:.0%}, pauses {share[PAUSES]:.0%}."
    )
    return Finding(by_bars(statements, premise=met), sentence, table_of(results, COLUMNS), brief)


def draw(results: Sequence[RunResult]) -> tuple[Any, list[dict[str, object]]]:
    """Accuracy by hops."""
    by_hops, rows = lines_of(
        results, lambda run: curve_of(run.curve["accuracy"]), "hops", "accuracy"
    )
    figure = study_plots.line_panels(
        {"": by_hops},
        x_labels=["hops"],
        y_labels=["right [%]"],
        percent=True,
        note=bands_note(results),
    )
    return figure, rows


STUDY = Study(
    name="latent-reasoning",
    claim="Loops and latents let two layers follow a chain as far as written steps do.",
    headline="Reasoning in latents and loops replaces written steps (Coconut)",
    paper="ProsQA: written 77.5, none 76.7, latents 97.0, pauses with the curriculum 96.6 (GPT-2)",
    source="Coconut (arXiv 2412.06769); superposition in latents (arXiv 2505.12514)",
    method=(
        "k-hop over 20 entities and 4 relations, drawn anew for every seed: a first entity, 1 to 6 "
        "relations, padding, and a read-out token; the answer is the only target but of written "
        "steps. Width 64, full attention, 2500 steps of 64 problems. Written steps: the entities "
        "on the way, then the answer. Latents and pauses: a tenth of the training per stage, each "
        "of which replaces one more step and resets the optimizer; what follows the blanks is "
        "learned. Loops: as many as hops plus 0 to 4 in training, plus 2 in the test. 1000 unseen "
        "problems per number of hops; answers are generated greedily with a cache. Learning rate: "
        "best of three for two layers alone and with written steps, one trial each; latents and "
        "pauses use the latter's, loops and 8 layers the former's."
    ),
    setups=(
        ("model", "GPT-2, 124 M, pretrained", "2 layers, 0.1 M, from scratch"),
        ("problems", "ProsQA: search in graphs of 23 nodes, 3 to 6 hops", "chains of 1 to 6 facts"),
        ("curriculum", "a stage per step, optimizer reset", "the same"),
        ("latents per step", "1 (ProsQA)", "1"),
    ),
    caption=(
        "With the answer as the only target, loops do not get further than 8 layers or pauses; two "
        "layers that feed their state back as input, trained from written steps, answer every "
        "chain, as written steps do. Their curriculum sees the steps, loops do not."
    ),
    deviations=(
        "Looked at before the first run: two layers alone (5% at 6 hops) and with written steps "
        "(100% after 500 steps), on a table of facts that no run or trial has.",
    ),
    not_shown=(
        "Language, pretrained models, and problems longer than trained.",
        "Search: a chain has no branches, so that nothing can be held in superposition. Two layers "
        "of this width did not learn to read edges that stand in the question (ProsQA's form), "
        "written out in steps, in 12,000 steps of 32 problems (a trial before any run).",
        "Loops with a target at every step, which answer longer chains than these in "
        "depth-extrapolation; nor longer training: loops still vary between seeds (5 to 25%).",
        "Learning rates tuned for every arm.",
    ),
    arms=arms,
    measure=measure,
    judge=judge,
    draw=draw,
    columns=COLUMNS,
    score=score,
)
