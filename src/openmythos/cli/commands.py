"""The commands about models, each a dataclass whose fields are its flags."""

# Each `run` imports what it needs: torch takes seconds, and flags are parsed without it.

import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.table import Table

from openmythos.cli.flags import Changes, Device, ModelSource, Step, Texts, flat, shown
from openmythos.cli.hub import TEXT_LOOPS, config_of, score
from openmythos.cli.screen import OUT, print_fit, print_plan, short, stream
from openmythos.config import (
    ConfigError,
    apply_overrides,
    require,
    require_int,
    require_number,
    to_dict,
)

if TYPE_CHECKING:
    from openmythos.train.config import RunConfig
    from openmythos.train.run import Run

MAX_GIB = 2.0**20
DEFAULT_RECIPE = "demo"
DEMO_LOOPS = (1, 2, 4, 8)
DEMO_SAMPLES = (1, 8)
DEMO_PROMPT = "def main("


@dataclass(frozen=True)
class Train:
    """Train a model on text or a task into a new run folder, or go on with a run (--resume)."""

    recipe: Annotated[str, shown("NAME", DEFAULT_RECIPE)] = ""
    """Config to start from: tiny (seconds), demo (minutes), small (hours) or hops (a task)."""
    data: Texts = ()
    """Text files, folders, globs, .jsonl, .parquet, hf:NAME, gcide, stdlib (default); prepared
    folders."""
    set: Changes = ()
    """Changes to the config, such as model.halting=act or train.num_steps=500."""
    out: Annotated[str, shown("FOLDER", "runs/RECIPE-N")] = ""
    """Run folder to create."""
    resume: Annotated[str, shown("RUN", "")] = ""
    """Run folder to go on with; only train.* can be changed."""
    device: Annotated[str, shown("auto|cpu|cuda[:N]|mps", "")] = ""
    """Short for --set train.device=DEVICE; the default is auto."""

    def run(self) -> None:
        from openmythos.cli.jobs import create, print_next, train_with_bar
        from openmythos.distributed.ranks import process_group
        from openmythos.machine import choose_device

        run = self._existing()
        config = self._config() if run is None else run.config
        resume = run is not None
        # One process group for creating and training: if one rank fails, all fail at once.
        with process_group(choose_device(config.train.device, "train.device")):
            if run is None:
                with _new_run_folder(self.out, self.recipe or DEFAULT_RECIPE) as folder:
                    run = create(folder, config)
            if train_with_bar(run, resume=resume):
                print_next(run, DEMO_PROMPT)

    def _config(self) -> "RunConfig":
        from openmythos.data.prepared import is_prepared
        from openmythos.distributed.ranks import launched
        from openmythos.recipes import catalogue
        from openmythos.train.config import TextData

        allowed = "must be given when training on several ranks: all need the same folder"
        require(launched()[1] == 1 or bool(self.out), "out", self.out, allowed)
        config = catalogue.get(self.recipe or DEFAULT_RECIPE)
        if self.data:
            if not isinstance(config.data, TextData):
                raise ConfigError(f"data: recipe {self.recipe} trains on a task, it reads no text")
            config = replace(config, data=replace(config.data, paths=flat(self.data)))
        changed = apply_overrides(config, self._changes())
        paths = changed.data.paths if isinstance(changed.data, TextData) else ()
        if changed.tokenizer != config.tokenizer and any(map(is_prepared, paths)):
            raise ConfigError("tokenizer: cannot be chosen, a prepared folder has its own")
        return changed

    def _existing(self) -> "Run | None":
        """The run to resume: that of --resume, or --out when torchrun restarts the command."""
        from openmythos.train.folder import CONFIG_FILE
        from openmythos.train.run import Run

        if not self.resume:
            restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
            exists = restarted and self.out and (Path(self.out) / CONFIG_FILE).is_file()
            return Run.open(Path(self.out)) if exists else None
        given = {"data": flat(self.data), "recipe": self.recipe, "out": self.out}
        for name, value in given.items():
            require(not value, name, value, "cannot be combined with --resume")
        run = Run.open(Path(self.resume))
        changed = apply_overrides(run.config, self._changes())
        for name, value in vars(changed).items():
            if name != "train" and value != getattr(run.config, name):
                raise ConfigError(f"{name}: cannot change when a run is resumed")
        return replace(run, config=changed)

    def _changes(self) -> list[str]:
        device = [f"train.device={self.device}"] if self.device else []
        return [*device, *flat(self.set)]


