"""Does a looped model stop by itself where a problem is solved, trained to or not?"""

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from openmythos.analysis import study_plots
from openmythos.data.loader import EvaluationBatch, evaluation_windows
from openmythos.eval.likelihood import logits_by_loops
from openmythos.model.mythos import OpenMythos
from openmythos.recurrence.exit_rules import (
    ExitRule,
    FixedExit,
    KLEntropyExit,
    KLExit,
    StateChangeExit,
)
from openmythos.recurrence.halting import ACT
from openmythos.recurrence.injection import LTI
from openmythos.recurrence.loop_sampling import PoissonLoops
from openmythos.studies.learning import looped, on_task
from openmythos.studies.statistics import percent, plus_minus
from openmythos.studies.study import (
    Arm,
    Finding,
    RunResult,
    Study,
    Verdict,
    by_arm,
    curve_of,
    factors_of,
    grid_of,
)
from openmythos.studies.text import TextRun, text_model, text_training
from openmythos.tasks import KHop

HOPS = (5, 10, 20, 30, 40)
CAP = 80
FIXED = (5, 8, 10, 12, 15, 18, 20, 22, 25, 28, 30, 35, 40, 45, 50, 60, CAP)
LOOPED, TEXT, ALL = "looped", "text", "all loops"
TEXT_CAP, TEXT_FIXED, WINDOW = 16, (1, 2, 3, 4, 6, 8, 12, 16), 128
PONDER = (1e-4, 1e-3, 1e-2)
SHARE, SPARE = 0.99, 5


def rules() -> dict[str, ExitRule]:
    """Exit rules without training; each decides for the whole prefix, or for each token."""
    whole: dict[str, StateChangeExit | KLExit | KLEntropyExit] = {
        "state change < 3%": StateChangeExit(threshold=0.03, scope="prefix", patience=2),
        "KL < 1e-3": KLExit(threshold=1e-3, scope="prefix", patience=2),
        "KL < 1e-3, entropy < 1": KLEntropyExit(
            threshold=1e-3, max_entropy=1.0, scope="prefix", patience=2
        ),
    }
    alone: dict[str, ExitRule] = {
        f"{name}, token": replace(rule, scope="token") for name, rule in whole.items()
    }
    return {**whole, **alone}


def arms() -> list[Arm]:
    act = [
        Arm(
            name=f"ACT, ponder {weight:g}",
            run=on_task(replace(looped(), halting=ACT(ponder_weight=weight)), KHop()),
            why="halting that is trained",
            factors={"data": "k-hop"},
            rates=(1.5e-3, 3e-3, 6e-3),
        )
        for weight in PONDER
    ]
    on_text = text_training(PoissonLoops(mean_loops=4.0, max_loops=12))
    texts = {TEXT: text_model(LTI())} | {
        f"{TEXT}, ACT, ponder {weight:g}": replace(
            text_model(LTI()), halting=ACT(ponder_weight=weight)
        )
        for weight in PONDER
    }
    return [
        Arm(name=LOOPED, run=on_task(looped(), KHop()), factors={"data": "k-hop"}),
        *act,
        *(
            replace(Arm.on_text(name, model, on_text), factors={"data": TEXT})
            for name, model in texts.items()
        ),
    ]


def measure(trained: OpenMythos | TextRun, arm: Arm, quick: bool) -> dict[str, Any]:
    if isinstance(trained, TextRun):
        return measure_text(trained, arm, quick)
    return measure_hops(trained, arm, quick)


@torch.no_grad()
def measure_text(trained: TextRun, arm: Arm, quick: bool) -> dict[str, Any]:
    """Per rule and per fixed number of loops, held-out nats per token and mean loops."""
    cap, batches = (3, 1) if quick else (TEXT_CAP, 12)
    asked: dict[str, ExitRule] = {ALL: FixedExit()}
    if arm.name == TEXT:
        asked.update(rules())
    loops = tuple(n for n in TEXT_FIXED if n <= cap)
    windows = evaluation_windows(trained.held_out, WINDOW, batch_size=16)
    losses, used = dict.fromkeys(asked, 0.0), dict.fromkeys(asked, 0.0)
    fixed, count = dict.fromkeys(map(str, loops), 0.0), 0.0

    def nats(logits: torch.Tensor, batch: EvaluationBatch) -> float:
        each = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
        return float((each * batch.weights.flatten()).sum())

    for window in itertools.islice(windows, batches):
        batch = window.to(trained.model.device)
        count += float(batch.weights.sum())
        for name, rule in asked.items():
            out = trained.model(batch.tokens, num_loops=cap, exit_rule=rule)
            losses[name] += nats(out.logits, batch)
            used[name] += float((out.recurrence.loops_used * batch.weights).sum())
        for n, logits in logits_by_loops(trained.model, batch.tokens, loops).items():
            fixed[str(n)] += nats(logits, batch)
    return {
        "rules": {name: [losses[name] / count, used[name] / count] for name in asked},
        "fixed": {n: loss / count for n, loss in fixed.items()},
    }


