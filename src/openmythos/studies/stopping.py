"""Does a looped model stop by itself where a problem is solved, trained to or not?"""

import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from openmythos.analysis import study_plots
from openmythos.data.loader import evaluation_windows
from openmythos.eval.accuracy import ASKED_SEED
from openmythos.eval.likelihood import logits_by_loops
from openmythos.model.mythos import OpenMythos
from openmythos.recurrence.exit_rules import (
    ArgmaxExit,
    ExitRule,
    FixedExit,
    KLExit,
    Scope,
    StateChangeExit,
)
from openmythos.recurrence.halting import ACT, ExitGate, Halting
from openmythos.studies.learning import TASK_TRAINING, looped, on_task
from openmythos.studies.statistics import percent, plus_minus
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
    grid_of,
)
from openmythos.studies.text import TextRun, long_training, needs_its_loops, on_two_corpora
from openmythos.tasks import KHop, TaskBatch
from openmythos.train.config import TrainConfig
from openmythos.train.loss import ExpectedLoss

HOPS = (5, 10, 20, 30, 40)
CAP = 80
LOOPED, TEXT, LEARNED = "looped", "text", "learned"
TEXT_CAP, WINDOW = 24, 128
SHARE, SPARE = 0.99, 5  # of the accuracy with all loops; loops beyond the hops
ABOVE_ORACLE = 3  # loops above the first after which the answer stays right
SCOPES: tuple[Scope, ...] = ("sequence", "prefix", "token")
EXITS = 0.5  # cumulative exit probability at which a learned gate's answer is read
TIMED_HOPS, TIMED = 20, 10  # problems of so many hops, asked one by one


def rules() -> dict[str, ExitRule]:
    """Exit rules without training, in three scopes each."""
    base: dict[str, KLExit | ArgmaxExit | StateChangeExit] = {
        "KL < 1e-2": KLExit(threshold=1e-2, patience=2),
        "KL < 1e-3": KLExit(threshold=1e-3, patience=2),
        "KL < 1e-4": KLExit(threshold=1e-4, patience=2),
        "same answer 4 times": ArgmaxExit(patience=4),
        "state change < 20%": StateChangeExit(threshold=0.2),
        "state change < 3%": StateChangeExit(threshold=0.03, patience=2),
    }
    return {
        f"{name}, {scope}": replace(rule, scope=scope)
        for scope in SCOPES
        for name, rule in base.items()
    }


def arms() -> list[Arm]:
    gated = replace(TASK_TRAINING, loss=ExpectedLoss())
    longer = replace(TASK_TRAINING, num_steps=3 * TASK_TRAINING.num_steps, ponder_from=0.5)
    act = ACT(bias_init=-3.0, ponder_weight=1e-4)
    ponder, ouro = ExitGate(prior=0.1, prior_weight=0.01), ExitGate(prior_weight=0.05)
    learned: dict[str, tuple[Halting, TrainConfig]] = {
        "ACT": (act, longer),
        "PonderNet": (ponder, gated),
        "Ouro's gate": (ouro, gated),
    }
    return [
        Arm(name=LOOPED, run=on_task(looped(), KHop())),
        *(
            Arm(
                name=name,
                run=on_task(replace(looped(), halting=halting), KHop(), how),
                why="halting that is trained",
                most_seeds=3,
            )
            for name, (halting, how) in learned.items()
        ),
        Arm(name=TEXT, run=on_two_corpora(needs_its_loops(), long_training()), most_seeds=3),
    ]


def measure(trained: OpenMythos | TextRun, arm: Arm, quick: bool) -> dict[str, Any]:
    if isinstance(trained, TextRun):
        return measure_text(trained, quick)
    return measure_hops(trained, arm, quick)


@torch.no_grad()
def measure_text(trained: TextRun, quick: bool) -> dict[str, Any]:
    """Nats per token and mean loops, per rule and per fixed number of loops."""
    trained.model.eval()
    cap, batches = (3, 1) if quick else (TEXT_CAP, 8)
    asked = {name: rule for name, rule in rules().items() if "argmax" not in rule.kind}
    loops = range(1, cap + 1)
    losses, used = dict.fromkeys(asked, 0.0), dict.fromkeys(asked, 0.0)
    fixed, count = dict.fromkeys(map(str, loops), 0.0), 0.0
    windows = evaluation_windows(trained.held_out, WINDOW, batch_size=16)
    for batch in itertools.islice(windows, batches):
        tokens, targets = batch.tokens.to(trained.model.device), batch.targets.flatten()
        weights = batch.weights.flatten()

        def nats(logits: Tensor, targets: Tensor = targets, weights: Tensor = weights) -> float:
            each = F.cross_entropy(logits.flatten(0, 1).cpu(), targets, reduction="none")
            return float((each * weights).sum())

        count += float(weights.sum())
        for name, rule in asked.items():
            out = trained.model(tokens, num_loops=cap, exit_rule=rule)
            losses[name] += nats(out.logits)
            used[name] += float((out.recurrence.loops_used.cpu().flatten() * weights).sum())
        for n, logits in logits_by_loops(trained.model, tokens, loops).items():
            fixed[str(n)] += nats(logits)
    return {
        "rules": {name: [losses[name] / count, used[name] / count] for name in asked},
        "fixed": {n: loss / count for n, loss in fixed.items()},
    }


