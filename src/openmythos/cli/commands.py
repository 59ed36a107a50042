"""The commands, each a dataclass whose fields are its flags."""

# Each `run` imports what it needs: torch takes seconds, and flags are parsed without it.

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import tyro

from openmythos.cli.flags import Changes, Device, RunFolder, Texts, flat, shown
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
    """Train a model on text; makes a run folder, or goes on with one (--resume)."""

    recipe: Annotated[str, shown("NAME", DEFAULT_RECIPE)] = ""
    """Config to start from: tiny (seconds), demo (minutes) or small (an hour or two)."""
    data: Texts = ()
    """Text files, folders, globs, .jsonl, .parquet, hf:NAME, stdlib (the default); or prepared."""
    set: Changes = ()
    """Changes to the config, such as model.halting=act or train.num_steps=500."""
    out: Annotated[str, shown("FOLDER", "runs/RECIPE-N")] = ""
    """Run folder to make."""
    resume: Annotated[str, shown("RUN", "")] = ""
    """Run folder to go on with; only train.* can be changed."""
    device: Annotated[str, shown("auto|cpu|cuda[:N]|mps", "")] = ""
    """Short for --set train.device=DEVICE; the config says auto."""

    def run(self) -> None:
        from openmythos.cli.screen import create, print_next, train_with_bar
        from openmythos.distributed.ranks import process_group
        from openmythos.machine import choose_device

        run = self._existing()
        config = self._config() if run is None else run.config
        resume = run is not None
        # One group for making a run and for training it: ranks learn of a failure at once.
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

        told = "must be given to several ranks, so that all mean the same folder"
        require(launched()[1] == 1 or bool(self.out), "out", self.out, told)
        config = catalogue.get(self.recipe or DEFAULT_RECIPE)
        if self.data:
            config = replace(config, data=replace(config.data, paths=flat(self.data)))
        changed = apply_overrides(config, self._changes())
        if changed.tokenizer != config.tokenizer and any(map(is_prepared, changed.data.paths)):
            raise ConfigError("tokenizer: cannot be chosen, a prepared folder has its own")
        return changed

    def _existing(self) -> "Run | None":
        """The run to go on with; also one that torchrun trains again after a failure."""
        from openmythos.train.run import CONFIG_FILE, Run

        if not self.resume:
            restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
            made = restarted and self.out and (Path(self.out) / CONFIG_FILE).is_file()
            return Run.open(Path(self.out)) if made else None
        given = {"data": flat(self.data), "recipe": self.recipe, "out": self.out}
        for name, value in given.items():
            require(not value, name, value, "does not go with --resume")
        run = Run.open(Path(self.resume))
        changed = apply_overrides(run.config, self._changes())
        for field in fields(changed):
            if field.name != "train" and changed != replace(
                changed, **{field.name: getattr(run.config, field.name)}
            ):
                raise ConfigError(f"{field.name}: cannot change when a run is resumed")
        return replace(run, config=changed)

    def _changes(self) -> list[str]:
        device = [f"train.device={self.device}"] if self.device else []
        return [*device, *flat(self.set)]


@dataclass(frozen=True)
class Generate:
    """Continue a prompt with a trained model, printing the text as it is decoded."""

    folder: RunFolder
    """Run folder."""
    prompt: Annotated[str, shown("TEXT", "")] = ""
    """Text to continue; empty: from the start token. Before a dash write =, as in --prompt=-x."""
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
    """Seed of the draws."""
    exit_rule: Annotated[str, shown("KIND")] = "fixed"
    """When to stop looping early: fixed, state_change, kl, kl_entropy or argmax."""
    step: Annotated[int | None, shown("N", "the newest")] = None
    """Checkpoint."""
    precision: Annotated[str, shown("KIND")] = "auto"
    """Of the weights: fp32, bf16 or auto, which is bf16 where the device computes it natively."""
    set: Changes = ()
    """More settings, such as exit_rule.threshold=1e-3, decode=last or prefill_chunk=64."""
    device: Device = "auto"
    """Where to compute; auto takes an accelerator if there is one."""

    def run(self) -> None:
        from openmythos.cli.screen import OUT, stream
        from openmythos.inference.generation import Request
        from openmythos.inference.text import Engine
        from openmythos.train.run import Run

        try:
            self.prompt.encode()
        except UnicodeEncodeError:
            raise ConfigError("prompt: is not UTF-8 text") from None
        run = Run.open(Path(self.folder))
        model = run.load_model(self.device, step=self.step)
        request = Request(max_new_tokens=self.max_new_tokens, stop_ids=(run.tokenizer.bos_id,))
        chosen = [f"exit_rule.kind={self.exit_rule}", f"num_loops={model.config.num_loops}"]
        if self.num_loops is not None:
            chosen[1] = f"num_loops={self.num_loops}"
        for name in ("temperature", "top_k", "top_p", "min_p", "seed"):
            chosen.append(f"sampling.{name}={getattr(self, name)}")
        request = apply_overrides(request, [*chosen, *flat(self.set)])
        if run.choose_precision(self.precision, model.device) == "bf16":
            model.bfloat16()
        loops = stream(Engine(model, run.tokenizer), self.prompt, request)
        if self.exit_rule != "fixed" and loops:
            OUT.print(f"\n[{sum(loops) / len(loops):.1f} of {request.num_loops} loops per token]")


