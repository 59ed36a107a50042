"""The Universal Transformer on words twice as long as trained: does it halt later, and rightly?"""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from openmythos.analysis import study_plots
from openmythos.eval.accuracy import ASKED_SEED
from openmythos.model.config import MythosConfig
from openmythos.model.mythos import OpenMythos
from openmythos.recurrence.halting import ACT
from openmythos.recurrence.initial_state import EncodedState
from openmythos.recurrence.injections import NoInjection
from openmythos.recurrence.loop_embedding import LoopEmbedding
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
from openmythos.tasks import Composition, Parity, Task
from openmythos.train.config import TiedLoops
from openmythos.train.optim import AdamW

TRAINED, DOUBLE = 10, 20  # letters
LENGTHS = (2, 4, 6, 8, TRAINED, 12, 15, DOUBLE)
CAP = 16  # loops at most in training; twice as many in the test
TASKS: dict[str, Task] = {
    "parity": Parity(supervision="prefix"),
    "S_3": Composition(size=3, factors="adjacent"),
}
UT, NO_ACT, LTI_, LAYERS = "Universal Transformer", "without ACT", "LTI, without ACT", "6 layers"
FITS, GOES, CLOSE, RISES = 0.99, 0.9, 0.05, 2.0


def name_of(task: str, model: str) -> str:
    return f"{task}: {model}"


def arms() -> list[Arm]:
    lti = replace(looped(window=0), prelude_layers=0, coda_layers=0)
    bare = replace(
        lti,
        injection=NoInjection(),
        state_init=EncodedState(),
        loop_embedding=LoopEmbedding(num_loops=CAP),
        prelude_norm=False,
    )
    act = replace(bare, halting=ACT(bias_init=-3.0, ponder_weight=1e-3))
    models = {UT: act, NO_ACT: bare, LTI_: lti, LAYERS: stacked(6, 64, window=0)}
    return [
        _arm(task_name, task, name, model)
        for task_name, task in TASKS.items()
        for name, model in models.items()
    ]


def _arm(task_name: str, task: Task, name: str, model: MythosConfig) -> Arm:
    loops = {UT: FixedLoops(mean_loops=CAP), LAYERS: FixedLoops(mean_loops=1)}
    training = replace(
        TASK_TRAINING,
        num_steps=2000,
        loops=loops.get(name, TiedLoops(extra=CAP - TRAINED)),
        optimizer=AdamW(lr=2e-3, weight_decay=0.05, beta2=0.98),
        ponder_from=0.5,
    )
    sized = replace(model, vocab_size=task.vocab_size)
    run = on_task(sized, task, training, first_hops=2, max_hops=TRAINED)
    return Arm(name=name_of(task_name, name), run=run, factors={"task": task_name, "model": name})


@torch.no_grad()
def measure(trained: OpenMythos, arm: Arm, quick: bool) -> dict[str, Any]:
    """Share right, and mean loops at the answer, by length of the word."""
    trained.eval()
    right: dict[int, float] = {}
    used: dict[int, float] = {}
    for length in LENGTHS[:2] if quick else LENGTHS:
        generator = torch.Generator().manual_seed(ASKED_SEED + length)
        batch = arm.task.sample(20 if quick else 500, length, generator).to(trained.device)
        loops = {UT: 2 * CAP, LAYERS: 1}.get(arm.factors["model"], length + CAP - TRAINED)
        out = trained(batch.tokens, num_loops=loops, last_only=True)
        hits = out.logits[:, 0].argmax(dim=-1) == batch.answers()
        right[length] = float(hits.float().mean())
        used[length] = float(out.recurrence.loops_used[:, -1].float().mean())
    return {"right": to_json(right), "loops": to_json(used)}


def right(run: RunResult, length: int) -> float:
    """Share right; in a quick run at the longest that it asks."""
    shares = curve_of(run.curve["right"])
    return shares[min(length, max(shares))]


def rise(run: RunResult) -> float:
    """Loops at twice the trained length less those at the shortest."""
    loops = curve_of(run.curve["loops"])
    return loops[max(loops)] - loops[min(loops)]


