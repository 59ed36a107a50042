"""What is a loop worth on text: at equal parameters, against a layer, and at equal compute?"""

import functools
import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openmythos.analysis import study_plots
from openmythos.eval.likelihood import depth_sweep
from openmythos.nn.latent_attention import LatentAttention
from openmythos.recurrence.injection import LTI
from openmythos.recurrence.injections import NoInjection
from openmythos.recurrence.loop_sampling import FixedLoops
from openmythos.studies.statistics import paired, plus_minus
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
    factors_of,
    table_of,
)
from openmythos.studies.text import TextRun, on_two_corpora, text_model, text_training
from openmythos.train.optim import Muon

TOKENS = (0.35, 0.7, 1.4)  # million of training
DEPTHS = (1, 2, 4)  # layers, or loops of one layer
DEEPEST = 8  # at the middle number of tokens alone
BATCH, LENGTH = 8, 128
RESAMPLES = 1000
PUBLISHED = 0.46  # phi of the iso-depth law
WORTH = 0.05  # nats that 4 loops must save against 1
LATENT, INJECTED = "4 loops, latent attention", "4 loops, LTI injection"


def name_of(kind: str, depth: int, tokens: float) -> str:
    """Such as "4 loops, 0.7 M tokens"; one loop of one layer is "1 layer"."""
    unit = "layer" if kind == "layers" or depth == 1 else "loop"
    return f"{depth} {unit}{'s' * (depth > 1)}, {tokens:g} M tokens"


def arms() -> list[Arm]:
    """Learning rates are tuned with the fewest tokens, for 1 layer, 4 layers and 4 loops."""
    found = []
    for tokens in TOKENS:
        depths = (*DEPTHS, DEEPEST) if tokens == TOKENS[1] else DEPTHS
        for kind, depth in itertools.product(("layers", "loops"), depths):
            if (kind, depth) != ("loops", 1):
                found.append(_arm(kind, depth, tokens))
    model, middle = found[-1].model, TOKENS[1]
    extra = {
        LATENT: replace(model, num_loops=4, attention=_latent()),
        INJECTED: replace(text_model(LTI()), prelude_layers=0, coda_layers=0),
    }
    looped = _arm("loops", 4, middle)
    for name, changed in extra.items():
        run = on_two_corpora(changed, looped.run.train)
        factors = {"kind": name, "depth": "4", "tokens": f"{middle:g}"}
        found.append(replace(looped, name=name, run=run, factors=factors))
    return found


def _arm(kind: str, depth: int, tokens: float) -> Arm:
    """All without prelude, coda and injection: loops differ from layers by sharing alone."""
    one = replace(text_model(NoInjection()), prelude_layers=0, coda_layers=0, num_loops=1)
    layers, loops = (depth, 1) if kind == "layers" else (1, depth)
    tuned_depth = 1 if depth == 1 else 4
    tuned = tokens == TOKENS[0] and depth == tuned_depth
    training = replace(
        text_training(FixedLoops(mean_loops=loops)),
        num_steps=round(1e6 * tokens / (BATCH * LENGTH)),
        optimizer=Muon(lr=6e-3, adamw_lr_scale=4.0),
    )
    return Arm(
        name=name_of(kind, depth, tokens),
        run=on_two_corpora(replace(one, recurrent_layers=layers, num_loops=loops), training),
        factors={"kind": kind, "depth": str(depth), "tokens": f"{tokens:g}"},
        rates=(3e-3, 6e-3, 1.2e-2) if tuned else (),
        trial_seeds=2,
        tuned_as="" if tuned else name_of(kind, tuned_depth, TOKENS[0]),
    )


def _latent() -> LatentAttention:
    """With as many parameters as the grouped-query attention of the other arms."""
    return LatentAttention(
        num_heads=4,
        kv_latent_dim=40,
        q_latent_dim=64,
        nope_head_dim=16,
        rope_head_dim=16,
        value_head_dim=24,
    )


@torch.no_grad()
def measure(trained: TextRun, arm: Arm, quick: bool) -> dict[str, Any]:
    """Held-out nats per token at the loops of training."""
    loops = arm.model.num_loops
    found = depth_sweep(trained.model, trained.held_out, (loops,), seq_len=LENGTH, batch_size=16)
    return {"nats": found[loops].nats_per_token}


def nats(run: RunResult) -> float:
    return float(run.curve["nats"])


@functools.cache
def _factors() -> dict[str, dict[str, str]]:
    return factors_of(arms())


class Shape(NamedTuple):
    """What the law knows of an arm."""

    layers: int
    loops: int
    tokens: float  # million


def shapes() -> dict[str, Shape]:
    """Of the arms that the law is fitted to, by name."""
    return {
        name: Shape(
            int(f["depth"]) if f["kind"] == "layers" else 1,
            int(f["depth"]) if f["kind"] == "loops" else 1,
            float(f["tokens"]),
        )
        for name, f in _factors().items()
        if f["kind"] in ("layers", "loops")
    }


