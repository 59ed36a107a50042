"""Does a looped model stop by itself where a problem is solved, trained to or not?"""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from openmythos.analysis import study_plots
from openmythos.model.mythos import OpenMythos
from openmythos.recurrence.halting import (
    ACT,
    ExitRule,
    FixedExit,
    KLEntropyExit,
    KLExit,
    StateChangeExit,
)
from openmythos.studies.depth_extrapolation import looped
from openmythos.studies.learning import Learning
from openmythos.studies.study import (
    Arm,
    Finding,
    RunResult,
    Study,
    Verdict,
    by_arm,
    mean_and_half_width,
    percent,
)
from openmythos.tasks import KHop

HOPS = (5, 10, 20, 30, 40)
CAP = 80
FIXED = (5, 8, 10, 12, 15, 18, 20, 22, 25, 28, 30, 35, 40, 45, 50, 60, CAP)
LOOPED = "looped"
SHARE, SPARE = 0.99, 5


def rules() -> dict[str, ExitRule]:
    """Rules that no training prepares for; each judges the whole prefix, or each token alone."""
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
    task, learning = KHop(), Learning()
    act = [
        Arm(
            name=f"ACT, ponder {weight:g}",
            model=replace(looped(), halting=ACT(ponder_weight=weight)),
            task=task,
            learning=learning,
            why="halting that is trained",
        )
        for weight in (1e-4, 1e-3, 1e-2)
    ]
    return [Arm(name=LOOPED, model=looped(), task=task, learning=learning), *act]


@torch.no_grad()
def measure(model: OpenMythos, arm: Arm, quick: bool) -> dict[str, Any]:
    """Per rule and number of hops, accuracy and mean loops at the answer."""
    model.eval()
    hops, cap = ((2, 4), 6) if quick else (HOPS, CAP)
    asked: dict[str, ExitRule] = {"all loops": FixedExit()}
    if arm.name == LOOPED:
        asked.update(rules())
    by_rule: dict[str, dict[str, list[float]]] = {name: {} for name in asked}
    fixed: dict[str, dict[str, float]] = {}
    pairs: dict[str, list[torch.Tensor]] = {name: [] for name in asked}
    for hop in hops:
        generator = torch.Generator().manual_seed(10_000 + hop)
        batch = arm.problems.sample(20 if quick else 400, hop, generator)
        answers = batch.answers()

        def accuracy(logits: torch.Tensor, answers: torch.Tensor = answers) -> float:
            return float((logits[:, -1].argmax(dim=-1) == answers).float().mean())

        for name, rule in asked.items():
            out = model(batch.tokens, num_loops=cap, exit_rule=rule, last_only=True)
            used = out.recurrence.loops_used[:, -1].float()
            by_rule[name][str(hop)] = [accuracy(out.logits), float(used.mean())]
            pairs[name].append(torch.stack((torch.full_like(used, hop), used)))
        loops = tuple(n for n in FIXED if n <= cap)
        out = model(batch.tokens, num_loops=max(loops), collect_loops=loops, last_only=True)
        by_loops = dict(zip(out.recurrence.collected, out.loop_logits, strict=True))
        fixed[str(hop)] = {str(n): accuracy(by_loops.get(n, out.logits)) for n in loops}
    ranks = {name: spearman(*torch.cat(parts, dim=1)) for name, parts in pairs.items()}
    return {"rules": by_rule, "fixed": fixed, "spearman": ranks}


def fit(result: RunResult) -> float:
    """Accuracy with all loops within the training range."""
    trained = [row[0] for hop, row in result.curve["rules"]["all loops"].items() if int(hop) <= 20]
    return statistics.mean(trained)


def spearman(left: torch.Tensor, right: torch.Tensor) -> float:
    """Rank correlation, equals sharing their mean rank; 0 where one side does not vary."""
    ranks = torch.stack([_ranks(left), _ranks(right)])
    if bool((ranks.std(dim=1) == 0).any()):
        return 0.0
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: torch.Tensor) -> torch.Tensor:
    below = (values[:, None] > values).sum(dim=1)
    return below + (values[:, None] == values).sum(dim=1) / 2