@torch.no_grad()
def measure_hops(model: OpenMythos, arm: Arm, quick: bool) -> dict[str, Any]:
    """Per rule and number of hops, accuracy and mean loops at the answer; the same of an oracle.

    The oracle stops at the first loop after which the answer stays right; problems that are wrong
    after all loops do not count for it.
    """
    model.eval()
    hops, cap = ((2, 4), 6) if quick else (HOPS, CAP)
    asked = rules() if arm.name == LOOPED else {}
    found: dict[str, Any] = {"rules": {}, "fixed": {}, "oracle": {}, "all": {}}
    for hop in hops:
        generator = torch.Generator().manual_seed(ASKED_SEED + hop)
        batch = arm.task.sample(20 if quick else 200, hop, generator).to(model.device)
        right, exits = _by_loop(model, batch, cap)
        stays = right.flip(0).long().cummin(dim=0).values.flip(0)  # right from here on
        solved = right[-1].bool()
        first = (cap - stays.sum(dim=0) + 1)[solved].float()
        found["oracle"][str(hop)] = float(first.mean()) if len(first) else float(cap)
        found["all"][str(hop)] = float(right[-1].mean())
        found["fixed"][str(hop)] = {str(n + 1): float(x) for n, x in enumerate(right.mean(dim=1))}
        stopped = {LEARNED: exits} if exits is not None else {}
        for name, rule in asked.items():
            out = model(batch.tokens, num_loops=cap, exit_rule=rule, last_only=True)
            correct = out.logits[:, -1].argmax(dim=-1) == batch.answers()
            stopped[name] = (correct.float(), out.recurrence.loops_used[:, -1].float())
        for name, (correct, used) in stopped.items():
            row = [float(correct.mean()), float(used.mean())]
            found["rules"].setdefault(name, {})[str(hop)] = row
    if asked and not quick:
        found["milliseconds"] = _milliseconds(model, arm)
    return found


