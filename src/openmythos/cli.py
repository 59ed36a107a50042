"""The command line: the only file that knows argv and prints."""

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import FrameType
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from openmythos.config import ConfigError, apply_overrides, require, save_toml, to_dict
from openmythos.data.tokenizer import BPE
from openmythos.inference.engine import Engine
from openmythos.model import cost, presets
from openmythos.model.generation import Request
from openmythos.recipes import catalogue, report
from openmythos.recipes.report import LoopReport
from openmythos.train.config import DataConfig, RunConfig
from openmythos.train.run import CONFIG_FILE, Run, open_data, train

# Numbers and code are what gets printed: nothing for rich to colour or to read as markup.
OUT = Console(highlight=False, markup=False)
DEMO_LOOPS = (1, 2, 4, 8, 16)
DEMO_PROMPT = "def main("

Many = tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]]


def _flat(values: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    return tuple(value for group in values for value in group)


@dataclass(frozen=True)
class Train:
    """Train a model on text; makes a run folder, or goes on with one (--resume)."""

    recipe: str = "demo"
    """Config to start from: tiny (seconds), demo (minutes) or small (an hour or two)."""
    data: Many = ()
    """Text files, folders, globs, .jsonl, .parquet, hf:NAME, or stdlib (the default)."""
    set: Many = ()
    """Changes to the config, such as model.halting=act or train.num_steps=500."""
    out: str = ""
    """Run folder to make (default: runs/RECIPE-N)."""
    resume: str = ""
    """Run folder to go on with; only train.* can be changed."""

    def run(self) -> None:
        if self.resume:
            require(not self.data, "data", list(_flat(self.data)), "goes not with --resume")
            run = Run.open(Path(self.resume))
            changed = apply_overrides(run.config, _flat(self.set))
            for field in fields(changed):
                if field.name != "train" and changed != replace(
                    changed, **{field.name: getattr(run.config, field.name)}
                ):
                    raise ConfigError(f"{field.name}: cannot change when a run is resumed")
            run = replace(run, config=changed)
            save_toml(changed, run.folder / CONFIG_FILE)
        else:
            config = catalogue.get(self.recipe)
            if self.data:
                config = replace(config, data=replace(config.data, paths=_flat(self.data)))
            config = apply_overrides(config, _flat(self.set))
            folder = Path(self.out) if self.out else _free_folder(self.recipe)
            run = _create(folder, config)
        if _train(run, resume=bool(self.resume)):
            OUT.print(f"\nNext:  openmythos generate {run.folder} --prompt {DEMO_PROMPT!r}")
            OUT.print(f"       openmythos eval {run.folder}")


@dataclass(frozen=True)
class Generate:
    """Continue a prompt with a trained model, printing the text as it is decoded."""

    folder: tyro.conf.Positional[str]
    """Run folder."""
    prompt: str = ""
    """Text to continue; empty: from the start token."""
    num_loops: int | None = None
    """Loops per token (default: the model's). More than in training is allowed."""
    max_new_tokens: int = 128
    """Tokens to generate."""
    temperature: float = 0.8
    """0 takes the most likely token every time."""
    top_k: int = 0
    """Keep the k most likely tokens (0: all)."""
    top_p: float = 1.0
    """Keep the likeliest tokens that together have this probability."""
    min_p: float = 0.0
    """Keep tokens at least this many times as likely as the likeliest."""
    seed: int = 0
    """Seed of the draws."""
    exit_rule: str = "fixed"
    """When to stop looping early: fixed, state_change, kl, kl_entropy or argmax."""
    set: Many = ()
    """More settings, such as exit_rule.threshold=1e-3, decode=last or prefill_chunk=64."""

    def run(self) -> None:
        run = Run.open(Path(self.folder))
        model = run.load_model()
        request = Request(max_new_tokens=self.max_new_tokens, stop_ids=(run.tokenizer.bos_id,))
        chosen = [f"exit_rule.kind={self.exit_rule}", f"num_loops={model.config.num_loops}"]
        if self.num_loops is not None:
            chosen[1] = f"num_loops={self.num_loops}"
        for name in ("temperature", "top_k", "top_p", "min_p", "seed"):
            chosen.append(f"sampling.{name}={getattr(self, name)}")
        request = apply_overrides(request, [*chosen, *_flat(self.set)])
        loops = _stream(Engine(model, run.tokenizer), self.prompt, request)
        if self.exit_rule != "fixed" and loops:
            OUT.print(f"\n[{sum(loops) / len(loops):.1f} of {request.num_loops} loops per token]")


@dataclass(frozen=True)
class Eval:
    """Bits per byte and perplexity of held-out text against the number of loops."""

    folder: tyro.conf.Positional[str]
    """Run folder."""
    data: Many = ()
    """Text to score instead of the run's own held-out part."""
    num_loops: str = "1,2,4,8,16"
    """Loop counts, separated by commas."""
    out: str = ""
    """Folder for eval.json, loops.png and loops.csv (default: the run folder)."""

    def run(self) -> None:
        run = Run.open(Path(self.folder))
        loops = _loop_counts(self.num_loops)
        found = _evaluate(run, loops, _flat(self.data))
        folder = Path(self.out) if self.out else run.folder
        report.write_report(found, folder)
        OUT.print(f"\nWritten: {folder}/eval.json, loops.png, loops.csv")


@dataclass(frozen=True)
class Plan:
    """What a preset costs: parameters, KV cache, FLOPs, training memory; nothing is allocated."""

    preset: tyro.conf.Positional[str]
    """Preset name; see `openmythos presets`."""
    context: int | None = None
    """Tokens per sequence (default: the preset's context)."""
    batch: int = 1
    """Sequences."""
    num_loops: int | None = None
    """Loops (default: the preset's)."""
    set: Many = ()
    """Changes to the preset, such as recurrent_feed_forward.top_k=4."""

    def run(self) -> None:
        config = apply_overrides(presets.get(self.preset), _flat(self.set))
        _print_plan(
            self.preset,
            cost.plan(
                config,
                context=config.context if self.context is None else self.context,
                batch=self.batch,
                num_loops=config.num_loops if self.num_loops is None else self.num_loops,
            ),
        )


@dataclass(frozen=True)
class Presets:
    """List the named model configs."""

    def run(self) -> None:
        table = Table("preset", "parameters", "active", "width", "loops", "context", "experts")
        for name in presets.names():
            config = presets.get(name)
            count = cost.parameters(config)
            experts = to_dict(config)["recurrent_feed_forward"].get("num_experts", "-")
            cells = (name, _short(count.total), _short(count.active), config.dim)
            table.add_row(*map(str, (*cells, config.num_loops, f"{config.context:,}", experts)))
        OUT.print(table)


@dataclass(frozen=True)
class Tokenizer:
    """Train a byte-level BPE tokenizer and write its tokenizer.json (Hugging Face format)."""

    data: Many = (("stdlib",),)
    """Text to learn from: as for `openmythos train --data`."""
    vocab_size: int = 4096
    """Number of tokens."""
    out: str = "tokenizer"
    """Folder for tokenizer.json; use it with --set tokenizer.kind=file tokenizer.path=FOLDER."""

    def run(self) -> None:
        folder = Path(self.out)
        if (folder / "tokenizer.json").exists():
            raise ConfigError(f"{folder}/tokenizer.json: exists already; choose another --out")
        corpus = open_data(DataConfig(paths=_flat(self.data)))
        with OUT.status("training the tokenizer"):
            texts = (document.text for document in corpus.train())
            tokenizer = BPE(vocab_size=self.vocab_size).build(texts)
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(folder)
        held_out = [document.text for document in corpus.held_out()]
        tokens = sum(map(len, tokenizer.encode_batch(held_out)))
        size = len(corpus.held_out_bytes())
        OUT.print(
            f"{folder}/tokenizer.json: {tokenizer.vocab_size} tokens, "
            f"{size / tokens:.2f} bytes per token on held-out text"
        )


@dataclass(frozen=True)
class Demo:
    """Train a small recurrent-depth transformer on Python's own source, then try it."""

    out: str = ""
    """Run folder to make (default: runs/demo-N)."""
    set: Many = ()
    """Changes to the config, as in `openmythos train`."""

    def run(self) -> None:
        folder = Path(self.out) if self.out else _free_folder("demo")
        run = _create(folder, apply_overrides(catalogue.get("demo"), _flat(self.set)))
        if not _train(run, resume=False):
            return
        found = _evaluate(run, DEMO_LOOPS, ())
        report.write_report(found, folder)
        engine = Engine(run.load_model(), run.tokenizer)
        for num_loops in (1, 4, 16):
            OUT.print(f"\n--- {num_loops} loop{'s' if num_loops > 1 else ''} ---")
            request = Request(
                num_loops=num_loops, max_new_tokens=80, stop_ids=(run.tokenizer.bos_id,)
            )
            _stream(engine, DEMO_PROMPT, apply_overrides(request, ["sampling.temperature=0.7"]))
        OUT.print(f"\nIn {folder}: config.toml, metrics.jsonl, eval.json, loss.png, loops.png")
        OUT.print(f"Next:  openmythos generate {folder} --prompt 'class Stack' --num-loops 8")


Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Presets, tyro.conf.subcommand("presets")]
    | Annotated[Tokenizer, tyro.conf.subcommand("tokenizer")]
)


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 on success, 2 when the user's input is at fault, 1 on other failures."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    command = tyro.cli(
        Command,
        prog="openmythos",
        description="Recurrent-depth transformers: train, sample, evaluate, plan.",
        args=argv,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
    try:
        command.run()
    except (ValueError, FileExistsError, FileNotFoundError, PermissionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _free_folder(recipe: str) -> Path:
    number = 1
    while (folder := Path("runs") / f"{recipe}-{number}").exists():
        number += 1
    return folder


def _loop_counts(text: str) -> tuple[int, ...]:
    try:
        loops = tuple(int(part) for part in text.split(","))
    except ValueError:
        loops = ()
    fits = len(loops) > 0 and min(loops) >= 1
    require(fits, "num_loops", text, "must be whole numbers >= 1, separated by commas")
    return loops


def _create(folder: Path, config: RunConfig) -> Run:
    with OUT.status("reading the corpus") as status:
        run = Run.create(
            folder,
            config,
            lambda stage, done: status.update(f"{stage}: {done / 1e6:.1f} MB"),
        )
    tokens, held_out = len(run.shards("train")), len(run.shards("held_out"))
    OUT.print(
        f"{folder}: {tokens:,} training and {held_out:,} held-out tokens, "
        f"vocabulary of {run.tokenizer.vocab_size}"
    )
    return run


@contextmanager
def _stop_on_signal() -> Iterator[list[int]]:
    """A list that gets the first SIGINT or SIGTERM; a second one acts as always."""
    received: list[int] = []
    former = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        restore()

    def restore() -> None:
        for number, handler in former.items():
            signal.signal(number, handler)

    for number in former:
        signal.signal(number, note)
    try:
        yield received
    finally:
        restore()


def _train(run: Run, *, resume: bool) -> bool:
    """Train with a progress bar; False if a signal stopped it before its last step."""
    steps = train(run, resume=resume)
    num_steps = run.config.train.num_steps
    columns: tuple[ProgressColumn, ...] = (
        TextColumn("training"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    last = None
    with _stop_on_signal() as received, Progress(*columns, console=OUT) as bar:
        task = bar.add_task("training", total=num_steps, text="starting")
        smooth = None
        for metrics in steps:
            last = metrics
            smooth = metrics.loss if smooth is None else 0.9 * smooth + 0.1 * metrics.loss
            text = f"loss {smooth:.3f}  {metrics.tokens_per_second:,.0f} tokens/s"
            bar.update(task, completed=metrics.step + 1, text=text)
            if received:
                steps.close()
                break
    if last is None:
        OUT.print(f"{run.folder}: all {num_steps} steps are done already")
        return True
    report.write_loss_curve(run)
    if last.step + 1 < num_steps:
        OUT.print(f"stopped after step {last.step + 1}, checkpoint saved; go on with")
        OUT.print(f"    openmythos train --resume {run.folder}")
        return False
    return True


def _evaluate(run: Run, loops: tuple[int, ...], data: tuple[str, ...]) -> LoopReport:
    """Score and print the table of bits per byte against loops."""
    columns = (TextColumn("evaluating"), BarColumn(bar_width=24), TimeRemainingColumn())
    with Progress(*columns, console=OUT, transient=True) as bar:
        task = bar.add_task("evaluating")
        found = report.evaluate(
            run,
            loops,
            data=data,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    table = Table("loops", "bits per byte", "perplexity per token", title="held-out text")
    for loop, result in found.loops.items():
        table.add_row(str(loop), f"{result.bits_per_byte:.4f}", f"{result.perplexity:.2f}")
    table.add_section()
    for name, bits in found.compressors.items():
        table.add_row(name, f"{bits:.4f}", "")
    OUT.print(table)
    OUT.print(found.verdict())
    return found


def _stream(engine: Engine, prompt: str, request: Request) -> list[int]:
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


def _short(number: int | float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def _print_plan(name: str, plan: cost.Plan) -> None:
    count, training = plan.parameters, plan.training
    table = Table("", name, show_header=True)
    table.add_row("parameters, total", _short(count.total))
    table.add_row("  active per token", _short(count.active))
    for part in ("embedding", "prelude", "recurrent", "coda", "head"):
        table.add_row(f"  {part}", _short(getattr(count, part)))
    table.add_row("  of it routed experts", _short(count.routed_experts))
    table.add_section()
    table.add_row("layers executed", f"{plan.effective_depth} with {plan.num_loops} loops")
    table.add_row("FLOPs per token, forward", _short(plan.forward_flops))
    table.add_row("FLOPs per token, training", _short(plan.training_flops))
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


def _bytes(number: int | float) -> str:
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:.0f} B"
