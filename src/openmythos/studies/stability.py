"""Over which learning rates does a looped model train, by how its input is injected?"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from openmythos.analysis import study_plots
from openmythos.data.loader import evaluation_windows
from openmythos.recurrence.injection import (
    LTI,
    Add,
    Concat,
    ConcatInjection,
    Injection,
    LTIInjection,
    NoInjection,
)
from openmythos.recurrence.loop_sampling import Granularity, PoissonLoops
from openmythos.studies.study import Arm, Finding, RunResult, Study, Verdict, by_arm
from openmythos.studies.text import Text, TextLearning, TextRun, text_model
from openmythos.train.config import TrainConfig
from openmythos.train.optim import WSD, AdamW

RATES = (1e-3, 4e-3, 1.6e-2, 6.4e-2)
LOOPS = (1, 2, 4, 8, 16, 32, 64)
INJECTIONS: dict[str, Injection] = {
    "LTI": LTI(),
    "add": Add(),
    "concat": Concat(),
    "none": NoInjection(),
}
SAMPLING: tuple[Granularity, ...] = ("batch", "sequence")
# A run diverges that is not finite, or ends this many nats above its own best tenth.
WORSE = 0.3


def name_of(injection: str, per: str, rate: float) -> str:
    return f"{injection}, per {per}, {rate:g}"


def arms() -> list[Arm]:
    training = TrainConfig(
        num_steps=120,
        batch_size=4,
        seq_len=128,
        schedule=WSD(warmup=0.05, decay=0.2, final=0.1),
        precision="fp32",  # the same on every machine
    )
    return [
        Arm(
            name=name_of(name, per, rate),
            model=text_model(injection),
            task=Text(),
            learning=TextLearning(
                train=replace(
                    training,
                    loops=PoissonLoops(mean_loops=4.0, max_loops=12, per=per),
                    optimizer=AdamW(lr=rate),
                )
            ),
        )
        for name, injection in INJECTIONS.items()
        for per in SAMPLING
        for rate in RATES
    ]


@torch.no_grad()
def measure(trained: TextRun, arm: Arm, quick: bool) -> dict[str, Any]:
    """Losses of training, spectral radius of the linear part, size of the state by loops."""
    loops = LOOPS[:3] if quick else LOOPS
    batch = next(iter(evaluation_windows(trained.held_out, 128, batch_size=4)))
    tokens = batch.tokens.to(trained.model.device)
    out = trained.model(tokens, num_loops=max(loops), collect_loops=loops)
    sizes = [float(state.square().mean().sqrt()) for state in out.recurrence.states]
    losses = [step.loss for step in trained.history]
    return {
        "losses": [loss if math.isfinite(loss) else None for loss in losses],
        "largest_gradient": _finite(max(step.gradient_norm for step in trained.history)),
        "radius": radius(trained),
        "state_rms": {str(n): _finite(size) for n, size in zip(loops, sizes, strict=True)},
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def radius(trained: TextRun) -> float | None:
    """rho of the linear map from one loop's state to the next loop's input."""
    injection = trained.model.recurrent.injection
    if isinstance(injection, LTIInjection):
        return float(injection.discretize()[0].max())
    if isinstance(injection, ConcatInjection):
        weight = injection.state_map.weight
        if not bool(weight.isfinite().all()):
            return None
        return float(torch.linalg.eigvals(weight.cpu()).abs().max())
    return 1.0


def final_loss(result: RunResult) -> float:
    """Mean of the last tenth of the steps; infinite where one is not finite."""
    losses = result.curve["losses"]
    if any(loss is None for loss in losses):
        return math.inf
    return statistics.mean(losses[-max(1, len(losses) // 10) :])


def diverged(result: RunResult) -> bool:
    last, losses = final_loss(result), result.curve["losses"]
    if math.isinf(last):
        return True
    size = max(1, len(losses) // 10)
    tenths = [statistics.mean(losses[i : i + size]) for i in range(0, len(losses), size)]
    return last > min(tenths) + WORSE


def fit(result: RunResult) -> float:
    return -final_loss(result)


def _of(results: Sequence[RunResult], injection: str, per: str = "") -> list[RunResult]:
    return [r for r in results if r.arm.startswith(f"{injection}, per {per}")]


def judge(results: Sequence[RunResult]) -> Finding:
    """LTI must never diverge, with every other injection at least a fifth of the runs must, and the
    best loss of LTI must be within 2% of the best of any."""
    share = {name: statistics.mean(diverged(r) for r in _of(results, name)) for name in INJECTIONS}
    groups = by_arm(results)
    means = {name: statistics.mean(map(final_loss, runs)) for name, runs in groups.items()}
    best = {
        name: min(loss for arm, loss in means.items() if arm.startswith(f"{name},"))
        for name in INJECTIONS
    }
    others = [name for name in INJECTIONS if name != "LTI"]
    stable = share["LTI"] == 0
    unstable = all(share[name] >= 0.2 for name in others)
    competitive = best["LTI"] <= 1.02 * min(best.values())
    verdict: Verdict = "does not hold here"
    if stable and unstable and competitive:
        verdict = "holds"
    elif share["LTI"] < min(share[name] for name in others):
        verdict = "holds in part"
    table = []
    for name in INJECTIONS:
        for per in SAMPLING:
            runs = _of(results, name, per)
            row = {"injection": name, "loops drawn per": per}
            for rate in RATES:
                own = [r for r in runs if r.rate == rate]
                count = sum(map(diverged, own))
                loss = statistics.mean(map(final_loss, own))
                note = f" ({count} of {len(own)} diverge)" if count else ""
                row[f"lr {rate:g}"] = f"{loss:.2f}{note}"
            radii = [r.curve["radius"] for r in runs if r.curve["radius"] is not None]
            row["rho, largest"] = f"{max(radii):.3f}" if radii else "not finite"
            table.append(row)
    shares = ", ".join(f"{name} {share[name]:.0%}" for name in INJECTIONS)
    losses = ", ".join(f"{name} {best[name]:.3f}" for name in INJECTIONS)
    return Finding(verdict, f"Runs that diverge: {shares}. Best loss in nats: {losses}.", table)


def draw(results: Sequence[RunResult]) -> tuple[Any, list[dict[str, object]]]:
    """Final loss against learning rate; size of the state against loops at the best rate."""
    loss: dict[str, dict[float, list[float]]] = {}
    size: dict[str, dict[float, list[float]]] = {}
    rows: list[dict[str, object]] = []
    ceiling = 1.2 * math.log(Text().vocab_size)
    for name in INJECTIONS:
        runs = _of(results, name)
        for run in runs:
            # What is off the scale is drawn at its edge.
            loss.setdefault(name, {}).setdefault(run.rate, []).append(min(final_loss(run), ceiling))
            rows.append(
                {"arm": run.arm, "seed": run.seed, "final_loss": final_loss(run)}
                | {"diverged": diverged(run), "radius": run.curve["radius"]}
                | {f"state_rms_{n}": value for n, value in run.curve["state_rms"].items()}
            )
        rate = min((statistics.mean(losses), rate) for rate, losses in loss[name].items())[1]
        for run in (run for run in runs if run.rate == rate):
            for loops, value in run.curve["state_rms"].items():
                if value is not None:
                    size.setdefault(name, {}).setdefault(int(loops), []).append(value)
    figure = study_plots.line_panels(
        {"": loss, "at each one's best learning rate": size},
        x_labels=["learning rate", "num_loops (4 in training)"],
        y_labels=[f"final loss [nats / token], at most {ceiling:.1f}", "RMS of the state"],
        log_x=True,
        log_y=[False, True],
    )
    return figure, rows


STUDY = Study(
    name="stability",
    claim="LTI injection trains at learning rates at which other injections diverge.",
    source="Parcae (arXiv 2604.12946)",
    method=(
        "0.5 M parameters on Python's standard library, 120 steps of 4 x 128 tokens, loops from "
        f"Poisson(4), clipped gradients; learning rates {', '.join(f'{r:g}' for r in RATES)} "
        f"(AdamW). A run diverges that is not finite or ends {WORSE} nats above its best tenth."
    ),
    not_shown=(
        "Long runs, large models: where the paper sees most divergence.",
        "Runs that learn much: at the two higher rates all end near the loss of single-token "
        "frequencies, which is failure, but no divergence by the rule.",
    ),
    arms=arms,
    measure=measure,
    fit=fit,
    judge=judge,
    draw=draw,
)