@dataclass(frozen=True)
class Generate:
    """Continue a prompt with a trained model, printing the text as it is decoded."""

    folder: ModelSource
    prompt: Annotated[str, shown("TEXT", "")] = ""
    """Text to continue; empty: from the start token. If it begins with a dash: --prompt=-x."""
    num_loops: Annotated[int | None, shown("N", "the model's")] = None
    """Loops per token. More than in training is allowed."""
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
    """Random seed."""
    exit_rule: Annotated[str, shown("KIND")] = "fixed"
    """When to stop looping early: fixed, state_change, kl, kl_entropy or argmax."""
    step: Step = None
    precision: Annotated[str, shown("KIND")] = "auto"
    """Of the weights: fp32, bf16, or auto (bf16 if the device computes it natively)."""
    set: Changes = ()
    """More settings, such as exit_rule.threshold=1e-3, decode=last or prefill_chunk=64."""
    compile: bool = False
    """Compile decoding: a minute, once for all models of these shapes; on a GPU, CUDA graphs."""
    device: Device = "auto"

    def run(self) -> None:
        import torch

        from openmythos.hub.load import open_source
        from openmythos.inference.compiled import CompiledModel
        from openmythos.inference.generation import Request
        from openmythos.inference.text import Engine

        try:
            self.prompt.encode()
        except UnicodeEncodeError:
            raise ConfigError("prompt: is not UTF-8 text") from None
        source = open_source(self.folder)
        tokenizer = source.tokenizer
        model = source.load(self.device, step=self.step)
        request = Request(max_new_tokens=self.max_new_tokens, stop_ids=tokenizer.stop_ids)
        num_loops = model.config.num_loops if self.num_loops is None else self.num_loops
        chosen = [f"exit_rule.kind={self.exit_rule}", f"num_loops={num_loops}"]
        for name in ("temperature", "top_k", "top_p", "min_p", "seed"):
            chosen.append(f"sampling.{name}={getattr(self, name)}")
        request = apply_overrides(request, [*chosen, *flat(self.set)])
        narrow = source.precision(self.precision, model.device) == "bf16"
        model.to(dtype=torch.bfloat16 if narrow else torch.float32)
        decoder = (
            CompiledModel(model, say=partial(print, file=sys.stderr)) if self.compile else model
        )
        loops = stream(Engine(decoder, tokenizer), self.prompt, request)
        if self.exit_rule != "fixed" and loops:
            OUT.print(f"\n[{sum(loops) / len(loops):.1f} of {request.num_loops} loops per token]")


