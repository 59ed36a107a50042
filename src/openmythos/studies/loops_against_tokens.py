"""Twenty loops or twenty written tokens: which answers a chain of lookups, and at what cost?"""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from openmythos.analysis import study_plots
from openmythos.eval.accuracy import ASKED_SEED
from openmythos.inference.generation import Request, stream
from openmythos.model.config import MythosConfig
from openmythos.model.mythos import OpenMythos
from openmythos.planning.cost import Flops
from openmythos.recurrence.loop_sampling import FixedLoops
from openmythos.studies.learning import TASK_TRAINING, looped, on_task, stacked
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
    percent_columns,
    table_of,
    to_json,
)
from openmythos.tasks import KHop, TaskBatch, WrittenHops
from openmythos.train.optim import AdamW

MOST = 20  # hops, and loops or written tokens
HOPS = (1, 5, 10, 15, MOST)
BATCHES = (1, 64)
LOOPS, ALONE = "20 loops", "20 loops, trained on the answer alone"
TOKENS, NEITHER = "3 layers, 20 tokens", "3 layers, neither"
SOLVED, GUESSED, CLOSE = 0.95, 0.3, 0.02


def arms() -> list[Arm]:
    """About equal parameters: a prelude, a recurrent and a coda layer, or three layers."""
    layers = stacked(3, 64, window=0)
    return [
        Arm(
            name=LOOPS,
            run=on_task(looped(), KHop()),
            rates=(1.5e-3, 3e-3, 6e-3),
            trial_seeds=2,
        ),
        Arm(
            name=ALONE,
            run=on_task(looped(), KHop(supervision="answer")),
            why="no target but the last, so that nothing says what to think between",
            tuned_as=LOOPS,
            most_seeds=3,
        ),
        _once(TOKENS, layers, WrittenHops(max_hops=MOST), "a chain of thought"),
        _once(NEITHER, layers, KHop(), "neither loops nor tokens"),
    ]


def _once(name: str, layers: MythosConfig, task: KHop | WrittenHops, why: str) -> Arm:
    training = replace(
        TASK_TRAINING,
        loops=FixedLoops(mean_loops=1),
        optimizer=AdamW(lr=2e-3, weight_decay=0.05, beta2=0.98),
    )
    return Arm(name=name, run=on_task(layers, task, training), why=why, rates=(1e-3, 2e-3, 4e-3))


def answer(model: OpenMythos, task: object, batch: TaskBatch, hops: int) -> Tensor:
    """The answers of a model: the last of `hops` tokens that it writes, or after `hops` loops."""
    if isinstance(task, WrittenHops):
        request = Request(max_new_tokens=hops, num_loops=1)
        *_, last = stream(model, task.prompts(batch), request)
        return last.tokens
    loops = hops if model.config.num_loops > 1 else 1
    return model(batch.tokens, num_loops=loops, last_only=True).logits[:, 0].argmax(dim=-1)


@torch.no_grad()
def measure(model: OpenMythos, arm: Arm, quick: bool) -> dict[str, Any]:
    """Accuracy by hops, with as many loops or tokens; of the most hops, FLOPs and milliseconds."""
    model.eval()
    hops = (1, 2) if quick else HOPS
    found: dict[int, float] = {}
    for count in hops:
        batch = _problems(model, arm, 20 if quick else 400, count)
        right = answer(model, arm.task, batch, count) == batch.answers()
        found[count] = float(right.float().mean())
    times = {}
    for size in BATCHES:
        batch = _problems(model, arm, size, hops[-1])
        work = functools.partial(answer, model, arm.task, batch, hops[-1])
        times[size] = milliseconds(work, repeats=2 if quick else 30)
    return {
        "accuracy": to_json(found),
        "milliseconds": to_json(times),
        "flops": flops(arm, hops[-1]),
    }


