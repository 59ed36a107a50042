"""What does a low-rank difference between loops buy, where a full one buys something?"""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from openmythos.analysis import study_plots
from openmythos.eval.likelihood import depth_sweep
from openmythos.model.config import MythosConfig
from openmythos.recurrence.loop_lora import LoopLoRA
from openmythos.recurrence.loop_sampling import FixedLoops
from openmythos.studies.statistics import above, paired, plus_minus
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
    table_of,
    to_json,
)
from openmythos.studies.text import TextRun, needs_its_loops, on_two_corpora, text_training
from openmythos.train.optim import AdamW

TRAINED, DEEPER = 4, 8
LOOPS = (1, 2, 3, TRAINED, 6, DEEPER, 16)
FULL = 96  # the width: a change of this rank is any change
RANKS = (0, 4, 8, FULL)
SHOWN = 8
RECOVERED = 0.5  # of what sharing costs
FLAT = 0.02  # nats that twice the trained loops may cost
TARGETS = ("attention.*", "feed_forward.*")


def name_of(rank: int) -> str:
    return {0: "shared weights", FULL: "full rank"}.get(rank, f"rank {rank}")


def model(rank: int) -> MythosConfig:
    """The text model that needs its loops, with a change of that rank for each of four loops."""
    base = replace(needs_its_loops(), num_loops=TRAINED)
    if not rank:
        return base
    return replace(base, loop_lora=LoopLoRA(rank=rank, num_loops=TRAINED, targets=TARGETS))


def arms() -> list[Arm]:
    training = replace(
        text_training(FixedLoops(mean_loops=TRAINED)), num_steps=1000, optimizer=AdamW(lr=4e-3)
    )
    tuned: dict[int, dict[str, Any]] = {
        0: {"rates": (2e-3, 4e-3, 8e-3), "trial_seeds": 1},
        4: {"tuned_as": name_of(0)},
        8: {"tuned_as": name_of(0)},
        FULL: {"rates": (2e-3, 4e-3, 8e-3), "trial_seeds": 1, "why": "weights of its own per loop"},
    }
    return [
        Arm(name=name_of(rank), run=on_two_corpora(model(rank), training), **how)
        for rank, how in tuned.items()
    ]


@torch.no_grad()
def measure(trained: TextRun, arm: Arm, quick: bool) -> dict[str, Any]:
    """Held-out nats per token by loops."""
    loops = LOOPS[:4] if quick else LOOPS
    found = depth_sweep(trained.model, trained.held_out, loops, seq_len=128, batch_size=16)
    return to_json({n: likelihood.nats_per_token for n, likelihood in found.items()})


def nats(run: RunResult, loops: int = TRAINED) -> float:
    """Held-out loss after so many loops; in a quick run at most four."""
    curve = curve_of(run.curve)
    return curve[min(loops, max(curve))]


def saved(results: Sequence[RunResult], rank: int) -> list[float]:
    """Nats that a change of that rank saves against shared weights, by seed."""
    groups = by_arm(results)
    shared, own = ({r.seed: nats(r) for r in groups[name_of(k)]} for k in (0, rank))
    return paired(shared, own)


