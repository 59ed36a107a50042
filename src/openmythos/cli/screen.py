"""What the commands show: progress bars, tables, streamed text."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from openmythos.cli.interrupt import Interrupted, stop_training
from openmythos.cli.progress import Progress
from openmythos.distributed.ranks import first_rank_does, launched, process_group, wait_for_file
from openmythos.inference.generation import Request
from openmythos.inference.text import Engine
from openmythos.machine import choose_device
from openmythos.model.mythos import OpenMythos
from openmythos.planning import cost, fit
from openmythos.recipes import report
from openmythos.recipes.report import LoopReport
from openmythos.studies import depth_extrapolation
from openmythos.studies.learning import Learning, accuracy_map, learn
from openmythos.studies.runner import run_study
from openmythos.studies.study import Finding, Study
from openmythos.train.config import RunConfig
from openmythos.train.guards import Divergence
from openmythos.train.run import CONFIG_FILE, Run, train

# Only rank 0 prints. Output is numbers and code, so rich must not colour it or read it as markup.
# Lines are not wrapped in a file or a pipe.
_WIDTH = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 1000
OUT = Console(highlight=False, markup=False, quiet=launched()[0] > 0, width=_WIDTH)
HOPS_ASKED = (5, 10, 15, 20, 25, 30, 40, 50, 60)
LOOPS_ASKED = (5, 10, 15, 20, 25, 30, 40, 50, 60, 80, 100)


def create(folder: Path, config: RunConfig) -> Run:
    """Make a run folder; of several ranks the first makes it, and the others fail if it does."""

    def make() -> Run:
        with Progress(OUT, "reading the corpus", unit="MB") as progress:
            return Run.create(
                folder, config, lambda stage, done: progress.update(done, stage=stage)
            )

    run = first_rank_does(make)
    if run is None:
        wait_for_file(folder / CONFIG_FILE)
        return Run.open(folder)
    tokens, held_out = (len(run.shards(part, verify=False)) for part in ("train", "held_out"))
    OUT.print(
        f"{folder}: {tokens:,} training and {held_out:,} held-out tokens, "
        f"vocabulary of {run.tokenizer.vocab_size}"
    )
    return run


def train_with_bar(run: Run, *, resume: bool) -> bool:
    """Train with a progress bar; False if a signal stopped the ranks before the last step.

    Where there is one process, it is then interrupted.
    """
    config = run.config.train
    received: list[int] = []
    done, smooth, divergence = None, None, Divergence()
    with (
        process_group(choose_device(config.device, "train.device")),
        Progress(OUT, "training", total=config.num_steps) as progress,
    ):
        steps = train(
            run,
            resume=resume,
            stopping=lambda: bool(received),
            told=lambda line: OUT.print(line, soft_wrap=True),
        )
        with stop_training(received):
            for metrics in steps:
                done = metrics.step + 1
                warning = divergence.saw(metrics.step, metrics.total_loss, metrics.gradient_norm)
                if warning:
                    OUT.print(warning, soft_wrap=True)
                smooth = metrics.loss if smooth is None else 0.9 * smooth + 0.1 * metrics.loss
                text = f"loss {smooth:.3f}, {metrics.tokens_per_second:,.0f} tokens/s"
                progress.update(done, text)
    if done != config.num_steps and (received or done is not None):
        what = "in its first step" if done is None else f"after step {done}, checkpoint saved"
        OUT.print(f"stopped {what}; go on with")
        OUT.print(f"    openmythos train --resume {quote(str(run.folder))}", soft_wrap=True)
        if launched()[1] == 1:
            raise Interrupted(received[0])
        return False
    if done is None:
        OUT.print(f"{run.folder}: all {config.num_steps} steps are done already")
    elif launched()[0] == 0:
        report.write_loss_curve(run)
    divergence.check()
    return True


def print_next(run: Run, prompt: str) -> None:
    """What to do with a trained run, to be pasted into a shell; `prompt` suits Python's source."""
    name = quote(str(run.folder))
    prompt = prompt if run.config.data.paths == ("stdlib",) else _first_words(run)
    OUT.print(f"\nNext:  openmythos generate {name} --prompt={quote(prompt)}", soft_wrap=True)
    OUT.print(f"       openmythos eval {name}", soft_wrap=True)


def _first_words(run: Run) -> str:
    """How the text begins that the run was trained on."""
    shards = run.shards("train", verify=False)
    text = run.tokenizer.decode(shards.read(0, min(64, len(shards))).tolist())
    line = next((line for line in text.splitlines() if line.strip()), "")
    return " ".join(line.strip("\ufffd").split()[:3])[:40]


def evaluate(
    run: Run,
    loops: tuple[int, ...],
    data: tuple[str, ...],
    *,
    device: str = "auto",
    step: int | None = None,
    precision: str = "auto",
) -> LoopReport:
    """Score and print the table of bits per byte against loops."""
    with Progress(OUT, "evaluating", unit="tokens") as progress:
        found = report.evaluate(
            run,
            loops,
            data=data,
            device=device,
            step=step,
            precision=precision,
            progress=lambda done, total: progress.update(done, total=total),
        )
    table = Table("loops", "bits per byte", "perplexity per token", title=found.text)
    for loop, result in found.loops.items():
        table.add_row(str(loop), f"{result.bits_per_byte:.4f}", f"{result.perplexity:.2f}")
    table.add_section()
    for name, bits in found.compressors.items():
        table.add_row(name, f"{bits:.4f}", "")
    OUT.print(table)
    OUT.print(f"computed in {found.precision} on {found.device}")
    if found.verdict():
        OUT.print(found.verdict())
    return found