@dataclass(frozen=True)
class Eval:
    """Bits per byte and perplexity of held-out text against the number of loops."""

    folder: RunFolder
    """Run folder."""
    data: Texts = ()
    """Text to score instead of the run's own held-out part."""
    num_loops: Annotated[str, shown("N,N,...")] = "1,2,4,8,16"
    """Loop counts, separated by commas."""
    precision: Annotated[str, shown("KIND")] = "auto"
    """To compute in: fp32, bf16 or auto, which is bf16 where the device computes it natively."""
    step: Annotated[int | None, shown("N", "the newest")] = None
    """Checkpoint."""
    device: Device = "auto"
    """Where to compute; auto takes an accelerator if there is one."""
    out: Annotated[str, shown("FOLDER", "the run folder; with --data or --step RUN/eval/...")] = ""
    """Folder for eval.json, loops.png and loops.csv."""

    def run(self) -> None:
        from openmythos.cli.screen import OUT, evaluate
        from openmythos.recipes import report
        from openmythos.train.run import Run

        run = Run.open(Path(self.folder))
        loops = _loop_counts(self.num_loops)
        folder = report.report_folder(run, flat(self.data), self.step, self.out)
        found = evaluate(
            run,
            loops,
            flat(self.data),
            device=self.device,
            step=self.step,
            precision=self.precision,
        )
        report.write_report(found, folder)
        OUT.print(f"\nWritten: {folder}/eval.json, loops.png, loops.csv")


@dataclass(frozen=True)
class Plan:
    """What a preset costs: parameters, KV cache, FLOPs, training memory; nothing is allocated."""

    preset: tyro.conf.Positional[Annotated[str, shown("PRESET")]]
    """Preset name; see `openmythos presets`."""
    context: Annotated[int | None, shown("N", "the preset's")] = None
    """Tokens per sequence."""
    batch: int = 1
    """Sequences."""
    num_loops: Annotated[int | None, shown("N", "the preset's")] = None
    """Loops."""
    set: Changes = ()
    """Changes to the preset, such as recurrent_feed_forward.top_k=4."""
    gpus: int = 0
    """Does training fit this many devices, and with which settings? --batch is that of each."""
    memory: float = 80.0
    """GiB of each device, with --gpus."""
    backprop_loops: int = 0
    """Loops of each sequence, its last ones, that carry gradient in training (0: all)."""

    def run(self) -> None:
        from openmythos.cli.screen import print_fit, print_plan
        from openmythos.model import presets
        from openmythos.planning import cost, fit

        config = apply_overrides(presets.get(self.preset), flat(self.set))
        require_int("gpus", self.gpus, minimum=0)
        require_number("memory", self.memory, above=0, at_most=MAX_GIB)
        if self.gpus:
            print_fit(
                self.preset,
                fit.find(
                    config,
                    gpus=self.gpus,
                    memory=round(self.memory * 2**30),
                    context=self.context,
                    batch=self.batch,
                    num_loops=self.num_loops,
                    backprop_loops=self.backprop_loops,
                ),
            )
            return
        print_plan(
            self.preset,
            cost.plan(
                config,
                context=config.context if self.context is None else self.context,
                batch=self.batch,
                num_loops=config.num_loops if self.num_loops is None else self.num_loops,
                backprop_loops=self.backprop_loops,
            ),
        )


@dataclass(frozen=True)
class Export:
    """Write the model of a run's checkpoint as a folder for `OpenMythos.from_pretrained`."""

    folder: RunFolder
    """Run folder."""
    out: Annotated[str, shown("FOLDER")]
    """Folder to make: config.json, model.safetensors, tokenizer.json."""
    step: Annotated[int | None, shown("N", "the newest")] = None
    """Checkpoint."""
    device: Device = "cpu"
    """Where to load the model before it is written."""

    def run(self) -> None:
        from openmythos.cli.screen import OUT, short
        from openmythos.planning import cost
        from openmythos.train.run import Run

        run, out = Run.open(Path(self.folder)), Path(self.out)
        require(not out.exists(), "out", self.out, "exists already")
        model, step = run.load_checkpoint(self.device, step=self.step)
        model.save_pretrained(out)
        run.tokenizer.save(out)
        size = short(cost.parameters(model.config).total)
        OUT.print(f"{out}: the model after {step} steps, {size}")