def _by_loop(
    model: OpenMythos, batch: TaskBatch, cap: int
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """(right [loops, problems] after each number of loops; of a learned halt: right, loops used).

    A gate's answer is read where its cumulative exit probability reaches EXITS, ACT's where it has
    halted.
    """
    loops = range(1, cap + 1)
    out = model(batch.tokens, num_loops=cap, collect_loops=loops, last_only=True)
    answers = [out.loop_logits[n][:, -1].argmax(dim=-1) == batch.answers() for n in loops]
    right = torch.stack(answers).float()
    weights = [out.recurrence.halt_weights[n][:, -1] for n in out.recurrence.halt_weights]
    if not weights:
        return right, None
    if model.config.halting.kind == "act":
        return right, (right[-1], out.recurrence.loops_used[:, -1].float())
    reached = torch.stack(weights).cumsum(dim=0) >= EXITS - 1e-6
    place = reached.long().argmax(dim=0)
    return right, (right.gather(0, place[None])[0], place.float() + 1)


def _milliseconds(model: OpenMythos, arm: Arm) -> dict[str, float]:
    """CPU milliseconds per problem, asked one by one."""
    generator = torch.Generator().manual_seed(ASKED_SEED)
    tokens = arm.task.sample(TIMED, TIMED_HOPS, generator).tokens.to(model.device)
    found = {}
    for name, rule in ({"all loops": FixedExit()} | rules()).items():
        begun = time.process_time()
        for problem in tokens:
            model(problem[None], num_loops=CAP, exit_rule=rule, last_only=True)
        found[name] = 1e3 * (time.process_time() - begun) / TIMED
    return found


class Stopped(NamedTuple):
    """How one run did under one rule."""

    accuracy: float
    share: float  # least over hops, of the accuracy of the looped model of that seed, all loops
    loops: float  # mean over hops, as `accuracy` and `oracle`
    excess: float  # most loops beyond the hops
    oracle: float  # loops above the oracle's
    fixed: float  # accuracy of the best fixed number of loops that costs no more


def stopped(run: RunResult, rule: str, whole: Mapping[int, float]) -> Stopped:
    """`whole`: accuracy by hops of the looped model of that seed with all loops."""
    rows = {int(hops): row for hops, row in run.curve["rules"][rule].items()}
    loops = statistics.mean(used for _, used in rows.values())
    oracle, fixed = curve_of(run.curve["oracle"]), grid_of(run.curve["fixed"])
    affordable = [n for n in next(iter(fixed.values())) if n <= max(1.0, loops)]
    return Stopped(
        accuracy=statistics.mean(right for right, _ in rows.values()),
        share=min(right / max(whole[hops], 1e-9) for hops, (right, _) in rows.items()),
        loops=loops,
        excess=max(used - hops for hops, (_, used) in rows.items()),
        oracle=loops - statistics.mean(oracle.values()),
        fixed=max(statistics.mean(row[n] for row in fixed.values()) for n in affordable),
    )


def by_rule(results: Sequence[RunResult]) -> dict[str, list[Stopped]]:
    """How every seed did, by rule, or by arm where halting is learned."""
    groups = by_arm(results)
    whole = {run.seed: curve_of(run.curve["all"]) for run in groups[LOOPED]}
    found: dict[str, list[Stopped]] = {}
    for arm, runs in groups.items():
        for run in runs if arm != TEXT else ():
            for rule in run.curve["rules"]:
                name = rule if arm == LOOPED else arm
                found.setdefault(name, []).append(stopped(run, rule, whole[run.seed]))
    return found


def mean(values: Sequence[Stopped], what: str) -> float:
    return statistics.mean(getattr(each, what) for each in values)


def passes(values: Sequence[Stopped]) -> bool:
    """The bar of a rule: 99% of the accuracy at every number of hops, within 5 loops of them."""
    return mean(values, "share") >= SHARE and mean(values, "excess") <= SPARE


def judge(results: Sequence[RunResult]) -> Finding:
    """A rule passes with at least 99% of the accuracy that all loops give, at every number of hops,
    and at most 5 loops more than the hops (means over seeds).

    Central: a rule that judges the whole sequence passes. The best of them is at most 3 loops above
    the oracle, and better than every fixed number of loops of equal cost. No rule that freezes
    single positions is as good: none passes. A learned halt passes.
    """
    found = by_rule(results)
    whole = {name: each for name, each in found.items() if name.endswith("sequence")}
    single = {n: each for n, each in found.items() if n.endswith(("prefix", "token"))}
    learned = {n: each for n, each in found.items() if n not in whole | single}
    names = [name for name, each in whole.items() if passes(each)]
    best = min(names or whole, key=lambda name: mean(whole[name], "loops"))
    above = mean(whole[best], "oracle")
    gain = 100 * (mean(whole[best], "accuracy") - mean(whole[best], "fixed"))
    frozen = [name for name, each in single.items() if passes(each)]
    halts = [name for name, each in learned.items() if passes(each)]
    statements = {
        f"rules for the whole sequence that pass: {', '.join(names) or 'none'}": bool(names),
        f"the quickest, {best}, is {above:.1f} loops above the oracle (at most {ABOVE_ORACLE})": (
            above <= ABOVE_ORACLE
        ),
        f"and {gain:.0f} points above fixed loops of equal cost": gain > 0,
        f"rules that freeze positions and pass: {', '.join(frozen) or 'none'}": not frozen,
        f"learned halts that pass: {', '.join(halts) or 'none'}": bool(halts),
    }
    brief = f"{len(names)} of {len(whole)} rules for whole sequences pass, {len(frozen)} of "
    brief += f"{len(single)} for positions, {len(halts)} of {len(learned)} learned."
    table = [_row(name, each) for name, each in found.items()]
    if TEXT in by_arm(results):
        table += _text_rows(by_arm(results)[TEXT])
    return Finding(by_bars(statements), as_sentence(statements), table, brief)


def _row(name: str, each: Sequence[Stopped]) -> dict[str, str]:
    return {
        "rule": name,
        "accuracy [%]": percent([one.accuracy for one in each]),
        "of fixed loops at that cost [%]": percent([one.fixed for one in each]),
        "loss [nats]": "-",
        "of fixed loops at that cost [nats]": "-",
        "least share [%]": percent([one.share for one in each]),
        "mean loops": plus_minus([one.loops for one in each], digits=1),
        "most beyond hops": f"{mean(each, 'excess'):+.1f}",
        "above the oracle": f"{mean(each, 'oracle'):+.1f}",
        "passes": "yes" if passes(each) else "no",
    }


def _text_rows(runs: Sequence[RunResult]) -> list[dict[str, str]]:
    """Text: the loss in place of accuracy."""
    rows = []
    for rule in runs[0].curve["rules"]:
        nats, loops = zip(*(run.curve["rules"][rule] for run in runs), strict=True)
        fixed = [
            min(loss for n, loss in curve_of(run.curve["fixed"]).items() if n <= max(1, used))
            for run, used in zip(runs, loops, strict=True)
        ]
        row = dict.fromkeys(_row("", [Stopped(0, 0, 0, 0, 0, 0)]), "-")
        row |= {
            "rule": f"text: {rule}",
            "loss [nats]": plus_minus(nats),
            "of fixed loops at that cost [nats]": plus_minus(fixed),
            "mean loops": plus_minus(loops, digits=1),
        }
        rows.append(row)
    return rows


def draw(results: Sequence[RunResult]) -> tuple[Any, list[dict[str, object]]]:
    """Loops used minus hops by rule, with the oracle; accuracy by hops."""
    lines = study_plots.Lines()
    points = study_plots.Lines()
    rows: list[dict[str, object]] = []
    shown = ("KL < 1e-2", "KL < 1e-3", "same answer 4 times")
    for run in results:
        for rule, by_hops in run.curve["rules"].items() if run.arm != TEXT else ():
            name = rule if run.arm == LOOPED else run.arm
            for hops, (accuracy, loops) in by_hops.items():
                place = {"rule": name, "seed": run.seed, "hops": int(hops)}
                rows.append(place | {"accuracy": accuracy, "loops": loops})
                if run.arm != LOOPED or (rule.startswith(shown) and not rule.endswith("token")):
                    lines.add(name, int(hops), loops)
                    points.add(name, int(hops), accuracy)
        for hops, loops in curve_of(run.curve["oracle"]).items() if run.arm == LOOPED else ():
            lines.add("oracle", hops, loops)
            points.add("oracle", hops, run.curve["all"][str(hops)])
    figure = study_plots.loops_against_hops(lines, points, trained_hops=20, spare=SPARE)
    return figure, rows


def _column(hops: int) -> Column:
    def value(run: RunResult) -> float | None:
        return run.curve["all"].get(str(hops)) if "all" in run.curve else None

    return Column(f"{hops} hops, all loops", value, percent)


COLUMNS = tuple(map(_column, HOPS))

STUDY = Study(
    name="stopping",
    claim="A looped model stops by itself when a problem is solved, later for more hops.",
    headline="Stops by itself (ACT, Huginn)",
    paper="KL and entropy: 15 loops where 37 hops need them (30 M)",
    source="OpenMythos announcement; ACT (arXiv 1603.08983); Huginn (arXiv 2502.05171); "
    "PonderNet (arXiv 2107.05407); Ouro (arXiv 2510.25741)",
    method=(
        "k-hop as in depth-extrapolation, trained on 1 to 20 hops; 200 unseen chains at each of 5, "
        "10, 20, 30 and 40 hops, at most 80 loops. Six exit rules that need no training, in three "
        "scopes: sequence (all positions go on until the last has converged), prefix (a position "
        "stops, frozen, once it and all before it have converged) and token (each by itself). ACT "
        "starts to halt late (bias -3), pays for loops in the second half of three times the "
        "steps. PonderNet and Ouro's gate are read where half of their exit probability is spent. "
        "The oracle stops at the first loop after which the answer stays right. Text: the model "
        "of test-time-depth, at most 24 loops; loss in place of accuracy."
    ),
    caption=(
        "Rules that wait for the whole sequence stop 1 to 4 loops after the hops and stay right, "
        "also beyond the 20 hops of training; rules that freeze positions need a threshold so "
        "strict that it fits. Left: loops used beyond the hops of the problem. Right: problems "
        "answered right."
    ),
    deviations=(
        "An earlier form of this study had no rule for whole sequences, an ACT that halts after a "
        "loop or two by its initial bias, and a text model that hardly uses its loops.",
        "Learned halts and text use the learning rate of the looped model and of the text model.",
    ),
    not_shown=(
        "Rules tuned per model: thresholds were fixed before the runs.",
        "Time saved on a GPU. CPU milliseconds of single problems are in results.json.",
    ),
    arms=arms,
    measure=measure,
    judge=judge,
    draw=draw,
    columns=COLUMNS,
)