def run_study_with_bar(study: Study, folder: Path, **options: Any) -> Finding:
    """Run a study's missing runs under a progress bar; Ctrl-C keeps those that are done."""
    with Progress(OUT, study.name, unit="runs") as progress:
        return run_study(
            study,
            folder,
            told=lambda done, total, last: progress.update(done, last, total=total),
            **options,
        )


@contextmanager
def one_thread() -> Iterator[None]:
    """The model of the hops is too small for two threads (Zen 3: 24 s on one, 29 s on two)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def learn_hops(num_steps: int, device: str = "auto") -> dict[int, dict[int, float]]:
    """Train the looped model of study depth-extrapolation; accuracy by hops and loops."""
    arm = next(arm for arm in depth_extrapolation.arms() if arm.name == depth_extrapolation.LOOPED)
    assert isinstance(arm.learning, Learning)
    learning = replace(arm.learning, num_steps=num_steps)
    model = OpenMythos(arm.model, seed=0).to(choose_device(device))
    OUT.print(
        f"A model of {cost.parameters(arm.model).total:,} parameters learns to follow chains of up "
        f"to {learning.max_hops} lookups, e0 r1 r2 ... -> r2(r1(e0)), in tables that it must "
        "remember.\nThen it is asked longer chains than it ever saw."
    )
    with one_thread(), Progress(OUT, "learning hops", total=num_steps) as progress:
        for done in learn(model, arm.problems, learning, seed=0):
            progress.update(done.step + 1, f"up to {done.reach} hops, loss {done.loss:.2f}")
    with Progress(OUT, "asking", total=len(HOPS_ASKED), unit="numbers of hops") as progress:
        found: dict[int, dict[int, float]] = {}
        for hops in HOPS_ASKED:
            found |= accuracy_map(model, arm.problems, (hops,), LOOPS_ASKED, examples=100)
            progress.update(len(found))
    return found


def print_heat_map(found: Mapping[int, Mapping[int, float]], trained_hops: int) -> None:
    """Hops against loops, right answers in percent; a line above what was never trained."""
    loops = list(next(iter(found.values())))
    OUT.print("\nright answers in %:  hops (down) against loops at inference (across)")
    OUT.print("        " + "".join(f"{loop:>5}" for loop in loops))
    for hops, row in found.items():
        line = Text(f"{hops:>3}{' new' if hops > trained_hops else '':<5}")
        for share in row.values():
            shade = round(40 + 180 * share)
            ink = "black" if share > 0.5 else "white"
            style = f"{ink} on rgb({shade},{shade},{round(110 - 60 * share)})"
            line.append(f"{100 * share:>5.0f}", style=style)
        OUT.print(line)


def stream(engine: Engine, prompt: str, request: Request) -> list[int]:
    """Print prompt and continuation as they come; returns the loops of every token."""
    loops = []
    pieces = engine.stream(prompt, request)
    # Not through rich, which would turn ":smile:" into a face and tabs into spaces.
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece.text, end="", flush=True)
        loops.append(piece.loops_used)
    print()
    return loops


def short(number: int | float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def print_plan(name: str, plan: cost.Plan) -> None:
    count, training = plan.parameters, plan.training
    table = Table("", name, show_header=True)
    table.add_row("parameters, total", short(count.total))
    table.add_row("  active per token", short(count.active))
    for part in ("embedding", "prelude", "recurrent", "coda", "head"):
        table.add_row(f"  {part}", short(getattr(count, part)))
    table.add_row("  of it routed experts", short(count.routed_experts))
    table.add_section()
    table.add_row("layers executed", f"{plan.effective_depth} with {plan.num_loops} loops")
    table.add_row("FLOPs per token, forward", short(plan.forward_flops))
    table.add_row("FLOPs per token, training", short(plan.training_flops))
    table.add_section()
    shape = f"{plan.batch} x {plan.context:,} tokens, {str(plan.dtype).removeprefix('torch.')}"
    table.add_row("weights", _bytes(plan.weight_bytes))
    table.add_row(f"KV cache, {shape}", _bytes(plan.cache_bytes))
    table.add_row("  all loops sharing one slot", _bytes(plan.shared_cache_bytes))
    table.add_section()
    table.add_row(f"training memory, {shape}", _bytes(training.total))
    table.add_row("  weights", _bytes(training.weights))
    table.add_row("  gradients", _bytes(training.gradients))
    table.add_row("  optimizer state", _bytes(training.optimizer))
    table.add_row("  activations", _bytes(training.activations))
    table.add_row("  logits", _bytes(training.logits))
    table.add_row("  with checkpointed loops", _bytes(plan.checkpointed.total))
    OUT.print(table)


def print_fit(name: str, found: fit.Fit) -> None:
    memory, settings = found.memory, found.settings
    table = Table("memory of each device", name, show_header=True)
    for part in vars(memory):
        table.add_row(part, _bytes(getattr(memory, part)))
    table.add_section()
    table.add_row("in all", _bytes(memory.total))
    table.add_row(f"usable ({fit.USABLE:.0%})", _bytes(found.usable))
    OUT.print(table)
    where = f"{settings.gpus} device{'s' if settings.gpus > 1 else ''}"
    said = f"fits {where} with"
    if not found.fits:
        said = f"does not fit {where}, not even with these settings, which need least"
    OUT.print(f"{name} {said}:\n    --set {' '.join(settings.overrides())}", soft_wrap=True)


def _bytes(number: int | float) -> str:
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:.0f} B"