def summarise(runs: Sequence[RunResult], rule: str) -> dict[str, list[float]]:
    """Per quantity a value per seed: what a rule reaches, and the best fixed number of loops of
    equal cost."""
    names = ("accuracy", "share", "loops", "excess", "spearman", "fixed")
    found: dict[str, list[float]] = {name: [] for name in names}
    for run in runs:
        rows = {int(hop): row for hop, row in run.curve["rules"][rule].items()}
        every = {int(hop): row[0] for hop, row in run.curve["rules"]["all loops"].items()}
        loops = statistics.mean(row[1] for row in rows.values())
        found["accuracy"].append(statistics.mean(row[0] for row in rows.values()))
        found["share"].append(min(rows[h][0] / max(every[h], 1e-9) for h in rows))
        found["loops"].append(loops)
        found["excess"].append(max(rows[h][1] - h for h in rows))
        found["spearman"].append(run.curve["spearman"][rule])
        fixed = run.curve["fixed"]
        affordable = [n for n in next(iter(fixed.values())) if int(n) <= loops]
        best = max(
            (statistics.mean(row[n] for row in fixed.values()) for n in affordable), default=0.0
        )
        found["fixed"].append(best)
    return found


def judge(results: Sequence[RunResult]) -> Finding:
    """Bar: some rule has, at every number of hops, 99% of the accuracy of all loops within 5 loops
    of the hops (means over seeds), and beats every fixed number of loops of equal cost."""
    groups = by_arm(results)
    table, passing, best_rule, best_gap = [], [], "", 0.0
    for arm, runs in groups.items():
        for rule in runs[0].curve["rules"]:
            if rule == "all loops" and arm == LOOPED:
                continue
            found = summarise(runs, rule)
            name = rule if arm == LOOPED else arm
            gain = statistics.mean(found["accuracy"]) - statistics.mean(found["fixed"])
            within = statistics.mean(found["excess"]) <= SPARE
            if statistics.mean(found["share"]) >= SHARE and within and gain > 0:
                passing.append(name)
            if gain > best_gap:
                best_rule, best_gap = name, gain
            loops, half = mean_and_half_width(found["loops"])
            table.append(
                {
                    "rule": name,
                    "accuracy": percent(found["accuracy"]),
                    "least share of all loops' accuracy": percent(found["share"]),
                    "mean loops": f"{loops:.1f}" + (f" ± {half:.1f}" if half == half else ""),
                    "most loops beyond hops": f"{statistics.mean(found['excess']):+.1f}",
                    "Spearman, hops": f"{statistics.mean(found['spearman']):.2f}",
                    "best fixed at that cost": percent(found["fixed"]),
                }
            )
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
    return Finding(verdict, sentence, table)


def draw(results: Sequence[RunResult]) -> tuple[Any, list[dict[str, object]]]:
    """Mean loops used against hops, per rule; accuracy against mean loops."""
    lines: dict[str, dict[int, list[float]]] = {}
    points: dict[str, dict[int, list[float]]] = {}
    rows: list[dict[str, object]] = []
    for arm, runs in by_arm(results).items():
        for rule in runs[0].curve["rules"]:
            if rule == "all loops" and arm == LOOPED:
                continue
            name = rule if arm == LOOPED else arm
            for run in runs:
                for hop, (accuracy, loops) in run.curve["rules"][rule].items():
                    lines.setdefault(name, {}).setdefault(int(hop), []).append(loops)
                    points.setdefault(name, {}).setdefault(int(hop), []).append(accuracy)
                    rows.append(
                        {"rule": name, "seed": run.seed, "hops": int(hop)}
                        | {"accuracy": accuracy, "loops": loops}
                    )
    return study_plots.loops_against_hops(lines, points, trained_hops=20), rows


STUDY = Study(
    name="adaptive-computation",
    claim="A looped model stops by itself when a problem is solved, later for more hops.",
    source="OpenMythos announcement; ACT (Graves 2016); Huginn's exit rules",
    method=(
        "k-hop as in depth-extrapolation, trained on 1 to 20 hops; untrained exit rules (two loops "
        "in a row below a threshold, judged over the whole prefix or at each token alone) on one "
        "model, ACT with three ponder costs on models of its own; at most 80 loops; 400 unseen "
        "chains at each of 5, 10, 20, 30 and 40 hops. The best fixed number of loops is the one, "
        "for all hops, that costs no more than the rule does in the mean."
    ),
    not_shown=("Text: these rules are measured on k-hop alone.", "Rules tuned per model."),
    arms=arms,
    measure=measure,
    fit=fit,
    judge=judge,
    draw=draw,
)