@dataclass(frozen=True)
class Presets:
    """List the named model configs."""

    def run(self) -> None:
        from rich.table import Table

        from openmythos.cli.screen import OUT, short
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
class Study:
    """Test a claim of the field: train its arms with several seeds, write results and verdict."""

    name: tyro.conf.Positional[Annotated[str, shown("STUDY", "")]] = ""
    """Study; see --list."""
    list: bool = False
    """List the studies and their claims."""
    seeds: int = 5
    """Seeds per arm."""
    quick: bool = False
    """Seconds instead of minutes: shows that it runs, not what it finds."""
    out: Annotated[str, shown("FOLDER")] = "results"
    """Folder that gets a folder per study. Runs found there are kept, not repeated."""
    processes: int = 2
    """Runs at the same time, each on one thread; they share the device."""
    device: Device = "auto"
    """Where to compute; auto takes an accelerator if there is one."""
    report_only: bool = False
    """Train nothing: judge the runs kept in --out and write report and figure anew."""
    set: Changes = ()
    """Changes to every arm, such as learning.num_steps=3200."""

    def run(self) -> None:
        from rich import box
        from rich.table import Table

        from openmythos.cli.screen import OUT, run_study_with_bar
        from openmythos.studies import runner

        if self.list:
            for name, study in runner.STUDIES.items():
                OUT.print(f"{name}: {study.claim}")
            return
        if not self.name:
            raise ConfigError(f"study: wants the name of one; known: {', '.join(runner.STUDIES)}")
        study = runner.get(self.name)
        require_int("seeds", self.seeds, minimum=1)
        require_int("processes", self.processes, minimum=1)
        folder = Path(self.out) / (f"{study.name}-quick" if self.quick else study.name)
        if self.report_only:
            changes = self.quick or bool(self.set)
            require(
                not changes, "report_only", True, "judges runs as they are: no --quick, no --set"
            )
            finding = runner.judge_kept(study, folder)
        else:
            finding = run_study_with_bar(
                study,
                folder,
                seeds=1 if self.quick else self.seeds,
                quick=self.quick,
                overrides=flat(self.set),
                processes=self.processes,
                device=self.device,
            )
        table = Table(*finding.table[0], box=box.SIMPLE_HEAD)
        for row in finding.table:
            table.add_row(*row.values())
        OUT.print(table)
        OUT.print(f"{study.claim}\n{finding.verdict}: {finding.sentence}")
        if self.quick:
            OUT.print("A quick run shows that the study runs; its verdict means nothing.")
        OUT.print(f"\nWritten: {folder}/results.json, report.md, figure.png")


@dataclass(frozen=True)
class Demo:
    """Watch depth come from loops, then train a small language model on Python's own source."""

    out: Annotated[str, shown("FOLDER", "runs/demo-N")] = ""
    """Run folder to make."""
    set: Changes = ()
    """Changes to the language model's config, as in `openmythos train`."""
    hops_steps: int = 1600
    """Training steps of the model that follows chains of lookups; 0 leaves it out."""
    device: Device = "auto"
    """Where to compute; auto takes an accelerator if there is one."""

    def run(self) -> None:
        from openmythos.cli.screen import (
            OUT,
            create,
            evaluate,
            learn_hops,
            print_heat_map,
            stream,
            train_with_bar,
        )
        from openmythos.inference.generation import Request
        from openmythos.inference.text import Engine
        from openmythos.recipes import catalogue, report
        from openmythos.train.run import require_free

        require_int("hops_steps", self.hops_steps, minimum=0)
        changes = [f"train.device={self.device}", *flat(self.set)]
        config = apply_overrides(catalogue.get("demo"), changes)
        device = config.train.device
        if self.out:
            require_free(Path(self.out))
        if self.hops_steps:
            print_heat_map(learn_hops(self.hops_steps, device), trained_hops=20)
            OUT.print(
                "\nNo hops beyond 20 and no more than 26 loops were trained: `openmythos study "
                "depth-extrapolation` has seeds, controls and where it breaks.\n"
            )
        with _new_run_folder(self.out, "demo") as folder:
            run = create(folder, config)
        if not train_with_bar(run, resume=False):
            return
        found = evaluate(run, DEMO_LOOPS, (), device=device)
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


@contextmanager
def _new_run_folder(out: str, recipe: str) -> Iterator[Path]:
    """The folder of --out, else the first free runs/RECIPE-N, gone again if the run is not made."""
    if out:
        yield Path(out)
        return
    for number in itertools.count(1):
        folder = Path("runs") / f"{recipe}-{number}"
        # Making it takes the name: another process goes on to the next.
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
