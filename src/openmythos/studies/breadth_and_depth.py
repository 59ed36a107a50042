"""Do experts hold more facts and loops compose more of them, each without doing the other's job?"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from openmythos.analysis import study_plots
from openmythos.eval.accuracy import ASKED_SEED, VALIDATION_SEED
from openmythos.eval.likelihood import logits_by_loops
from openmythos.model.config import MythosConfig
from openmythos.model.mythos import OpenMythos
from openmythos.nn.feed_forward import SwiGLU
from openmythos.nn.grouped_query import GroupedQueryAttention
from openmythos.nn.moe import MoE
from openmythos.recurrence.injection import LTI
from openmythos.recurrence.loop_lora import NoLoopLoRA
from openmythos.recurrence.loop_sampling import FixedLoops
from openmythos.studies.learning import TASK_TRAINING, on_task
from openmythos.studies.statistics import above, percent, plus_minus
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
    table_of,
    to_json,
)
from openmythos.tasks import FactsAndChains
from openmythos.train.config import RunConfig, TiedLoops
from openmythos.train.optim import AdamW

TASK = FactsAndChains(num_subjects=80, num_attributes=80)
HOPS, LOOPS = 5, 6
MEASURED = tuple(range(1, LOOPS + 3))
EXPERTS = MoE(num_experts=16, top_k=2, expert_dim=24, bias_rate=5e-3, balance_weight=0.0)
DENSE, MIXTURE, LAYERS = "dense", "16 experts", f"dense, {LOOPS} layers"
WIDE = "dense, the experts' parameters, 1 loop"
# Share of facts and of the longest chains that the dense model with one loop may know at most:
# else there is no room for the gains that are asked for.
ROOM = 0.75
MORE_FACTS, MORE_HOPS = 0.2, 0.3  # what experts must add to facts, and loops to chains
SPILL = 0.05  # what each may add to the other


def name_of(width: str, loops: int) -> str:
    return f"{width}, {loops} loop{'s' * (loops > 1)}"


def arms() -> list[Arm]:
    """Width 32: a SwiGLU of 72, or 16 experts of 24 of which a token uses two and a shared one."""
    feed_forward = SwiGLU(hidden_dim=3 * EXPERTS.expert_dim)
    dense = MythosConfig(
        vocab_size=TASK.vocab_size,
        dim=32,
        context=64,
        prelude_layers=0,
        coda_layers=0,
        num_loops=1,
        attention=GroupedQueryAttention(num_heads=4, num_kv_heads=4, window=8),
        feed_forward=feed_forward,
        recurrent_feed_forward=feed_forward,
        injection=LTI(),
        loop_lora=NoLoopLoRA(),
        zero_init_outputs=False,
    )
    widths = {DENSE: dense, MIXTURE: replace(dense, recurrent_feed_forward=EXPERTS)}
    crossed = [
        _arm(name_of(width, loops), replace(model, num_loops=loops), experts=width)
        for width, model in widths.items()
        for loops in (1, LOOPS)
    ]
    layers = _arm(LAYERS, replace(dense, recurrent_layers=LOOPS), experts=DENSE)
    every = (EXPERTS.num_experts + EXPERTS.num_shared_experts) * EXPERTS.expert_dim
    wide = replace(dense, recurrent_feed_forward=SwiGLU(hidden_dim=every))
    return [
        *crossed,
        replace(layers, why="depth without sharing, at the loops' FLOPs"),
        replace(_arm(WIDE, wide, experts="all at once"), why="parameters without routing"),
    ]


def _arm(name: str, model: MythosConfig, experts: str) -> Arm:
    looped = model.num_loops > 1
    training = replace(
        TASK_TRAINING,
        num_steps=1800,
        batch_size=64,
        loops=TiedLoops(extra=2) if looped else FixedLoops(mean_loops=1),
        optimizer=AdamW(lr=6e-3, weight_decay=0.0, beta2=0.98),
    )
    depth = f"{model.recurrent_layers} x {model.num_loops}"
    return Arm(
        name=name,
        run=on_task(model, TASK, training, max_hops=HOPS),
        factors={"experts": experts, "depth": depth},
        rates=(3e-3, 6e-3, 1.2e-2),
        trial_seeds=2,
    )


class Asked(NamedTuple):
    """Single facts and chains after some loops: mean nats and share right."""

    fact_nats: float
    facts: float
    chain_nats: float
    chains: float


@torch.no_grad()
def ask(
    model: OpenMythos, task: FactsAndChains, hops: int, loops: Sequence[int], seed: int, rows: int
) -> dict[int, Asked]:
    """What a model knows after each number of loops, on rows with a chain of `hops` hops."""
    batch = task.sample(rows, hops, torch.Generator().manual_seed(seed + hops)).to(model.device)
    columns = task.fact_columns()
    wanted, answers = batch.targets[:, columns].flatten(), batch.answers()
    found = {}
    for count, logits in logits_by_loops(model.eval(), batch.tokens, loops).items():
        single, last = logits[:, columns].flatten(0, 1).float(), logits[:, -1].float()
        found[count] = Asked(
            float(F.cross_entropy(single, wanted)),
            float((single.argmax(dim=-1) == wanted).float().mean()),
            float(F.cross_entropy(last, answers)),
            float((last.argmax(dim=-1) == answers).float().mean()),
        )
    return found


def score(model: OpenMythos, run: RunConfig) -> float:
    """Mean of the losses of single facts and of chains, each over all numbers of hops."""
    task, loops = _task_of(run), run.model.num_loops
    asked = [
        ask(model, task, hops, (loops,), VALIDATION_SEED, 100)[loops] for hops in range(1, HOPS + 1)
    ]
    return statistics.mean(one.fact_nats + one.chain_nats for one in asked) / 2


def _task_of(run: RunConfig) -> FactsAndChains:
    task = getattr(run.data, "task", None)
    assert isinstance(task, FactsAndChains)
    return task


def measure(model: OpenMythos, arm: Arm, quick: bool) -> dict[str, Any]:
    """Facts by loops, and chains by hops and loops; of what has one loop, after that alone."""
    loops = (1,) if arm.model.num_loops == 1 else MEASURED[:2] if quick else MEASURED
    hops = (1, 2) if quick else tuple(range(1, HOPS + 1))
    rows, task = (20 if quick else 400), _task_of(arm.run)
    asked = {h: ask(model, task, h, loops, ASKED_SEED, rows) for h in hops}
    return {
        "facts": to_json({n: statistics.mean(asked[h][n].facts for h in hops) for n in loops}),
        "fact_nats": to_json(
            {n: statistics.mean(asked[h][n].fact_nats for h in hops) for n in loops}
        ),
        "chains": to_json({h: {n: asked[h][n].chains for n in loops} for h in hops}),
    }


def facts(run: RunResult) -> float:
    """Share of the single facts that is known, at the loops of the study."""
    return _at_loops(curve_of(run.curve["facts"]))


def chains(run: RunResult, hops: int = HOPS) -> float:
    """Share of the chains of so many hops that is answered right."""
    grid = grid_of(run.curve["chains"])
    return _at_loops(grid[min(hops, max(grid))])


def _at_loops(by_loops: dict[int, float]) -> float:
    return by_loops[min(LOOPS, max(by_loops))]


def bits(run: RunResult) -> float:
    """Bits of single facts that a parameter holds: what their loss is below that of guessing."""
    nats = _at_loops(curve_of(run.curve["fact_nats"]))
    known = math.log2(TASK.num_subjects) - nats / math.log(2)
    return TASK.num_facts * known / run.parameters


def _chains_of(hops: int) -> Column:
    name = f"{hops} hop{'s' * (hops > 1)} [%]"
    return Column(name, lambda run: chains(run, hops), percent)


COLUMNS = (
    Column("facts [%]", facts, percent),
    *(_chains_of(hops) for hops in (1, 2, HOPS)),
    Column("bits of facts per parameter", bits, lambda values: plus_minus(values, digits=2)),
)


def effects(
    results: Sequence[RunResult], known: Callable[[RunResult], float]
) -> tuple[list[float], list[float]]:
    """What experts add, mean over both depths, and what loops add, mean over both widths; by seed.

    Only seeds that all four arms have.
    """
    cells = {
        (width, loops): {run.seed: known(run) for run in by_arm(results)[name_of(width, loops)]}
        for width in (DENSE, MIXTURE)
        for loops in (1, LOOPS)
    }
    seeds = sorted(set.intersection(*(set(cell) for cell in cells.values())))
    experts, loops_add = [], []
    for seed in seeds:
        plain, deep = cells[DENSE, 1][seed], cells[DENSE, LOOPS][seed]
        wide, both = cells[MIXTURE, 1][seed], cells[MIXTURE, LOOPS][seed]
        experts.append((wide - plain + both - deep) / 2)
        loops_add.append((deep - plain + both - wide) / 2)
    return experts, loops_add


def _mean(results: Sequence[RunResult], arm: str, known: Callable[[RunResult], float]) -> float:
    return statistics.mean(map(known, by_arm(results)[arm]))


def judge(results: Sequence[RunResult]) -> Finding:
    """Premise: the dense model with one loop knows at most 75% of the facts and of the 5-hop
    chains. Central, the double dissociation: experts add more to facts than to chains, and loops
    more to chains than to facts, both by the interval of the difference over seeds. Experts add at
    least 20 points to facts, and loops at least 30 to chains, by their intervals; each adds at most
    5 points to the other in the mean."""
    plain = by_arm(results)[name_of(DENSE, 1)]
    most = max(statistics.mean(map(known, plain)) for known in (facts, chains))
    experts_facts, loops_facts = effects(results, facts)
    experts_chains, loops_chains = effects(results, chains)
    breadth = [a - b for a, b in zip(experts_facts, experts_chains, strict=True)]
    depth = [a - b for a, b in zip(loops_chains, loops_facts, strict=True)]

    def points(values: Sequence[float]) -> str:
        return plus_minus([100 * value for value in values], digits=1, sign="+")

    spilled = statistics.mean(experts_chains), statistics.mean(loops_facts)
    statements = {
        f"experts add {points(breadth)} points more to facts than to chains, loops "
        f"{points(depth)} more to chains than to facts": above(breadth) and above(depth),
        f"experts add {points(experts_facts)} to facts (at least 20)": above(
            experts_facts, MORE_FACTS
        ),
        f"loops add {points(loops_chains)} to {HOPS}-hop chains (at least 30)": above(
            loops_chains, MORE_HOPS
        ),
        f"experts add {100 * spilled[0]:+.1f} to chains (at most 5)": spilled[0] <= SPILL,
        f"loops add {100 * spilled[1]:+.1f} to facts (at most 5)": spilled[1] <= SPILL,
    }
    sentence = (
        f"The premise is that one dense layer has room to gain (at most {ROOM:.0%} of facts and "
        f"chains; it has {most:.0%}). {as_sentence(statements)} Without a bar: a dense layer with "
        f"as many parameters as all experts knows {_mean(results, WIDE, facts):.0%} of the "
        f"facts (16 experts {_mean(results, name_of(MIXTURE, 1), facts):.0%}); {LOOPS} layers know "
        f"{_mean(results, LAYERS, facts):.0%} and answer {_mean(results, LAYERS, chains):.0%} of "
        "the chains."
    )
    brief = (
        f"Experts: facts {100 * statistics.mean(experts_facts):+.0f}, chains "
        f"{100 * spilled[0]:+.0f} points. Loops: facts {100 * spilled[1]:+.0f}, chains "
        f"{100 * statistics.mean(loops_chains):+.0f}."
    )
    verdict = by_bars(statements, premise=most <= ROOM)
    return Finding(verdict, sentence, table_of(results, COLUMNS), brief)


def draw(results: Sequence[RunResult]) -> tuple[Any, list[dict[str, object]]]:
    """Facts by loops at inference, and chains by hops, for every arm."""
    by_loops, rows = lines_of(results, lambda run: curve_of(run.curve["facts"]), "loops", "facts")
    by_hops = study_plots.Lines()
    for run in results:
        for hops, row in grid_of(run.curve["chains"]).items():
            by_hops.add(run.arm, hops, _at_loops(row))
            for loops, share in row.items():
                place = {"arm": run.arm, "seed": run.seed, "hops": hops, "loops": loops}
                rows.append(place | {"chains": share})
    figure = study_plots.line_panels(
        {"single facts": by_loops, f"chains, after {LOOPS} loops": by_hops},
        x_labels=["num_loops at inference", "hops"],
        y_labels=["right [%]"],
        percent=True,
        note=bands_note(results),
    )
    return figure, rows


STUDY = Study(
    name="breadth-and-depth",
    claim="Experts give a model breadth, loops give it depth, and neither gives the other.",
    headline="Experts are breadth, loops are depth (OpenMythos announcement)",
    paper="none: the announcement gives no number; about 2 bits per parameter (Allen-Zhu & Li)",
    source=(
        "OpenMythos announcement; Physics of Language Models 3.3 (arXiv 2404.05405); Ouro (arXiv "
        "2510.25741)"
    ),
    method=(
        f"Rows of 8 single facts (one of {TASK.num_facts:,}, each with a random answer) and a "
        f"chain of 1 to {HOPS} lookups over 20 entities, trained together. One layer of width 32 "
        f"without prelude and coda: dense or 16 experts (two and a shared one per token, as wide "
        f"as the dense layer), run once or {LOOPS} times, and {LOOPS} layers of their own. 1800 "
        "steps of 64 rows; loops in training are hops + uniform(0 to 2), or 1. An effect is a mean "
        "over the other factor. Best of three learning rates by the validation loss of facts and "
        "chains."
    ),
    setups=(
        (
            "facts",
            "names with attributes, in sentences",
            f"{TASK.num_facts:,} pairs of tokens",
        ),
        ("times that each fact is seen", "100 to 1000", "144"),
        ("bits per parameter", "1 (100 times) to 2 (1000 times)", "see the table"),
    ),
    caption=(
        "Left: single facts that are known, by loops at inference: 16 experts know nearly all, as "
        "more parameters do, and loops do not help. Right: chains answered right, by hops: six "
        "loops answer five hops with and without experts, one pass of any width does not."
    ),
    not_shown=(
        "Language: facts and chains are random, and their tokens apart.",
        "Experts at equal total parameters with loops: a dense layer with as many is run once.",
        "Loops at equal FLOPs: six loops compute six times as much; six layers do so too.",
        "Chains over the many facts: those are over 80 others, which any model here can hold.",
    ),
    deviations=(
        "The number of facts was set, before any run, after four short trials with seed 0 of other "
        "sizes, so that the dense layer cannot hold them and the experts can.",
    ),
    arms=arms,
    measure=measure,
    judge=judge,
    draw=draw,
    columns=COLUMNS,
    score=score,
)
