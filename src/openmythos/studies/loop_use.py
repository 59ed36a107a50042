"""When does a small language model use its loops? One change at a time to a model that does."""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from openmythos.analysis import study_plots
from openmythos.eval.likelihood import depth_sweep
from openmythos.nn.feed_forward import SwiGLU
from openmythos.nn.latent_attention import LatentAttention
from openmythos.nn.moe import MoE
from openmythos.recurrence.injection import LTI
from openmythos.recurrence.loop_lora import LoopLoRA
from openmythos.recurrence.loop_sampling import PoissonLoops
from openmythos.studies.statistics import plus_minus
from openmythos.studies.study import (
    Arm,
    Finding,
    RunResult,
    Study,
    Verdict,
    as_sentence,
    bands_note,
    by_arm,
    curve_of,
    to_json,
)
from openmythos.studies.text import TextRun, on_text, text_model, text_training
from openmythos.train.config import TrainConfig
from openmythos.train.optim import AdamW, Muon

BASE = "base"
LOOPS = (1, 2, 3, 4, 6, 8, 12, 16)
NEEDED = 0.1  # nats that the base must gain for the others to be compared with it
TRAINED = 6
# Expected to remove the gain: at most this share is left, mean over seeds.
TAKES, LEFT = ("prelude and coda", "untied head"), 0.5
# Expected to keep the gain: it changes by at most this share.
LEAVES, CHANGED = ("zero-initialised outputs", "experts", "latent attention", "LoRA per loop"), 0.25
# Not drawn: their lines would lie behind the legend.
TABLE_ONLY = ("AdamW", "half the steps")


def arms() -> list[Arm]:
    base = replace(text_model(LTI()), prelude_layers=0, coda_layers=0, num_loops=TRAINED)
    drawn = PoissonLoops(mean_loops=TRAINED, max_loops=16)
    muon = Muon(lr=3e-3, adamw_lr_scale=4.0)
    training = replace(text_training(drawn), num_steps=400, optimizer=muon)
    # As many active weights as the dense layer: two of eight experts and a shared one.
    experts = MoE(num_experts=8, top_k=2, expert_dim=88)
    latent = LatentAttention(
        num_heads=4,
        kv_latent_dim=32,
        q_latent_dim=48,
        nope_head_dim=16,
        rope_head_dim=24,
        value_head_dim=24,
    )
    wide = SwiGLU(hidden_dim=512)
    models = {
        BASE: base,
        "prelude and coda": replace(base, prelude_layers=1, coda_layers=1),
        "untied head": replace(base, tie_embeddings=False),
        "zero-initialised outputs": replace(base, zero_init_outputs=True),
        "experts": replace(base, recurrent_feed_forward=experts),
        "latent attention": replace(base, attention=latent),
        "LoRA per loop": replace(base, loop_lora=LoopLoRA(rank=4, num_loops=TRAINED)),
        "twice the width": replace(base, dim=192, recurrent_feed_forward=wide),
    }
    trainings = {
        "AdamW": replace(training, optimizer=AdamW(lr=2e-3)),
        "2 loops in the mean": _with_mean(training, 2),
        "4 loops in the mean": _with_mean(training, 4),
        "half the steps": replace(training, num_steps=200),
        "twice the steps": replace(training, num_steps=800),
    }
    changes = [(name, model, training) for name, model in models.items()]
    changes += [(name, base, changed) for name, changed in trainings.items()]
    return [Arm(name=name, run=on_text(model, how)) for name, model, how in changes]


def _with_mean(training: TrainConfig, mean: int) -> TrainConfig:
    return replace(training, loops=PoissonLoops(mean_loops=mean, max_loops=16))


def measure(trained: TextRun, arm: Arm, quick: bool) -> dict[str, Any]:
    """Held-out nats per token by loops."""
    loops = LOOPS[:3] if quick else LOOPS
    found = depth_sweep(trained.model, trained.held_out, loops, seq_len=128, batch_size=16)
    return to_json({n: likelihood.nats_per_token for n, likelihood in found.items()})


def best(run: RunResult) -> float:
    """Held-out loss at the best number of loops."""
    return min(curve_of(run.curve).values())


def gain(run: RunResult) -> float:
    """What the best number of loops saves against one loop."""
    return curve_of(run.curve)[1] - best(run)