def _problems(model: OpenMythos, arm: Arm, count: int, hops: int) -> TaskBatch:
    generator = torch.Generator().manual_seed(ASKED_SEED + hops)
    return arm.task.sample(count, hops, generator).to(model.device)


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """The least CPU time of one call, after a first one that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return 1e3 * min(times)


def flops(arm: Arm, hops: int) -> int:
    """FLOPs of one answer: of the question and of written tokens that are read again.

    The head is counted at every token, as it is in training.
    """
    read = arm.task.sample(1, hops, torch.Generator()).tokens.shape[1]
    loops = hops if arm.model.num_loops > 1 else 1
    return read * Flops(arm.model, read).forward(loops)


def accuracy(run: RunResult, hops: int = MOST) -> float:
    """Share right; in a quick run at the most hops that it asks."""
    by_hops = curve_of(run.curve["accuracy"])
    return by_hops[min(hops, max(by_hops))]


def cost(run: RunResult, batch: int) -> float:
    """CPU milliseconds of a batch."""
    return curve_of(run.curve["milliseconds"])[batch]


def spent(runs: Sequence[RunResult], batch: int) -> float:
    """Mean CPU milliseconds of a batch."""
    return statistics.mean(cost(run, batch) for run in runs)


def _time_of(batch: int) -> Column:
    def show(values: Sequence[float]) -> str:
        return plus_minus(values, digits=2)

    return Column(f"batch {batch} [CPU ms]", lambda run: cost(run, batch), show, ".2f")


MFLOP = Column(
    "MFLOP per answer",
    lambda run: float(run.curve["flops"]) / 1e6,
    lambda values: f"{values[0]:.1f}",
    ".1f",
)
COLUMNS = (
    *percent_columns("{} hops [%]", accuracy, (5, 10, MOST)),
    *(_time_of(batch) for batch in BATCHES),
    MFLOP,
)


def judge(results: Sequence[RunResult]) -> Finding:
    """Premise: at 20 hops three layers that write 20 tokens are right in at least 95%, and without
    in at most 30%. Central: with 20 loops at least 95%, and at most 2 points less than with 20
    tokens. 20 loops take at most half the CPU time of 20 tokens at batch 1, no more at batch 64,
    and no more FLOPs. All in the mean of the seeds."""
    groups = by_arm(results)

    share = {name: statistics.mean(map(accuracy, runs)) for name, runs in groups.items()}
    met = share[TOKENS] >= SOLVED and share[NEITHER] <= GUESSED
    times = {batch: spent(groups[LOOPS], batch) / spent(groups[TOKENS], batch) for batch in BATCHES}
    work = groups[LOOPS][0].curve["flops"] / groups[TOKENS][0].curve["flops"]
    enough = max(SOLVED, share[TOKENS] - CLOSE)
    reached = share[LOOPS] >= enough
    statements = {
        f"{MOST} loops answer {share[LOOPS]:.1%} of {MOST} hops (at least {enough:.1%})": reached,
        f"at batch 1 loops take {times[1]:.2f} of the tokens' time (at most 0.5)": times[1] <= 0.5,
        f"at batch 64 {times[64]:.2f} (at most 1)": times[64] <= 1,
        f"they need {work:.2f} of the tokens' FLOPs (at most 1)": work <= 1,
    }
    sentence = (
        "The premise is that three layers need what they write: with 20 tokens at least "
        f"{SOLVED:.0%} ({share[TOKENS]:.1%}), without at most {GUESSED:.0%} "
        f"({share[NEITHER]:.1%}): {'met' if met else 'not met'}. {as_sentence(statements)} "
        f"Without a bar: trained on the answer alone, 20 loops answer {share[ALONE]:.1%}."
    )
    brief = (
        f"{share[LOOPS]:.0%} against {share[TOKENS]:.0%}; time x{times[1]:.2f} (batch 1), "
        f"x{times[64]:.2f} (64), FLOPs x{work:.1f}."
    )
    return Finding(by_bars(statements, premise=met), sentence, table_of(results, COLUMNS), brief)


def draw(results: Sequence[RunResult]) -> tuple[Any, list[dict[str, object]]]:
    """Accuracy by hops; CPU milliseconds per answer by batch."""
    by_hops = study_plots.Lines()
    by_batch = study_plots.Lines()
    rows: list[dict[str, object]] = []
    for run in results:
        place = {"arm": run.arm, "seed": run.seed}
        for hops, share in curve_of(run.curve["accuracy"]).items():
            by_hops.add(run.arm, hops, 100 * share)
            rows.append(place | {"hops": hops, "accuracy": share})
        for batch, spent in curve_of(run.curve["milliseconds"]).items():
            by_batch.add(run.arm, f"batch of {batch}", spent / batch)
            rows.append(
                place | {"batch": batch, "milliseconds": spent, "flops": run.curve["flops"]}
            )
    figure = study_plots.line_panels(
        {"": by_hops, f"{MOST} hops": by_batch},
        x_labels=["hops, and loops or tokens", "a dot per seed"],
        y_labels=["right [%]", "CPU time per answer [ms]"],
        note=bands_note(results),
    )
    return figure, rows


STUDY = Study(
    name="loops-against-tokens",
    claim="A loop does the work of a written token of a chain of thought, and costs less.",
    headline="A loop replaces a token of thought (OpenMythos announcement)",
    paper="none: T loops can simulate T steps of a chain of thought (Saunshi et al., a proof)",
    source="OpenMythos announcement; Saunshi et al. (arXiv 2502.17416), Coconut (arXiv 2412.06769)",
    method=(
        "k-hop as in depth-extrapolation, trained on 1 to 20 hops for 1600 steps. Loops: one "
        "layer between a prelude and a coda, as many loops as hops. Tokens: three layers of their "
        "own, full attention, that write the entity after every hop, decoded greedily with a "
        "cache; the question is padded, so that each relation stands at a fixed distance. Neither: "
        "the same three layers asked for the answer at once. Targets at every hop in all three. "
        "400 unseen chains per number of hops; CPU time is the least of 30 repeats on one thread. "
        "Best of three learning rates."
    ),
    setups=(
        (
            "loops",
            "a transformer of any size, T loops (a construction)",
            "0.15 M, 20 loops, learned",
        ),
        ("chain of thought", "T written tokens", "20 written entities"),
    ),
    caption=(
        "Loops answer nearly as many chains as written tokens. An answer alone takes two thirds of "
        "the tokens' time; one of 64 takes half as much again as with tokens, because a loop "
        "reads the whole question and a token only itself. Left: chains answered right, with as "
        "many loops or written tokens as hops. Right: CPU time of an answer of 20 hops."
    ),
    not_shown=(
        "Language, and thoughts whose steps are not known: the written ones are supervised, as are "
        "the loops, but for one arm.",
        "Longer chains than trained: the padded question has no place for them.",
        "An accelerator, where a small batch costs what its longest row of steps does.",
        "Written tokens in a looped model, and latent thoughts that are fed back as tokens are.",
    ),
    arms=arms,
    measure=measure,
    judge=judge,
    draw=draw,
    columns=COLUMNS,
)