class Law(NamedTuple):
    """L = E + A (layers loops^phi)^-a + B D^-b; the interval of phi."""

    phi: float
    low: float
    high: float
    a: float
    b: float
    solution: Tensor  # E, A, B

    def loss(self, shape: Shape) -> float:
        terms = _terms([shape], torch.tensor([[self.phi, self.a, self.b]], dtype=torch.double))[0]
        return float(terms[0] @ self.solution)


def fitted(losses: Mapping[str, Sequence[float]]) -> Law:
    """The law by least squares, and phi's percentiles over draws of seeds within each arm.

    `losses`: those of the seeds, by arm. E, A and B are solved for each phi, a, b of a grid.
    """
    known = shapes()
    grid = torch.tensor(
        [
            *itertools.product(
                [round(0.02 * k, 2) for k in range(-10, 61)],
                (0.25, 0.5, 0.75, 1.0, 1.5, 2.0),
                [round(0.1 * k, 1) for k in range(1, 11)],
            )
        ],
        dtype=torch.double,
    )
    design = _terms([known[name] for name in losses], grid)
    inverse = torch.linalg.pinv(design)
    left = torch.eye(design.shape[1]).double() - design @ inverse
    generator = torch.Generator().manual_seed(0)
    means, resampled = [], []
    for values in losses.values():
        seeds = torch.tensor(values, dtype=torch.double)
        picked = torch.randint(len(seeds), (RESAMPLES, len(seeds)), generator=generator)
        means.append(seeds.mean())
        resampled.append(seeds[picked].mean(dim=1))
    best, *others = _least(left, torch.stack((torch.stack(means), *torch.stack(resampled, dim=1))))
    percentiles = torch.tensor([0.025, 0.975], dtype=torch.double)
    low, high = torch.quantile(grid[torch.tensor(others), 0], percentiles).tolist()
    phi, a, b = grid[best].tolist()
    return Law(phi, low, high, a, b, inverse[best] @ torch.stack(means))