@torch.no_grad()
def measure_hops(model: OpenMythos, arm: Arm, quick: bool) -> dict[str, Any]:
    """Per rule and number of hops, accuracy and mean loops at the answer."""
    model.eval()
    hops, cap = ((2, 4), 6) if quick else (HOPS, CAP)
    asked: dict[str, ExitRule] = {ALL: FixedExit()}
    if arm.name == LOOPED:
        asked.update(rules())
    by_rule: dict[str, dict[str, list[float]]] = {name: {} for name in asked}
    fixed: dict[str, dict[str, float]] = {}
    pairs: dict[str, list[torch.Tensor]] = {name: [] for name in asked}
    for hop in hops:
        generator = torch.Generator().manual_seed(10_000 + hop)
        batch = arm.task.sample(20 if quick else 400, hop, generator).to(model.device)
        answers = batch.answers()

        def accuracy(logits: torch.Tensor, answers: torch.Tensor = answers) -> float:
            return float((logits[:, -1].argmax(dim=-1) == answers).float().mean())

        for name, rule in asked.items():
            out = model(batch.tokens, num_loops=cap, exit_rule=rule, last_only=True)
            used = out.recurrence.loops_used[:, -1].float()
            by_rule[name][str(hop)] = [accuracy(out.logits), float(used.mean())]
            pairs[name].append(torch.stack((torch.full_like(used, hop), used)))
        loops = tuple(n for n in FIXED if n <= cap)
        by_loops = logits_by_loops(model, batch.tokens, loops, last_only=True)
        fixed[str(hop)] = {str(n): accuracy(logits) for n, logits in by_loops.items()}
    ranks = {name: spearman(*torch.cat(parts, dim=1)) for name, parts in pairs.items()}
    return {"rules": by_rule, "fixed": fixed, "spearman": ranks}


class Stopped(NamedTuple):
    """Score of an exit rule, and the mean loops it used."""

    score: float  # accuracy; on text nats per token
    loops: float


def by_hops(run: RunResult, rule: str) -> dict[int, Stopped]:
    return {int(hops): Stopped(*row) for hops, row in run.curve["rules"][rule].items()}


def of_text(run: RunResult, rule: str) -> Stopped:
    return Stopped(*run.curve["rules"][rule])


def text_arms() -> set[str]:
    """The names of the arms that learn text."""
    return {name for name, factors in factors_of(arms()).items() if factors["data"] == TEXT}


def spearman(left: torch.Tensor, right: torch.Tensor) -> float:
    """Rank correlation; 0 where one side does not vary."""
    from scipy.stats import spearmanr  # takes most of a second to import

    if any(bool((side == side[0]).all()) for side in (left, right)):
        return 0.0
    return float(spearmanr(left.cpu(), right.cpu()).statistic)


def summarise(
    runs: Sequence[RunResult], rule: str, without: Sequence[RunResult]
) -> dict[str, list[float]]:
    """Quantities of a rule, one value per seed: accuracy, its least share of the accuracy of
    `without` with all loops (same seed), loops, and the best fixed number of loops at that cost."""
    never_stops = {run.seed: by_hops(run, ALL) for run in without}
    names = ("accuracy", "share", "loops", "excess", "spearman", "fixed")
    found: dict[str, list[float]] = {name: [] for name in names}
    for run in runs:
        rows, every = by_hops(run, rule), never_stops[run.seed]
        loops = statistics.mean(row.loops for row in rows.values())
        found["accuracy"].append(statistics.mean(row.score for row in rows.values()))
        found["share"].append(min(rows[h].score / max(every[h].score, 1e-9) for h in rows))
        found["loops"].append(loops)
        found["excess"].append(max(row.loops - hops for hops, row in rows.items()))
        found["spearman"].append(run.curve["spearman"][rule])
        fixed = grid_of(run.curve["fixed"])
        affordable = [n for n in next(iter(fixed.values())) if n <= loops]
        best = max(
            (statistics.mean(row[n] for row in fixed.values()) for n in affordable), default=0.0
        )
        found["fixed"].append(best)
    return found