def judge(results: Sequence[RunResult]) -> Finding:
    """Premise: sharing costs something. At the four loops of training, a change of full rank per
    loop (weights of its own, in the same code) has a lower loss than shared weights by the paired
    interval.

    Central: rank 8 saves at least half of that, in the mean. Rank 4 saves less than rank 8 and more
    than nothing. With rank 8, eight loops cost at most 0.02 nats over four."""
    gap = saved(results, FULL)
    met = above(gap)
    whole = statistics.mean(gap)
    by_rank = {rank: statistics.mean(saved(results, rank)) for rank in RANKS[1:]}
    share = by_rank[SHOWN] / whole if whole > 0 else 0.0
    deeper = statistics.mean(nats(r, DEEPER) - nats(r) for r in by_arm(results)[name_of(SHOWN)])
    counts = {name: runs[0].parameters for name, runs in by_arm(results).items()}
    more = counts[name_of(SHOWN)] / counts[name_of(0)] - 1
    statements = {
        f"rank {SHOWN} saves {by_rank[SHOWN]:+.3f} nats, {share:.0%} of it (at least 50)": (
            share >= RECOVERED
        ),
        f"rank 4 saves {by_rank[4]:+.3f}": 0 < by_rank[4] < by_rank[SHOWN],
        f"with rank {SHOWN}, {DEEPER} loops cost {deeper:+.3f} nats over {TRAINED} (at most "
        f"{FLAT})": deeper <= FLAT,
    }
    sentence = (
        f"The premise is that sharing costs something (full rank saves "
        f"{plus_minus(gap, sign='+')} nats): {'met' if met else 'not met'}. "
        f"{as_sentence(statements)} Rank {SHOWN} adds {more:.0%} of parameters."
    )
    brief = (
        f"Full rank saves {whole:+.3f} nats; rank {SHOWN} {by_rank[SHOWN]:+.3f}, {more:.0%} larger."
    )
    return Finding(by_bars(statements, premise=met), sentence, table_of(results, COLUMNS), brief)


def _nats_at(loops: int) -> Column:
    return Column(f"{loops} loop{'s' * (loops > 1)}", lambda run: nats(run, loops))


COLUMNS = tuple(_nats_at(loops) for loops in (1, 2, TRAINED, DEEPER, 16))


def draw(results: Sequence[RunResult]) -> tuple[Any, list[dict[str, object]]]:
    """Held-out loss by loops at inference."""
    lines = study_plots.Lines()
    rows: list[dict[str, object]] = []
    for run in results:
        for loops, loss in curve_of(run.curve).items():
            rows.append({"arm": run.arm, "seed": run.seed, "loops": loops, "nats": loss})
            if loops > 1:
                lines.add(run.arm, loops, loss)
    figure = study_plots.line_panels(
        {f"trained with {TRAINED} loops": lines},
        x_labels=["num_loops at inference"],
        y_labels=["loss [nats per token]"],
        log_x=True,
        note=bands_note(results),
    )
    return figure, rows


STUDY = Study(
    name="lora-between-loops",
    claim="A low-rank change of the shared weights per loop wins back most of what sharing costs.",
    headline="LoRA per loop wins back what sharing costs (Relaxed Recursive Transformers)",
    paper="Gemma 2 B in 2 loops: rank 512 recovers most of the accuracy; from a trained model",
    source="Relaxed Recursive Transformers (arXiv 2410.20672); OpenMythos announcement",
    method=(
        "The text model that needs its loops (one recurrent layer of width 96, no prelude, no "
        "coda), trained from scratch with 4 loops for 1000 steps of 8 x 128 tokens of Python and "
        "English. Every linear map has its own change of rank 0, 4, 8 or 96 in each loop; rank 96 "
        "is any change, with injection, norms and initialisation of the others. Learning rates: "
        "best of three for shared weights and for full rank; ranks 4 and 8 use that of shared "
        "weights. Beyond four loops the last change is used again."
    ),
    setups=(
        ("start", "a pretrained model, its weights averaged or stepped", "from scratch"),
        ("LoRA", "truncated SVD of the differences", "zero and random, trained"),
        ("size", "1 to 2 B", "0.2 M"),
    ),
    caption=(
        "Sharing costs nothing here: at the four loops of training, weights of their own per loop "
        "are no better than shared ones, and with more or fewer loops only shared weights hold. "
        "Held-out loss by loops at inference."
    ),
    not_shown=(
        "The paper's experiment: turning a trained model into a looped one.",
        "What is best beyond the trained loops: only the last pair is used.",
        "Ranks at equal parameters: a wider shared layer is not an arm.",
        "Rank 8 at a learning rate of its own: it has that of shared weights, at which its seeds "
        "differ widely.",
    ),
    arms=arms,
    measure=measure,
    judge=judge,
    draw=draw,
    columns=COLUMNS,
)
