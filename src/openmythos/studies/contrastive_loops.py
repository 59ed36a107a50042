"""Does decoding that enlarges what later loops changed make a looped model better at text?"""

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from openmythos.analysis import study_plots
from openmythos.data.loader import evaluation_windows
from openmythos.eval.likelihood import logits_by_loops
from openmythos.inference.contrast import LoopContrast
from openmythos.studies.statistics import above, paired, percent, plus_minus
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
)
from openmythos.studies.text import (
    MEAN_LOOPS,
    TextRun,
    long_training,
    needs_its_loops,
    on_two_corpora,
)

TEXT = "text"
CAPS = (0.25, 0.5, 1.0, 2.0)
EARLY = (1, 2, 3)
CHOSEN = "1 loop, cap 1"  # the default of the library at 6 loops: a quarter of them, one or two
USED = 0.1  # nats that 6 loops gain over one
PLAIN = "plain"
SHARPER = (0.6, 0.8)  # temperatures, which also only sharpen what the model believes


def arms() -> list[Arm]:
    return [
        Arm(
            name=TEXT,
            run=on_two_corpora(needs_its_loops(), long_training()),
            rates=(3e-3, 6e-3, 1.2e-2),
            trial_seeds=1,
        )
    ]


def contrasts() -> dict[str, LoopContrast]:
    return {
        f"{early} loop{'s' * (early > 1)}, cap {cap:g}": LoopContrast(cap=cap, early=early)
        for early in EARLY
        for cap in CAPS
    }


@torch.no_grad()
def measure(trained: TextRun, arm: Arm, quick: bool) -> dict[str, Any]:
    """(nats, share of next tokens that are the likeliest) by way of decoding, teacher forced."""
    model = trained.model.eval()
    totals: dict[str, list[float]] = {}
    count = 0.0
    windows = evaluation_windows(trained.held_out, 128, batch_size=16)
    for batch in itertools.islice(windows, 1 if quick else 64):
        targets = batch.targets.to(model.device).flatten()
        weights = batch.weights.to(model.device).flatten()
        logits = logits_by_loops(model, batch.tokens.to(model.device), (*EARLY, MEAN_LOOPS))
        rows = {n: values.flatten(0, 1).float() for n, values in logits.items()}
        last = rows[MEAN_LOOPS]
        ways = {PLAIN: last, "1 loop alone": rows[1]}
        ways |= {f"temperature {t:g}": last / t for t in SHARPER}
        for name, how in contrasts().items():
            ways[name] = how.adjusted(last, rows[int(how.early)])
        count += float(weights.sum())
        for name, adjusted in ways.items():
            nats = F.cross_entropy(adjusted, targets, reduction="none")
            hits = (adjusted.argmax(dim=-1) == targets).float()
            total = totals.setdefault(name, [0.0, 0.0])
            total[0] += float((nats * weights).sum())
            total[1] += float((hits * weights).sum())
    return {name: [nats / count, hits / count] for name, (nats, hits) in totals.items()}


def gain(results: Sequence[RunResult], way: str) -> list[float]:
    """Share of next tokens that a way of decoding gets right more than plain, by seed."""
    with_it, without = ({run.seed: run.curve[name][1] for run in results} for name in (way, PLAIN))
    return paired(with_it, without)