def _least(left: Tensor, targets: Tensor) -> list[int]:
    """The place in the grid with the least squared error, for each row of targets."""
    found: list[int] = []
    for rows in torch.tensor_split(targets, max(1, len(targets) // 100)):
        errors = torch.einsum("gij,tj->gti", left, rows).square().sum(dim=-1)
        found += errors.argmin(dim=0).tolist()
    return found


def _terms(known: Sequence[Shape], grid: Tensor) -> Tensor:
    """1, (layers loops^phi)^-a and D^-b, [grid, arms, 3]."""
    layers, loops, tokens = torch.tensor(known, dtype=torch.double).unbind(dim=1)
    phi, a, b = grid[:, None].unbind(dim=-1)
    size = layers * loops**phi
    return torch.stack((torch.ones_like(size), size**-a, tokens**-b), dim=-1)


def by_seed(runs: Sequence[RunResult]) -> dict[int, float]:
    return {run.seed: nats(run) for run in runs}


def saved(results: Sequence[RunResult], name: str, other: str) -> list[float]:
    """Nats that an arm saves against another, seed by seed."""
    groups = by_arm(results)
    return paired(by_seed(groups[other]), by_seed(groups[name]))


def at_equal_flops(results: Sequence[RunResult], law: Law) -> tuple[float, float]:
    """Loss of 4 loops with the fewest tokens, and of 1 loop by the law with as many FLOPs."""
    groups = by_arm(results)
    four, one = (groups[name_of("loops", depth, TOKENS[0])] for depth in (4, 1))
    ratio = (four[0].training_flops or 1) / (one[0].training_flops or 1)
    return statistics.mean(map(nats, four)), law.loss(Shape(1, 1, ratio * TOKENS[0]))


COLUMNS = (Column("held-out nats", nats),)


def judge(results: Sequence[RunResult]) -> Finding:
    """Premise: depth pays, 4 layers save at least 0.05 nats against 1 at 1.4 M tokens, in every
    seed. Central: at equal parameters, so do 4 loops against 1 at 0.7 and at 1.4 M tokens. In the
    law E + A (layers loops^phi)^-a + B D^-b, phi's bootstrap interval lies between 0 and 1, and
    contains 0.46. Compute and attention are without a bar."""
    most = TOKENS[-1]
    deeper = saved(results, name_of("layers", 4, most), name_of("layers", 1, most))
    met = min(deeper) >= WORTH
    saves = {
        tokens: saved(results, name_of("loops", 4, tokens), name_of("layers", 1, tokens))
        for tokens in TOKENS[1:]
    }
    groups = by_arm(results)
    law = fitted({name: [nats(run) for run in groups[name]] for name in shapes()})
    interval = f"{law.phi:.2f} ({law.low:.2f} to {law.high:.2f})"
    shown = ", ".join(f"{plus_minus(v)} at {t:g} M tokens" for t, v in saves.items())
    statements = {
        f"at equal parameters 4 loops save {shown} nats against 1 (at least {WORTH} in "
        "every seed)": all(min(values) >= WORTH for values in saves.values()),
        f"phi is {interval}, between 0 and 1": law.low > 0 and law.high < 1,
        f"its interval contains {PUBLISHED}": law.low <= PUBLISHED <= law.high,
    }
    looped, once = at_equal_flops(results, law)
    middle = name_of("loops", 4, TOKENS[1])
    latent, injected = (saved(results, middle, name) for name in (LATENT, INJECTED))
    sentence = (
        f"The premise is that depth pays (4 layers save {plus_minus(deeper)} nats against 1, at "
        f"least {WORTH}): {'met' if met else 'not met'}. {as_sentence(statements)} "
        f"So 4 loops of a layer are worth {4**law.phi:.1f} layers. "
        f"Without a bar: at the FLOPs of 4 loops on {TOKENS[0]} M tokens these have {looped:.3f} "
        f"nats, one loop on more tokens {once:.3f} (by the law). At equal parameters latent "
        f"attention costs {plus_minus(latent, sign='+')} nats, LTI injection "
        f"{plus_minus(injected, sign='+')}."
    )
    brief = f"4 loops save {statistics.mean(saves[TOKENS[1]]):.2f} nats; phi {interval}."
    verdict = by_bars(statements, premise=met)
    return Finding(verdict, sentence, table_of(results, COLUMNS), brief)


def draw(results: Sequence[RunResult]) -> tuple[Any, list[dict[str, object]]]:
    """Loss by layers or loops with the fitted law, a panel per number of tokens."""
    panels = study_plots.Panels()
    rows: list[dict[str, object]] = []
    for run in results:
        place = _factors()[run.arm]
        rows.append({"arm": run.arm, "seed": run.seed, "nats": nats(run)} | place)
        panel, depth = f"{float(place['tokens']):g} M tokens", int(place["depth"])
        if place["kind"] in ("layers", "loops"):
            kinds = ("layers", "loops") if depth == 1 else (place["kind"],)
            for kind in kinds:
                line = "layers" if kind == "layers" else "loops of one layer"
                panels.add(panel, line, depth, nats(run))
    groups, laws = by_arm(results), ("law, layers", "law, loops")
    law = fitted({name: [nats(run) for run in groups[name]] for name in shapes()})
    for shape in shapes().values():
        depth = max(shape.layers, shape.loops)
        for line in laws if depth == 1 else (laws[shape.loops > 1],):
            panels.add(f"{shape.tokens:g} M tokens", line, depth, law.loss(shape))
    figure = study_plots.line_panels(
        panels,
        x_labels=["layers, or loops of one layer"],
        y_labels=["held-out loss [nats / token]"],
        log_x=True,
        same_y=True,
        laws=laws,
        note=bands_note(results),
    )
    return figure, rows


STUDY = Study(
    name="iso-parameter-text",
    claim="At equal parameters loops lower the loss of a language model, by less than layers do.",
    headline="Loops are worth parameters, less than layers (iso-depth law)",
    paper="phi = 0.46: 4 loops of 410 M are worth 580 M; perplexity 21.48 to 19.06 (Parcae, 140 M)",
    source="iso-depth scaling law (arXiv 2604.21106); Parcae (arXiv 2604.12946)",
    method=(
        "Width 96, no prelude, no coda, no injection: 1, 2 or 4 layers, or one layer with 2 or 4 "
        "loops (fixed in training), on 0.35, 0.7 and 1.4 M tokens of Python's standard library and "
        "an English dictionary; 8 of each at 0.7 M. Layers and loops of equal depth compute the "
        "same, and differ by sharing alone. The law counts layers, without embeddings. Learning "
        "rates are tuned at 0.35 M tokens for 1 layer, 4 layers and 4 loops. Interval of phi: "
        "percentiles over 1000 draws of seeds."
    ),
    setups=(
        ("model", "up to 1 B parameters", "0.1 M in a layer, 0.1 M in embeddings"),
        ("tokens", "10 to 100 per parameter", "2 to 7 per parameter of one layer"),
        ("runs of the law", "116", "see the table"),
    ),
    caption=(
        "To loop a layer saves a fraction of what layers of their own save: 4 loops are worth 1.3 "
        "layers, and with the most tokens hardly more than one. LTI injection, which is not drawn, "
        "saves another 0.05 nats at 0.7 M tokens. Held-out loss by layers, or by loops of one "
        "layer, and the fitted law (dashed); a panel per number of training tokens."
    ),
    not_shown=(
        "Layers outside of the loop: all of these models are loop.",
        "Text and models of the papers' size, where the law may have another exponent.",
        "Width as the other way to more parameters.",
        "Equal FLOPs by measurement: one loop on more tokens is what the fitted law says of it.",
        "Rates tuned at every number of tokens, and more than three seeds: phi's interval draws "
        "from these.",
    ),
    arms=arms,
    measure=measure,
    judge=judge,
    draw=draw,
    columns=COLUMNS,
)
