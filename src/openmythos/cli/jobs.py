"""Long-running work of the commands, each with a progress bar."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

from rich.table import Table

from openmythos.cli.interrupt import Interrupted, stop_training
from openmythos.cli.progress import Progress
from openmythos.cli.screen import OUT, print_heat_map
from openmythos.config import require
from openmythos.distributed.ranks import first_rank_does, launched, process_group, wait_for_file
from openmythos.files import write_json
from openmythos.machine import choose_device
from openmythos.recipes import report, task_report
from openmythos.recipes.report import LoopReport
from openmythos.recipes.task_report import HopsReport
from openmythos.tasks.words import Words
from openmythos.train.config import RunConfig, TaskData
from openmythos.train.folder import CONFIG_FILE
from openmythos.train.guards import Divergence
from openmythos.train.run import Run, train


def create(folder: Path, config: RunConfig) -> Run:
    """Create a run folder. Rank 0 writes it; the other ranks wait and fail if rank 0 fails."""

    def work() -> Run:
        with Progress(OUT, "reading the corpus", unit="MB") as progress:
            return Run.create(
                folder, config, lambda stage, done: progress.update(done, stage=stage)
            )

    run = first_rank_does(work)
    if run is None:
        wait_for_file(folder / CONFIG_FILE)
        return Run.open(folder)
    if isinstance(config.data, TaskData):
        OUT.print(f"{folder}: {config.data.task.kind}, up to {config.data.max_hops} hops")
        return run
    tokens, held_out = (len(run.shards(part, verify=False)) for part in ("train", "held_out"))
    OUT.print(
        f"{folder}: {tokens:,} training and {held_out:,} held-out tokens, "
        f"vocabulary of {run.tokenizer.vocab_size}"
    )
    return run


def train_with_bar(run: Run, *, resume: bool) -> bool:
    """Train until the last step; returns False if a signal stopped a run of several ranks.

    In a run of one process, the signal raises Interrupted.
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
            on_message=lambda line: OUT.print(line, soft_wrap=True),
        )
        with stop_training(received):
            for metrics in steps:
                done = metrics.step + 1
                warning = divergence.saw(metrics.step, metrics.total_loss, metrics.gradient_norm)
                if warning:
                    OUT.print(warning, soft_wrap=True)
                smooth = metrics.loss if smooth is None else 0.9 * smooth + 0.1 * metrics.loss
                hops = metrics.data.get("hops")
                reached = f"up to {hops:.0f} hops, " if hops else ""
                rate = f"{metrics.tokens_per_second:,.0f} tokens/s"
                progress.update(done, f"{reached}loss {smooth:.3f}, {rate}")
    if done != config.num_steps and (received or done is not None):
        when = "in its first step" if done is None else f"after step {done}, checkpoint saved"
        OUT.print(f"stopped {when}; go on with")
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
    """Print the next commands to run; `prompt` is for a model trained on Python's source code."""
    name = quote(str(run.folder))
    if isinstance(run.config.data, TaskData):
        OUT.print(f"\nNext:  openmythos eval {name}", soft_wrap=True)
        return
    prompt = prompt if run.text.paths == ("stdlib",) else _first_words(run)
    OUT.print(f"\nNext:  openmythos generate {name} --prompt={quote(prompt)}", soft_wrap=True)
    OUT.print(f"       openmythos eval {name}", soft_wrap=True)


def _first_words(run: Run) -> str:
    """The first words of the training text."""
    shards = run.shards("train", verify=False)
    text = run.tokenizer.decode(shards.read(0, min(64, len(shards))).tolist())
    line = next((line for line in text.splitlines() if line.strip()), "")
    return " ".join(line.strip("\ufffd").split()[:3])[:40]


def evaluate(run: Run, loops: tuple[int, ...], **options: Any) -> LoopReport:
    """Call `report.evaluate` and print bits per byte by number of loops."""
    return print_report(partial(report.evaluate, run, loops, **options))


def print_report(evaluation: Callable[..., LoopReport]) -> LoopReport:
    """Run an evaluation with a progress bar and print bits per byte by number of loops."""
    with Progress(OUT, "evaluating", unit="tokens") as progress:
        found = evaluation(progress=lambda done, total: progress.update(done, total=total))
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


def evaluate_hops(run: Run, loops: tuple[int, ...], **options: Any) -> HopsReport:
    """Call `task_report.evaluate` and print accuracy by hops and loops."""
    with Progress(OUT, "asking", unit="numbers of hops") as progress:
        options["progress"] = lambda done, total: progress.update(done, total=total)
        found = task_report.evaluate(run, loops, **options)
    print_heat_map(found.accuracy, found.data.max_hops)
    OUT.print(f"computed in {found.precision} on {found.device}")
    return found


def evaluate_tasks(
    run: Run,
    tasks: str,
    loops: Sequence[int],
    folder: Path,
    *,
    device: str,
    step: int | None,
    precision: str,
) -> Path:
    """Print the metrics of lm-eval's tasks by loops; returns the JSON file that has them."""
    from openmythos.eval import harness, harness_tasks

    model, step = run.load_checkpoint(device, step=step)
    if run.choose_precision(precision, model.device) == "bf16":
        model.bfloat16()
    data = run.config.data
    if isinstance(data, TaskData):
        kind = data.thoughts.kind
        require(kind == "none", "tasks", tasks, f"must not be given: the run has {kind} thoughts")
    encoder = Words(data.task) if isinstance(data, TaskData) else run.tokenizer
    own = tasks if Path(tasks).is_dir() else None
    names = [harness_tasks.TAG] if own else tasks.split(",")
    found = harness.evaluate(harness.HarnessModel(model, encoder), names, loops, folder=own)
    table = Table("task", "metric", *(f"loops: {count}" for count in loops))
    for task, by_loops in found.items():
        for metric in next(iter(by_loops.values())):
            if not metric.endswith("_stderr"):
                values = (f"{by_loops[count][metric]:.4f}" for count in loops)
                table.add_row(task, metric, *values)
    OUT.print(table)
    path = folder / "lm-eval.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_json({"step": step, "dtype": str(model.embed.weight.dtype), "results": found}, path)
    return path