def judge(results: Sequence[RunResult]) -> Finding:
    """Premise: 6 loops gain at least 0.1 nats over 1.

    Central: with the default contrast (1 early loop, cap 1) the likeliest token is right more often
    than without, by the paired interval over seeds. Most of the twelve contrasts are so. The mean
    loss with the default contrast is lower, too."""
    runs = by_arm(results)[TEXT]
    used = statistics.mean(run.curve["1 loop alone"][0] - run.curve[PLAIN][0] for run in runs)
    changes = {name: gain(runs, name) for name in contrasts()}
    better = [name for name, values in changes.items() if above(values)]
    default = [100 * value for value in changes[CHOSEN]]
    nats = statistics.mean(run.curve[CHOSEN][0] - run.curve[PLAIN][0] for run in runs)
    best = max(changes, key=lambda name: statistics.mean(changes[name]))
    statements = {
        f"contrasting with 1 loop: {plus_minus(default, 2, '+')} points of next tokens right": (
            above(changes[CHOSEN])
        ),
        f"{len(better)} of {len(changes)} contrasts raise it": 2 * len(better) > len(changes),
        f"the loss changes by {nats:+.3f} nats": nats < 0,
    }
    met = used >= USED
    sentence = (
        f"The premise is a model that uses its loops (6 against 1 are worth {used:.3f} nats, at "
        f"least {USED}): {'met' if met else 'not met'}. {as_sentence(statements)} Without a bar: "
        f"the best contrast, {best}, changes the share right by "
        f"{100 * statistics.mean(changes[best]):+.2f} points."
    )
    brief = (
        f"Next tokens right {statistics.mean(default):+.2f} points, loss {nats:+.3f} nats; "
        f"{len(better)} of {len(changes)} contrasts help."
    )
    return Finding(by_bars(statements, premise=met), sentence, _table(runs), brief)


def _table(runs: Sequence[RunResult]) -> list[dict[str, str]]:
    """A row per way of decoding."""
    return [
        {
            "decoding": name,
            "nats per token": plus_minus([run.curve[name][0] for run in runs]),
            "likeliest token right [%]": percent([run.curve[name][1] for run in runs]),
            "against plain [points]": plus_minus([100 * x for x in gain(runs, name)], 2, "+"),
        }
        for name in runs[0].curve
    ]


def _column(name: str, place: int) -> Column:
    what = ("nats", "right [%]")[place]
    return Column(
        f"{name}, {what}", lambda run: run.curve[name][place], percent if place else plus_minus
    )


COLUMNS = tuple(_column(name, place) for name in (PLAIN, CHOSEN) for place in (0, 1))


def draw(results: Sequence[RunResult]) -> tuple[Any, list[dict[str, object]]]:
    """What contrasts change by cap, a line per number of early loops."""
    panels = (study_plots.Lines(), study_plots.Lines())
    rows: list[dict[str, object]] = []
    for run in results:
        for name, (nats, hits) in run.curve.items():
            rows.append({"seed": run.seed, "decoding": name, "nats": nats, "right": hits})
        for name, how in contrasts().items():
            nats, hits = run.curve[name]
            line = name.split(",")[0]
            panels[0].add(line, how.cap, 100 * (hits - run.curve[PLAIN][1]))
            panels[1].add(line, how.cap, nats - run.curve[PLAIN][0])
    figure = study_plots.line_panels(
        dict(zip(("likeliest token", "loss"), panels, strict=True)),
        x_labels=["cap of the contrast"],
        y_labels=["right, against plain [points]", "against plain [nats]"],
        note=bands_note(results),
    )
    return figure, rows


STUDY = Study(
    name="contrastive-loops",
    claim="Decoding that enlarges what later loops changed makes a looped model better, untrained.",
    headline="Contrasting loops decodes better (LoopCD)",
    paper="7 of 8 comparisons improve, AIME24 44.0 to 52.9 (Ouro 2.6 B)",
    source="LoopCD (arXiv 2610.02185)",
    method=(
        "The text model that needs its loops (test-time-depth: 0.2 M parameters, 1500 steps), at 6 "
        "loops. z = z_6 + w (z_6 - z_early), w = cap (1 - (p_1 - p_2)), with 1, 2 or 3 early loops "
        "and four caps; loss and likeliest next token over 64 batches of 16 unseen windows of 128 "
        "tokens, read with the right prefix. Two temperatures stand beside them: a contrast "
        "sharpens, too, but cannot but change which token is likeliest; a temperature cannot."
    ),
    setups=(
        ("model", "Ouro 1.4 and 2.6 B, Parcae, Huginn", "0.2 M"),
        ("measured", "answers of benchmarks", "next tokens"),
    ),
    caption=(
        "The larger the contrast and the earlier its loop, the fewer next tokens are right and the "
        "higher is the loss; none of the twelve contrasts helps."
    ),
    not_shown=(
        "Reasoning: whether whole answers gain, as the paper says.",
        "Sampling.",
    ),
    arms=arms,
    measure=measure,
    judge=judge,
    draw=draw,
    columns=COLUMNS,
)