@dataclass(frozen=True)
class Eval:
    """Bits per byte and perplexity of held-out text, or accuracy on a task, against loops."""

    folder: ModelSource
    data: Texts = ()
    """Text to score instead of the run's own held-out part; must be given if it is not a run."""
    num_loops: Annotated[str | None, shown("N,N,...", "1,2,4,8,16; for a task more")] = None
    """Loop counts, separated by commas."""
    tasks: Annotated[str, shown("FOLDER|NAME,...", "")] = ""
    """Tasks of lm-eval instead: their names, or a folder from `export --format lm-eval`."""
    precision: Annotated[str, shown("KIND")] = "auto"
    """To compute in: fp32, bf16, or auto (bf16 if the device computes it natively)."""
    step: Step = None
    device: Device = "auto"
    out: Annotated[str, shown("FOLDER", "the run folder; else RUN/eval/... or eval/...")] = ""
    """Folder for eval.json, loops.png and loops.csv; for a task hops.png and hops.csv."""

    def run(self) -> None:
        from openmythos.cli.jobs import evaluate, evaluate_hops, evaluate_tasks
        from openmythos.hub.load import open_source
        from openmythos.recipes import report, task_report
        from openmythos.train.config import TextData

        source, data = open_source(self.folder), flat(self.data)
        run = source.run
        if run is None:
            for name in ("step", "tasks"):
                value = getattr(self, name)
                require(not value, name, value, f"needs a run, {self.folder} is not one")
            given = None if self.num_loops is None else _loop_counts(self.num_loops)
            score(source, given, data, self.out, device=self.device, precision=self.precision)
            return
        on_text = isinstance(run.config.data, TextData)
        require(on_text or not data, "data", data, "must not be given: the run learned a task")
        loops: tuple[int, ...] = TEXT_LOOPS if on_text else ()
        if self.num_loops is not None:
            loops = _loop_counts(self.num_loops)
        folder = report.report_folder(run, data, self.step, self.out)
        chosen: dict[str, Any] = {"device": self.device, "step": self.step}
        chosen["precision"] = self.precision
        if self.tasks:
            require(not data, "data", data, "cannot be combined with --tasks")
            written = evaluate_tasks(run, self.tasks, loops or TEXT_LOOPS, folder, **chosen)
            OUT.print(f"\nWritten: {written}")
            return
        if on_text:
            report.write_report(evaluate(run, loops, data=data, **chosen), folder)
        else:
            task_report.write_report(evaluate_hops(run, loops, **chosen), folder)
        name = "loops" if on_text else "hops"
        OUT.print(f"\nWritten: {folder}/eval.json, {name}.png, {name}.csv")


@dataclass(frozen=True)
class Plan:
    """What a model costs: parameters, KV cache, FLOPs, training memory; nothing is allocated."""

    preset: tyro.conf.Positional[Annotated[str, shown("PRESET")]]
    """Preset name (see `openmythos presets`), run folder, model folder, GGUF file or Hub id."""
    context: Annotated[int | None, shown("N", "the preset's")] = None
    """Tokens per sequence."""
    batch: int = 1
    """Sequences."""
    num_loops: Annotated[int | None, shown("N", "the preset's")] = None
    """Loops."""
    set: Changes = ()
    """Changes to the preset, such as recurrent_feed_forward.top_k=4."""
    gpus: int = 0
    """Find the settings with which training fits this many devices; --batch is then per device."""
    memory: float = 80.0
    """GiB of each device, with --gpus."""
    backprop_loops: int = 0
    """Train with gradients through the last N loops of each sequence only (0: all)."""

    def run(self) -> None:
        from openmythos.planning import cost, fit

        config = apply_overrides(config_of(self.preset), flat(self.set))
        require_int("gpus", self.gpus, minimum=0)
        require_number("memory", self.memory, above=0, at_most=MAX_GIB)
        names = ("context", "batch", "num_loops", "backprop_loops")
        shape: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self.gpus:
            memory = round(self.memory * 2**30)
            print_fit(self.preset, fit.find(config, gpus=self.gpus, memory=memory, **shape))
        else:
            print_plan(self.preset, cost.plan(config, **shape))


@dataclass(frozen=True)
class Presets:
    """List the named model configs."""

    def run(self) -> None:
        from openmythos.model import presets
        from openmythos.planning import cost

        table = Table("preset", "parameters", "active", "width", "loops", "context", "experts")
        for name in presets.names():
            config = presets.get(name)
            count = cost.parameters(config)
            experts = to_dict(config)["recurrent_feed_forward"].get("num_experts", "-")
            cells = (name, short(count.total), short(count.active), config.dim)
            table.add_row(*map(str, (*cells, config.num_loops, f"{config.context:,}", experts)))
        OUT.print(table)