def judge(results: Sequence[RunResult]) -> Finding:
    """Bar: some rule has, at every number of hops, 99% of what the looped model has with all loops,
    within 5 loops of the hops (means over seeds), and beats every fixed number of loops of equal
    cost."""
    groups, texts = by_arm(results), text_arms()
    table, passing, best_rule, best_gap = [], [], "", 0.0
    for arm, runs in groups.items():
        for rule in runs[0].curve["rules"]:
            if arm in texts or (rule == ALL and arm == LOOPED):
                continue
            found = summarise(runs, rule, groups[LOOPED])
            name = rule if arm == LOOPED else arm
            gain = statistics.mean(found["accuracy"]) - statistics.mean(found["fixed"])
            within = statistics.mean(found["excess"]) <= SPARE
            if statistics.mean(found["share"]) >= SHARE and within and gain > 0:
                passing.append(name)
            if gain > best_gap:
                best_rule, best_gap = name, gain
            table.append(
                {
                    "rule": name,
                    "accuracy [%]": percent(found["accuracy"]),
                    "of fixed loops at that cost [%]": percent(found["fixed"]),
                    "least share of the looped model's accuracy [%]": percent(found["share"]),
                    "mean loops": plus_minus(found["loops"], digits=1),
                    "most loops beyond hops": f"{statistics.mean(found['excess']):+.1f}",
                    "Spearman, hops": f"{statistics.mean(found['spearman']):.2f}",
                    "loss [nats]": "-",
                    "of fixed loops at that cost [nats]": "-",
                }
            )
    table += [row for arm, runs in groups.items() if arm in texts for row in text_rows(runs)]
    verdict: Verdict = "does not hold here"
    if passing:
        verdict = "holds"
    elif best_gap > 0.1:
        verdict = "holds in part"
    sentence = f"Rules that meet the bar: {', '.join(passing) or 'none'}."
    if best_rule:
        sentence += (
            f" The largest gain over a fixed number of loops of equal cost: {best_rule}, "
            f"{100 * best_gap:.0f} points."
        )
    brief = (
        f"{len(passing) or 'No'} rule{'s' * (len(passing) > 1)} at the bar; {best_rule or 'none'} "
        f"gains {100 * best_gap:.0f} points over fixed loops."
    )
    return Finding(verdict, sentence, table, brief)


def text_rows(runs: Sequence[RunResult]) -> Iterator[dict[str, str]]:
    """Table rows of a text arm: each rule, and the best fixed number of loops at its cost."""
    for rule in runs[0].curve["rules"]:
        score, loops = zip(*(of_text(run, rule) for run in runs), strict=True)
        fixed = [
            min(nats for n, nats in curve_of(run.curve["fixed"]).items() if n <= max(1, used))
            for run, used in zip(runs, loops, strict=True)
        ]
        yield {
            "rule": f"{TEXT}: {rule}" if runs[0].arm == TEXT else runs[0].arm,
            "accuracy [%]": "-",
            "of fixed loops at that cost [%]": "-",
            "least share of the looped model's accuracy [%]": "-",
            "mean loops": plus_minus(loops, digits=1),
            "most loops beyond hops": "-",
            "Spearman, hops": "-",
            "loss [nats]": plus_minus(score),
            "of fixed loops at that cost [nats]": plus_minus(fixed),
        }


def draw(results: Sequence[RunResult]) -> tuple[Any, list[dict[str, object]]]:
    """Mean loops used against hops, per rule; accuracy against mean loops."""
    lines = study_plots.Lines()
    points = study_plots.Lines()
    rows: list[dict[str, object]] = []
    texts = text_arms()
    for arm, runs in by_arm(results).items():
        for rule in runs[0].curve["rules"]:
            if arm in texts or (rule == ALL and arm == LOOPED):
                continue
            name = rule if arm == LOOPED else arm
            for run in runs:
                for hops, (accuracy, loops) in by_hops(run, rule).items():
                    lines.add(name, hops, loops)
                    points.add(name, hops, accuracy)
                    rows.append(
                        {"rule": name, "seed": run.seed, "hops": hops}
                        | {"accuracy": accuracy, "loops": loops}
                    )
    figure = study_plots.loops_against_hops(lines, points, trained_hops=20, spare=SPARE)
    return figure, rows


STUDY = Study(
    name="adaptive-computation",
    claim="A looped model stops by itself when a problem is solved, later for more hops.",
    headline="It stops by itself once solved (ACT, Huginn)",
    paper="KL and entropy: 15 loops where 37 hops need them (30 M)",
    source="OpenMythos announcement; ACT (Graves 2016); Huginn's exit rules",
    method=(
        "k-hop as in depth-extrapolation, trained on 1 to 20 hops; untrained exit rules (two loops "
        "in a row below a threshold, judged over the whole prefix or at each token alone) on one "
        "model, ACT with three ponder costs on models of its own; at most 80 loops; 400 unseen "
        "chains at each of 5, 10, 20, 30 and 40 hops. The best fixed number of loops is the one, "
        "for all hops, that costs no more than the rule does in the mean. Text: the model and "
        "training of test-time-depth, the same rules and ponder costs, at most 16 loops; in place "
        "of accuracy the held-out loss of the first 12 batches (which is not that of "
        "test-time-depth, on all). Learning rates of ACT and text from grids of three."
    ),
    not_shown=(
        "Rules that stop a whole sequence at once: here each position stops by itself and keeps "
        "its state, later ones then compute on states that were not quite done.",
        "Rules tuned per model; ACT with another initial bias: its default halts after a loop or "
        "two, where this task wants as many as hops.",
        "Text models that need many loops: this one hardly uses them (see test-time-depth).",
    ),
    deviations=("The bar first compared ACT with itself, now with the looped model without it.",),
    arms=arms,
    measure=measure,
    judge=judge,
    draw=draw,
)
