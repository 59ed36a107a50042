"""Time this project's models beside their peers' in one run; writes results/bench/KIND.

KIND is the kind of processor, such as avx2 or avx512-bf16, or of GPU, such as h100. On processors
that emulate bf16, the contenders in bf16 are skipped unless they are named on the command line.

    make bench                                     (own virtual environment, both workloads)
    python benchmarks/bench.py --workload S --threads 1 --rounds 7 --set seq=512 batch=4
    python benchmarks/bench.py --device cuda       (larger batches; decodes 1, 8 and 64 rows)

Contenders take turns (A B A B ...), so that a slowdown of the machine affects all of them. Each
runs in its own process; a figure is the median over rounds. This project's processes use the malloc
settings of its command line, the others the system's defaults.

On a GPU all contenders make their first calls at the same time, since most of that is compilation.
A call ends when the GPU has finished it. fp32 products use TF32 only with --tf32.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from contenders import (
    CONTENDERS,
    CPU_CONTENDERS,
    GPU_CONTENDERS,
    GPU_SIZES,
    REFERENCE,
    REFERENCE_BF16,
    WORKLOADS,
    Workload,
    with_shape,
)
from figures import speed_ratios
from goals import BF16, check_floors
from host import processor_kind
from limits import bound_seconds, machine_limits
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from workers import FailedError, Team, figure_names, resident_megabytes

from openmythos.analysis import plots
from openmythos.files import read_json, write_json
from openmythos.machine import bf16_is_native, choose_device, describe

OUT = Console(highlight=False, markup=False)


def chosen(asked: list[str] | None, device: torch.device) -> tuple[tuple[str, ...], dict[str, str]]:
    """(contenders to time, reason for each one that is skipped)."""
    usual = GPU_CONTENDERS if device.type == "cuda" else CPU_CONTENDERS
    if asked or bf16_is_native(device):
        return tuple(asked or usual), {}
    why = f"bf16 is not native on this processor ({processor_kind(device)}): it would be emulated"
    skipped = {name: why for name in usual if name in BF16}
    return tuple(name for name in usual if name not in skipped), skipped


class Timing:
    """Times, first calls and failures of all contenders and figures of one workload."""

    def __init__(self, team: Team, device: torch.device, rounds: int) -> None:
        self.team, self.device, self.rounds = team, device, rounds
        self.seconds: dict[str, dict[str, float]] = {}
        self.first: dict[str, dict[str, float]] = {}
        self.failed: dict[str, dict[str, str]] = {}
        self.peak: dict[str, float] = {}

    def figure(self, figure: str) -> None:
        names = self._first_calls(figure)
        # Decode steps are short, so time several of them per turn.
        calls = 5 if figure.startswith("decode") or self.device.type == "cuda" else 1
        taken: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(self.rounds):
            for name in names:
                try:
                    taken[name] += self.team.ask(name, "time", calls)
                    if figure == "training step" and self.device.type == "cuda":
                        self.peak[name] = self.team.ask(name, "peak_megabytes")
                    self.team.ask(name, "release")
                except FailedError as error:
                    self.failed.setdefault(figure, {})[name] = str(error)
        self.seconds[figure] = {
            name: statistics.median(times) for name, times in taken.items() if times
        }

    def _first_calls(self, figure: str) -> list[str]:
        """Warm up and compile; the names of the contenders that got through it.

        One after the other on a CPU, where they would take cores from each other.
        """
        started, done = self.first.setdefault(figure, {}), []
        together = self.device.type == "cuda"
        for step, arguments in (("prepare", (figure,)), ("call", ())):
            alive = done if step == "call" else list(self.team.pipes)
            done = []
            for name in alive if together else ():
                self.team.order(name, step, *arguments)
            for name in alive:
                try:
                    if not together:
                        self.team.order(name, step, *arguments)
                    value = self.team.answer(name)
                except (FailedError, OSError) as error:
                    self.failed.setdefault(figure, {})[name] = str(error)
                    continue
                done.append(name)
                if step == "call":
                    started[name] = value
        return done


def time_workload(
    workload: Workload, names: tuple[str, ...], threads: int, options: argparse.Namespace
) -> Any:
    """Median seconds for every figure and contender, and KV cache bytes per token."""
    device = options.device
    figures = options.figures or figure_names(device)
    team = Team(workload, names, threads, device, options.tf32)
    with team, Progress(console=OUT, transient=True) as bar:
        timing = Timing(team, device, options.rounds)
        task = bar.add_task("", total=len(figures))
        for figure in figures:
            bar.update(task, description=f"{workload.name}, {threads} thread(s): {figure}")
            timing.figure(figure)
            bar.advance(task)
        cache = {}
        for name in names:
            try:
                cache[name] = team.ask(name, "cache_bytes_per_token", 64)
            except FailedError as error:
                timing.failed.setdefault("cache", {})[name] = str(error)
    found = {
        "seconds": timing.seconds,
        "first_call_seconds": timing.first,
        "cache_bytes_per_token": cache,
        "failed": timing.failed,
    }
    return found | ({"peak_megabytes": timing.peak} if timing.peak else {})


def measure_memory(workload: Workload, names: tuple[str, ...]) -> dict[str, float]:
    """Peak memory of training steps on the CPU, each contender in a new process."""
    command = [sys.executable, __file__, "--workload", workload.name.split()[0]]
    for part in workload.name.split()[1:]:
        command += ["--set", part]
    found = {}
    for name in names:
        done = subprocess.run(
            [*command, "--memory-of", name], capture_output=True, text=True, check=True
        )
        found[name] = float(done.stdout)
    return found


def report(workload: Workload, result: dict[str, Any]) -> None:
    """Add ratios and shares of the bound to the result, and print a table of them."""
    seconds, limits = result["seconds"], result["limits"]
    names = list(result["cache_bytes_per_token"])
    title = f"workload {workload.name}, {result['threads']} thread(s), {result['device']}"
    table = Table("", *names, title=title)
    result["ratio"], result["share_of_bound"] = {}, {}
    for figure, times in seconds.items():
        ratios, shares = {}, {}
        for name, time in times.items():
            if REFERENCE in times:
                ratios[name] = times[REFERENCE] / time
            peak = "bf16" if "bf16" in name else result["fp32_products"]
            shares[name] = bound_seconds(workload, figure, limits, peak) / time
        result["ratio"][figure], result["share_of_bound"][figure] = ratios, shares
        cells = []
        for name in names:
            ratio = f"{ratios[name]:.2f}x " if name in ratios else ""
            cells.append(
                f"{1e3 * times[name]:.2f} ms {ratio}{100 * shares[name]:.0f}%"
                if name in times
                else "failed"
            )
        table.add_row(figure, *cells)
    cache = result["cache_bytes_per_token"]
    table.add_row("cache, bytes per token", *(f"{cache[name]:.0f}" for name in names))
    if "peak_megabytes" in result:
        memory = result["peak_megabytes"]
        cells = [f"{memory[name]:.0f} MiB" if name in memory else "failed" for name in names]
        table.add_row("peak memory, training", *cells)
    OUT.print(table)
    bf16 = {
        figure: {
            name: times[REFERENCE_BF16] / time for name, time in times.items() if "bf16" in name
        }
        for figure, times in seconds.items()
        if REFERENCE_BF16 in times
    }
    if bf16:
        result["ratio_in_bf16"] = bf16
    for figure, found in bf16.items():
        shown = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in found.items())
        OUT.print(f"{figure}, times as fast as {REFERENCE_BF16}: {shown}")
    for figure, failures in result["failed"].items():
        for name, why in failures.items():
            OUT.print(f"failed: {figure}, {name}: {why}")


def options_of(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--set", nargs="+", default=[], metavar="SHAPE=N", action="extend")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS)
    parser.add_argument("--figures", nargs="+", metavar="FIGURE", help="such as 'decode, batch 8'")
    parser.add_argument("--threads", nargs="+", type=int, help="of the CPU; default: 1 2")
    parser.add_argument("--rounds", type=int, help="turns of each contender; default: 7, GPU 3")
    parser.add_argument("--tf32", action="store_true", help="fp32 products with TF32 (GPU)")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="default: results/bench/KIND")
    options = parser.parse_args(words)
    options.device = choose_device(options.device)
    on_gpu = options.device.type == "cuda"
    options.rounds = options.rounds or (3 if on_gpu else 7)
    options.threads = options.threads or ([os.cpu_count() or 1] if on_gpu else [1, 2])
    options.out = options.out or Path("results/bench") / processor_kind(options.device)
    return options


def main() -> None:
    options = options_of()
    device = options.device
    on_gpu = device.type == "cuda"
    changes = {key: int(value) for key, value in (text.split("=") for text in options.set)}
    workloads = [WORKLOADS[name] for name in options.workload]
    if on_gpu:
        workloads = [GPU_SIZES[workload.name] for workload in workloads]
    workloads = [with_shape(workload, **changes) for workload in workloads]
    if options.memory_of:
        print(resident_megabytes(workloads[0], options.memory_of))
        return
    (names, skipped), machine = chosen(options.contenders, device), describe()
    if on_gpu:
        machine |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    for name, why in skipped.items():
        OUT.print(f"skipped: {name}: {why}")
    for workload in workloads:
        results = []
        memory = {} if options.no_memory or on_gpu else measure_memory(workload, names)
        for threads in options.threads:
            bf16 = bool(set(names) & set(BF16))
            result = {
                "workload": vars(workload),
                "threads": threads,
                "device": device.type,
                "fp32_products": "tf32" if options.tf32 else "fp32",
                "commit": machine["commit"],
                "limits": machine_limits(threads, bf16, device),
                **({"peak_megabytes": memory} if memory else {}),
                **time_workload(workload, names, threads, options),
            }
            report(workload, result)
            results.append(result)
        write_results(options, machine, results, skipped)


def write_results(
    options: argparse.Namespace,
    machine: dict[str, Any],
    results: list[dict[str, Any]],
    skipped: dict[str, str],
) -> None:
    """Write bench-NAME.json, .png and .csv; results with other numbers of threads are kept."""
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"bench-{results[0]['workload']['name'].replace(' ', '-')}.json"
    measured = {result["threads"] for result in results}
    kept = read_json(path)["results"] if path.exists() else []
    for result in results:
        # Memory does not depend on the number of threads, so an earlier measurement is kept.
        if "peak_megabytes" not in result and kept and "peak_megabytes" in kept[0]:
            result["peak_megabytes"] = kept[0]["peak_megabytes"]
    results = [result for result in kept if result["threads"] not in measured] + results
    results.sort(key=lambda result: int(result["threads"]))
    missed = check_floors(results)
    for text in missed:
        OUT.print(f"below its floor: {text}")
    write_json(
        {
            "command": "python benchmarks/bench.py " + " ".join(sys.argv[1:]),
            "hardware": machine,
            "rounds": options.rounds,
            "skipped": skipped,
            "results": json.loads(json.dumps(results)),
            "below_floor": missed,
        },
        path,
    )
    draw_figure(results, path.with_suffix(".png"))


def draw_figure(results: list[dict[str, Any]], path: Path) -> None:
    """Draw ratios to the reference; no figure if the reference was not timed."""
    if not all(any(result["ratio"].values()) for result in results):
        return
    bars = {
        f"{result['workload']['name']}, {result['threads']} thread(s)": {
            figure: {name: ratio for name, ratio in ratios.items() if name != REFERENCE}
            for figure, ratios in result["ratio"].items()
        }
        for result in results
    }
    rows = [
        {"workload": panel, "figure": figure, "contender": name, "ratio": ratio}
        for panel, figures in bars.items()
        for figure, ratios in figures.items()
        for name, ratio in ratios.items()
    ]
    figure = speed_ratios(bars, reference="open-mythos 0.5.0")
    plots.save_figure(figure, path, rows)


if __name__ == "__main__":
    main()