@dataclass(frozen=True)
class Demo:
    """Train a model that answers longer questions with more loops, then a small language model."""

    out: Annotated[str, shown("FOLDER", "runs/demo-N")] = ""
    """Run folder to create."""
    set: Changes = ()
    """Changes to the language model's config, as in `openmythos train`."""
    hops_steps: int = 1600
    """Training steps of the first model, which follows chains of lookups; 0 skips it."""
    device: Device = "auto"

    def run(self) -> None:
        from openmythos.cli.jobs import create, evaluate, train_with_bar
        from openmythos.inference.generation import Request
        from openmythos.inference.text import Engine
        from openmythos.recipes import catalogue, report
        from openmythos.train.folder import require_free

        require_int("hops_steps", self.hops_steps, minimum=0)
        changes = [f"train.device={self.device}", *flat(self.set)]
        config = apply_overrides(catalogue.get("demo"), changes)
        device = config.train.device
        if self.out:
            require_free(Path(self.out))
        if self.hops_steps and not self._follow_chains(device):
            return
        with _new_run_folder(self.out, "demo") as folder:
            run = create(folder, config)
        if not train_with_bar(run, resume=False):
            return
        found = evaluate(run, DEMO_LOOPS, device=device)
        report.write_report(found, folder)
        engine = Engine(run.load_model(device), run.tokenizer)
        for num_loops in DEMO_SAMPLES:
            OUT.print(f"\n--- {num_loops} loop{'s' if num_loops > 1 else ''} ---")
            request = Request(
                num_loops=num_loops, max_new_tokens=80, stop_ids=(run.tokenizer.bos_id,)
            )
            stream(engine, DEMO_PROMPT, apply_overrides(request, ["sampling.temperature=0.7"]))
        OUT.print(f"\nIn {folder}: config.toml, metrics.jsonl, eval.json, loss.png, loops.png")
        OUT.print(
            f"Next:  openmythos generate {quote(str(folder))} --prompt 'class Stack' --num-loops 8"
        )

    def _follow_chains(self, device: str) -> bool:
        """Train recipe hops and print accuracy by hops and loops; False if it was stopped."""
        import torch

        from openmythos.cli.jobs import create, evaluate_hops, train_with_bar
        from openmythos.recipes import catalogue, task_report

        changes = [f"train.num_steps={self.hops_steps}", f"train.device={device}"]
        config = apply_overrides(catalogue.get("hops"), changes)
        OUT.print(
            "A small model learns to follow chains of lookups, e0 r1 r2 ... -> r2(r1(e0)), in "
            "tables that it must memorise.\nThen it is asked longer chains than it was trained on."
        )
        with _new_run_folder(f"{self.out}-hops" if self.out else "", "demo-hops") as folder:
            run = create(folder, config)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # two are slower for so small a model (Zen 3: 29 s, not 24)
        try:
            finished = train_with_bar(run, resume=False)
        finally:
            torch.set_num_threads(threads)
        if finished:
            found = evaluate_hops(run, (), device=device, examples=100)
            task_report.write_report(found, folder)
            OUT.print(f"\nIn {folder}: config.toml, metrics.jsonl, eval.json, loss.png, hops.png")
            OUT.print(
                "It was trained on at most 20 hops and 26 loops: `openmythos study "
                "depth-extrapolation` has seeds, controls and where it fails.\n"
            )
        return finished


@contextmanager
def _new_run_folder(out: str, recipe: str) -> Iterator[Path]:
    """--out, or the first unused runs/RECIPE-N, which is deleted if creating the run fails."""
    if out:
        yield Path(out)
        return
    for number in itertools.count(1):
        folder = Path("runs") / f"{recipe}-{number}"
        # mkdir reserves the name: if another process has taken it, try the next one.
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    try:
        yield folder
    except BaseException:
        with suppress(OSError):
            folder.rmdir()
        raise


def _loop_counts(text: str) -> tuple[int, ...]:
    try:
        loops = tuple(int(part) for part in text.split(","))
    except ValueError:
        loops = ()
    fits = len(loops) > 0 and min(loops) >= 1
    require(fits, "num_loops", text, "must be whole numbers >= 1, separated by commas")
    return loops