def judge(results: Sequence[RunResult]) -> Finding:
    """Premise: the base gains at least 0.1 nats. A prelude and coda, and an untied head, leave at
    most half of the gain; zero-initialised outputs, experts, latent attention and LoRA change it
    by at most a quarter. Other arms are reported without a bar."""
    groups = by_arm(results)
    gains = {name: statistics.mean(map(gain, runs)) for name, runs in groups.items()}
    base = gains[BASE]
    statements = {f"{name} leaves {gains[name]:.2f}": gains[name] <= LEFT * base for name in TAKES}
    statements |= {
        f"with {name} {gains[name]:.2f}": abs(gains[name] - base) <= CHANGED * base
        for name in LEAVES
    }
    verdict: Verdict = "does not hold here"
    if base < NEEDED:
        verdict = "premise not met"
    elif all(statements.values()):
        verdict = "holds"
    elif all(list(statements.values())[: len(TAKES)]):
        verdict = "holds in part"
    table = [
        {
            "change": name,
            "parameters": f"{runs[0].parameters:,}",
            "loss at 1 loop": plus_minus([curve_of(run.curve)[1] for run in runs]),
            "loss at the best": plus_minus(list(map(best, runs))),
            "loops there": ", ".join(_best_loops(run) for run in runs),
            "gain": plus_minus(list(map(gain, runs))),
        }
        for name, runs in groups.items()
    ]
    sentence = (
        f"Gain of the best number of loops in nats: base {base:.2f}. {as_sentence(statements)}"
    )
    least = min(groups, key=lambda name: statistics.mean(map(best, groups[name])))
    sentence += f" The least loss is that of: {least}."
    lower = all(statistics.mean(map(best, groups[n])) < min(map(best, groups[BASE])) for n in TAKES)
    brief = (
        f"Gain {base:.2f} nats; with prelude and coda {gains[TAKES[0]]:.2f}, with an untied head "
        f"{gains[TAKES[1]]:.2f}{', at a lower loss' if lower else ''}."
    )
    return Finding(verdict, sentence, table, brief)


def _best_loops(run: RunResult) -> str:
    curve = curve_of(run.curve)
    return str(min(curve, key=curve.__getitem__))


def draw(results: Sequence[RunResult]) -> tuple[Any, list[dict[str, object]]]:
    """Held-out loss against loops: changes of the model, changes of the training."""
    groups = by_arm(results)
    rows: list[dict[str, object]] = []
    lines = study_plots.Lines()
    for name, runs in groups.items():
        for run in runs:
            for loops, loss in curve_of(run.curve).items():
                lines.add(name, loops, loss)
                rows.append({"arm": name, "seed": run.seed, "loops": loops, "nats": loss})
    own = [arm.name for arm in arms() if arm.name not in TABLE_ONLY]
    first = [BASE, *TAKES]
    panels = {
        "takes the gain away": [name for name in own if name in first],
        "leaves it": [BASE, *(name for name in own if name in LEAVES)],
        "training and width": [BASE, *(n for n in own if n not in (*first, *LEAVES))],
    }
    figure = study_plots.line_panels(
        {title: {name: lines[name] for name in names} for title, names in panels.items()},
        x_labels=["num_loops at inference"],
        y_labels=["held-out loss [nats / token]"],
        log_x=True,
        same_y=True,
        note=f"{bands_note(results)} In the table only: {', '.join(TABLE_ONLY)}.",
    )
    return figure, rows


STUDY = Study(
    name="loop-use",
    claim="A small language model uses its loops where nothing outside of them does their work.",
    headline="Loops are used where no layer outside does their work",
    paper="none: this project's own question",
    source="this project",
    method=(
        "One recurrent layer of 0.2 M parameters (width 96, grouped-query attention, "
        "SwiGLU, LTI injection, tied embedding), no prelude and no coda; 400 steps of 8 x 128 "
        "tokens of Python's standard library, loops drawn per sequence from Poisson(6), Muon. Each "
        "arm changes one thing. Loss of held-out text by loops at inference."
    ),
    not_shown=(
        "Longer trainings: 0.4 M tokens are two tokens per parameter. What takes the gain away "
        "here may not do so after more.",
        "Learning rates tuned per arm: Muon at 0.003, AdamW at 0.002, from earlier work.",
        "That a gain is worth having: an arm may gain from loops since it is worse at one. The "
        "losses stand beside the gains for that.",
    ),
    deviations=(
        "The bars were fixed before these runs, but after a prototype of most arms with seed 0.",
    ),
    arms=arms,
    measure=measure,
    judge=judge,
    draw=draw,
)
