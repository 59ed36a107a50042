"""Loops add no room for facts, but let facts be combined: bits per parameter, and two hops."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from openmythos.analysis import study_plots
from openmythos.eval.accuracy import ASKED_SEED
from openmythos.model.config import MythosConfig
from openmythos.model.mythos import OpenMythos
from openmythos.nn.feed_forward import SwiGLU
from openmythos.recurrence.loop_sampling import FixedLoops
from openmythos.studies.learning import TASK_TRAINING, looped_block, on_task
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
    table_of,
)
from openmythos.tasks import KHop
from openmythos.train.optim import WSD, AdamW

FACTS = KHop(num_entities=100, num_relations=100)  # more than any of these models holds
CHAINS = KHop(num_entities=20, num_relations=8)
SHAPES = ((1, 1), (1, 4), (4, 1))  # layers, loops
WIDTH = 32
NEAR = 0.1  # of the bits per parameter of one layer
MORE = 0.3  # share of two-hop questions that loops must add
KNOWN, ROOM = 0.99, 0.9  # of the single facts among chains; most of the many facts
TASKS = ("facts", "chains")


def name_of(task: str, layers: int, loops: int) -> str:
    return f"{task}, {layers} x {loops}"


def model(task: KHop, layers: int, loops: int) -> MythosConfig:
    """A block of `layers` layers of width 32, run `loops` times."""
    feed_forward = SwiGLU(hidden_dim=96)
    base = replace(looped_block(task, layers, loops), dim=WIDTH)
    return replace(base, feed_forward=feed_forward, recurrent_feed_forward=feed_forward)


def arms() -> list[Arm]:
    training = replace(
        TASK_TRAINING,
        num_steps=2500,
        batch_size=256,
        optimizer=AdamW(lr=4e-3, weight_decay=0.0, beta2=0.98),
        schedule=WSD(warmup=0.02, decay=0.5, final=0.03),
    )
    tasks = {"facts": (FACTS, 1), "chains": (CHAINS, 2)}
    return [
        Arm(
            name=name_of(name, layers, loops),
            factors={"task": name, "shape": f"{layers} x {loops}"},
            run=on_task(
                model(task, layers, loops),
                task,
                replace(training, loops=FixedLoops(mean_loops=loops)),
                first_hops=most,
                max_hops=most,
            ),
            rates=(4e-3, 8e-3, 1.6e-2),
            trial_seeds=1,
        )
        for name, (task, most) in tasks.items()
        for layers, loops in SHAPES
    ]


@torch.no_grad()
def measure(trained: OpenMythos, arm: Arm, quick: bool) -> dict[str, Any]:
    """Mean nats and share right of single facts, all of them; share right of two hops."""
    trained.eval()
    task = arm.task
    assert isinstance(task, KHop)
    facts = task.facts()
    rows = torch.cartesian_prod(torch.arange(task.num_entities), torch.arange(task.num_relations))
    if quick:
        rows = rows[:50]
    single = task.chain(rows[:, 0], rows[:, 1:]).to(trained.device)
    logs = trained(single.tokens, last_only=True).logits[:, 0].float().log_softmax(dim=-1)
    answers = single.answers()
    assert answers.cpu().equal(facts[rows[:, 1], rows[:, 0]])
    found = {
        "nats": float(-logs.gather(1, answers[:, None]).mean()),
        "facts": float((logs.argmax(dim=-1) == answers).float().mean()),
    }
    if arm.factors["task"] == "chains":
        generator = torch.Generator().manual_seed(ASKED_SEED)
        batch = task.sample(50 if quick else 1000, 2, generator).to(trained.device)
        given = trained(batch.tokens, last_only=True).logits[:, 0].argmax(dim=-1)
        found["two_hops"] = float((given == batch.answers()).float().mean())
    return found


def bits(run: RunResult) -> float:
    """Bits of single facts per parameter: what their loss is below that of guessing."""
    known = math.log2(FACTS.num_entities) - run.curve["nats"] / math.log(2)
    return FACTS.num_entities * FACTS.num_relations * known / run.parameters


def judge(results: Sequence[RunResult]) -> Finding:
    """Premise: one layer holds less than 90% of the many facts, so that capacity is measured; and
    every shape knows at least 99% of the single facts that chains are made of. Means of the seeds.

    Central: with 4 loops one layer answers at least 30 points more of the two-hop questions than
    run once. Its bits per parameter are within 10% of those of one layer run once, and those of 4
    layers are within 10% of them, too."""
    groups = by_arm(results)
    stored = {
        shape: statistics.mean(map(bits, groups[name_of("facts", *shape)])) for shape in SHAPES
    }
    hops = {
        shape: statistics.mean(run.curve["two_hops"] for run in groups[name_of("chains", *shape)])
        for shape in SHAPES
    }
    held = statistics.mean(run.curve["facts"] for run in groups[name_of("facts", 1, 1)])
    known = min(
        statistics.mean(run.curve["facts"] for run in groups[name_of("chains", *shape)])
        for shape in SHAPES
    )
    one, looped, deep = SHAPES
    added = hops[looped] - hops[one]
    statements = {
        f"4 loops of one layer answer {hops[looped]:.1%} of two hops, once {hops[one]:.1%} (at "
        "least 30 points more)": added >= MORE,
        f"bits per parameter: {stored[looped]:.2f} with 4 loops, {stored[one]:.2f} once (within "
        "10%)": abs(stored[looped] / stored[one] - 1) <= NEAR,
        f"4 layers: {stored[deep]:.2f} (within 10%)": abs(stored[deep] / stored[one] - 1) <= NEAR,
    }
    met = held < ROOM and known >= KNOWN
    sentence = (
        f"The premise is that there are more facts than a layer holds (it holds {held:.0%}, below "
        f"90), and that the facts of chains are known ({known:.1%}, at least 99): "
        f"{'met' if met else 'not met'}. {as_sentence(statements)} Without a bar: 4 layers answer "
        f"{hops[deep]:.1%} of two hops."
    )
    brief = (
        f"Bits per parameter {stored[one]:.2f} once, {stored[looped]:.2f} looped; two hops "
        f"{hops[one]:.0%} and {hops[looped]:.0%}."
    )
    return Finding(by_bars(statements, premise=met), sentence, table_of(results, COLUMNS), brief)


def _bits(run: RunResult) -> float | None:
    return None if "two_hops" in run.curve else bits(run)


COLUMNS = (
    Column("single facts [%]", lambda run: float(run.curve["facts"]), percent),
    Column("bits per parameter", _bits, lambda values: plus_minus(values, digits=2), ".2f"),
    Column("two hops [%]", lambda run: run.curve.get("two_hops"), percent),
)


def draw(results: Sequence[RunResult]) -> tuple[Any, list[dict[str, object]]]:
    """Two hops answered, and bits per parameter, by shape."""
    panels = study_plots.Panels()
    rows: list[dict[str, object]] = []
    for run in results:
        task, shape = run.arm.split(", ")
        chains = task == "chains"
        value = 100 * run.curve["two_hops"] if chains else 50 * bits(run)
        title = "two hops right" if chains else "facts held, of two bits per parameter"
        panels.add(title, "runs", shape, value)
        rows.append({"arm": run.arm, "seed": run.seed, **run.curve, "bits": _bits(run)})
    figure = study_plots.dot_panels(
        panels,
        order=[f"{layers} x {loops}" for layers, loops in SHAPES],
        x_label="layers x loops; a dot per seed",
        y_label="[%]",
    )
    return figure, rows


STUDY = Study(
    name="capacity-and-manipulation",
    claim="Loops do not add to the facts that a parameter holds; they let a model combine them.",
    headline="Loops combine facts, they hold no more (Ouro)",
    paper="about 2 bits per parameter with and without loops; manipulation improves (Ouro)",
    source="Ouro (arXiv 2510.25741); Physics of Language Models 3.3 (arXiv 2404.05405)",
    method=(
        "Facts: 10,000 (100 entities, 100 relations that are permutations), more than a model of "
        "width 32 holds, asked one by one. Chains: single facts and two-hop questions over 160 "
        "facts (20 entities, 8 relations). Both drawn anew for every seed. One layer run once or 4 "
        "times, and 4 layers; no injection, no decay; 2500 steps of 256 rows, best of three "
        "learning rates by the validation loss. Bits: 10,000 times what the mean loss of a fact is "
        "below log2 100, over all parameters."
    ),
    setups=(
        ("facts", "20,000 to 500,000 biographies in sentences", "10,000 pairs of tokens"),
        ("times that each is seen", "1000", "64"),
        ("manipulation", "trees of modular sums, multi-hop", "two hops"),
    ),
    caption=(
        "Left (100% are two bits per parameter): 4 loops hold 8% more than one pass; 4 layers know "
        "them all, so that the table bounds their bits. Right: one layer answers every two-hop "
        "question without loops, so that there is nothing for loops to add."
    ),
    deviations=(
        "Looked at before the first run: one layer on a table of facts that no run or trial has "
        "(36% of the many facts, 1.5 bits per parameter).",
    ),
    not_shown=(
        "Bits of 4 layers: they know 99.7% of the facts, which are 1.11 bits per parameter.",
        "Manipulation that one layer cannot do: 1,280 pairs of relations and entities can be "
        "learned by heart.",
        "Capacity at saturation: each fact is seen 64 times, and two bits need hundreds.",
        "Two hops that training does not ask: here all pairs are drawn anew.",
        "Injection, and loops drawn at random.",
    ),
    arms=arms,
    measure=measure,
    judge=judge,
    draw=draw,
    columns=COLUMNS,
)