def judge(results: Sequence[RunResult]) -> Finding:
    """Premise: on both tasks the Universal Transformer answers at least 99% at 10 letters, the
    longest of training, in the mean of the seeds.

    Central: on both it answers at least 90% at 20 letters. On both it runs at least 2 loops more at
    20 letters than at 2, in the mean. On both ACT costs at most 5 points at 20 letters against the
    same model without it, which runs a loop per letter and 6 more."""
    groups = by_arm(results)

    def mean(task: str, model: str, length: int) -> float:
        return statistics.mean(right(run, length) for run in groups[name_of(task, model)])

    fitted = min(mean(task, UT, TRAINED) for task in TASKS)
    met = fitted >= FITS
    far = {task: mean(task, UT, DOUBLE) for task in TASKS}
    rises = {task: statistics.mean(map(rise, groups[name_of(task, UT)])) for task in TASKS}
    costs = {task: mean(task, NO_ACT, DOUBLE) - far[task] for task in TASKS}

    def listed(values: dict[str, float], form: str, scale: float = 1.0) -> str:
        return ", ".join(f"{task} {scale * value:{form}}" for task, value in values.items())

    statements = {
        f"right at {DOUBLE} letters: {listed(far, '.0f', 100)} (at least 90)": (
            min(far.values()) >= GOES
        ),
        f"loops more at {DOUBLE} letters than at 2: {listed(rises, '.1f')} (at least 2)": (
            min(rises.values()) >= RISES
        ),
        f"points that ACT costs there: {listed(costs, '.0f', 100)} (at most 5)": (
            max(costs.values()) <= CLOSE
        ),
    }
    others = {
        f"{task}, {model}": mean(task, model, DOUBLE) for task in TASKS for model in (LTI_, LAYERS)
    }
    sentence = (
        f"The premise is that {TRAINED} letters are learned ({fitted:.1%}, at least 99): "
        f"{'met' if met else 'not met'}. {as_sentence(statements)} Without a bar, right at "
        f"{DOUBLE} letters: {listed(others, '.0f', 100)}."
    )
    brief = f"10 to 20 letters: {listed(far, '.0f', 100)}% right; {listed(rises, '+.1f')} loops."
    return Finding(by_bars(statements, premise=met), sentence, table_of(results, COLUMNS), brief)


COLUMNS = (
    *percent_columns("{} letters [%]", right, (TRAINED, 12, 15, DOUBLE)),
    Column("loops more than at 2", rise, lambda values: plus_minus(values, digits=1), ".1f"),
)


def draw(results: Sequence[RunResult]) -> tuple[Any, list[dict[str, object]]]:
    """Accuracy by length for each task, and loops that ACT runs."""
    panels = {task: study_plots.Lines() for task in TASKS}
    halts = study_plots.Lines()
    rows: list[dict[str, object]] = []
    for run in results:
        task, model = run.arm.split(": ")
        used = curve_of(run.curve["loops"])
        for length, share in curve_of(run.curve["right"]).items():
            panels[task].add(model, length, 100 * share)
            row = {"arm": run.arm, "seed": run.seed, "length": length, "right": share}
            rows.append(row | {"loops": used[length]})
            if model == UT:
                halts.add(task, length, used[length])
    figure = study_plots.line_panels(
        panels | {"loops until ACT halts": halts},
        x_labels=["letters"],
        y_labels=["right [%]", "right [%]", "loops"],
        note=bands_note(results),
    )
    return figure, rows


STUDY = Study(
    name="universal-transformer",
    claim="A Universal Transformer answers words longer than trained and halts later for them.",
    headline="ACT halts later for longer words (Universal Transformers)",
    paper="addition and copying at 10 times the length: 0.34 to 0.91 of characters (UT)",
    source="Universal Transformers (arXiv 1807.03819); ACT (arXiv 1603.08983)",
    method=(
        "Parity, and words of neighbouring swaps in S_3, a target at every letter, 1 to 10 letters "
        "in training with a curriculum, up to 20 in the test. One layer of width 64 with full "
        "attention, no prelude, coda or injection, a learned embedding per loop, ACT per position "
        "(bias -3, ponder cost 1e-3 in the second half), at most 16 loops, 32 in the test. Beside "
        "it the same without ACT and a loop per letter plus 0 to 6, one with LTI injection and no "
        "loop embedding, and 6 layers. 2000 steps of 32, one learning rate."
    ),
    setups=(
        ("tasks", "copy, reverse, addition, language", "parity, words in a group"),
        ("lengths", "40 trained, 400 asked", "10 trained, 20 asked"),
        ("model", "encoder and decoder", "decoder"),
    ),
    caption=(
        "No arm learns words of 10 letters in these 2,000 steps: in S_3 all guess among the three "
        "permutations that an even word can be (33%; of odd words, such as 15 letters, 0%). So "
        "nothing follows about longer words, nor about when ACT halts."
    ),
    not_shown=(
        "Whether a longer training or another rate learns the trained lengths: the premise fails.",
        "Learning rates and ponder costs tuned per arm.",
        "The papers' position encodings, which are added anew in each loop.",
    ),
    arms=arms,
    measure=measure,
    judge=judge,
    draw=draw,
    columns=COLUMNS,
)
