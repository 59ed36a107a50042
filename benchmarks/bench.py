"""Time this project's models beside their peers' in one run; writes results/bench/KIND.

KIND is the kind of processor, such as avx2 or avx512-bf16, or of GPU, such as h100. On processors
that emulate bf16, the contenders in bf16 are skipped unless they are named on the command line.

    make bench                                     (own virtual environment, both workloads)
    python benchmarks/bench.py --workload S --threads 1 --rounds 7 --set seq=512 batch=4
    python benchmarks/bench.py --emulate-avx2      (what a processor without AVX-512 does)
    python benchmarks/bench.py --device cuda       (larger batches; decodes 1, 8 and 64 rows)

Contenders take turns (A B A B ...), so that a slowdown of the machine affects all of them. Each
runs in its own process; a figure is the median over rounds. This project's processes use the malloc
settings of its command line, the others the system's defaults. One thread of a CPU is timed by the
process's CPU time, since other programs may want the core; more threads and GPUs by the wall clock.

On a GPU all contenders make their first calls at the same time, since most of that is compilation.
A call ends when the GPU has finished it. fp32 products use TF32 only with --tf32.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from bench_results import OUT, compare, merge, print_table, write
from contenders import GPU_SIZES, WORKLOADS, Workload, with_shape
from goals import BF16
from host import command_line, computes_bf16, emulate_avx2, processor_kind
from limits import machine_limits
from rich.progress import Progress
from roster import CONTENDERS, CPU_CONTENDERS, GPU_CONTENDERS
from workers import Team, figure_names, resident_megabytes

from openmythos.machine import choose_device, describe

MEMORY = "memory"  # a figure that is not a time


def chosen(asked: list[str] | None, device: torch.device) -> tuple[tuple[str, ...], dict[str, str]]:
    """(contenders to time, reason for each one that is skipped)."""
    usual = GPU_CONTENDERS if device.type == "cuda" else CPU_CONTENDERS
    if asked or computes_bf16(device):
        return tuple(asked or usual), {}
    why = f"bf16 is not native on this processor ({processor_kind(device)}): it would be emulated"
    skipped = {name: why for name in usual if name in BF16}
    return tuple(name for name in usual if name not in skipped), skipped


class Timing:
    """Times, first calls and failures of all contenders and figures of one workload."""

    def __init__(self, team: Team, names: Iterable[str], device: torch.device, rounds: int) -> None:
        self.team, self.rounds = team, rounds
        self.on_gpu = device.type == "cuda"
        self.seconds: dict[str, dict[str, float]] = {}
        self.fastest: dict[str, dict[str, float]] = {}
        self.first: dict[str, dict[str, float]] = {}
        self.failed: dict[str, dict[str, str]] = {}
        self.peak: dict[str, float] = {}
        self.names, self.skipped = team.ask(names, "start", together=True)

    def figure(self, figure: str) -> None:
        """Time a figure; whoever fails in it is left out of the rest of it."""
        prepared = self._ask(figure, self.names, "prepare", figure, together=self.on_gpu)
        names = [name for name, timed in prepared.items() if timed]
        # Compilation; one after the other on a CPU, where they would take cores from each other.
        self.first[figure] = self._ask(figure, names, "call", together=self.on_gpu)
        # Decode steps are short: several in a row, as a stream of tokens has them.
        calls = 10 if figure.startswith("decode") else 5 if self.on_gpu else 1
        taken: dict[str, list[float]] = {name: [] for name in self.first[figure]}
        for _ in range(self.rounds):
            for name in taken:
                for times in self._ask(figure, [name], "time", calls).values():
                    taken[name] += times
                    if figure == "training step" and self.on_gpu:
                        self.peak |= self._ask(figure, [name], "peak_megabytes")
                self._ask(figure, [name], "release")
        self.seconds[figure] = {
            name: statistics.median(times) for name, times in taken.items() if times
        }
        self.fastest[figure] = {name: min(times) for name, times in taken.items() if times}

    def cache(self) -> dict[str, float]:
        """Bytes of cache per token of every contender."""
        return self._ask("cache", self.names, "cache_bytes_per_token", 64)

    def _ask(self, figure: str, names: Iterable[str], method: str, *words: Any, **how: Any) -> Any:
        answers, failures = self.team.ask(names, method, *words, **how)
        if failures:
            self.failed.setdefault(figure, {}).update(failures)
        return answers


def time_workload(
    workload: Workload, names: tuple[str, ...], threads: int, options: argparse.Namespace
) -> Any:
    """Median seconds for every figure and contender, and KV cache bytes per token."""
    device = options.device
    figures = [figure for figure in options.figures if figure != MEMORY]
    team = Team(workload, names, threads, device, options.tf32)
    with team, Progress(console=OUT, transient=True) as bar:
        timing = Timing(team, names, device, options.rounds)
        task = bar.add_task("", total=len(figures))
        for figure in figures:
            bar.update(task, description=f"{workload.name}, {threads} thread(s): {figure}")
            timing.figure(figure)
            bar.advance(task)
        cache = timing.cache()
    found = {
        "seconds": timing.seconds,
        "fastest_seconds": timing.fastest,
        "first_call_seconds": timing.first,
        "cache_bytes_per_token": cache,
        "skipped": timing.skipped,
        "failed": timing.failed,
    }
    return found | ({"peak_megabytes": timing.peak} if timing.peak else {})


def measure_memory(workload: Workload, names: Iterable[str]) -> dict[str, float]:
    """Peak memory of training steps on the CPU in MiB, each contender in a new process."""
    command = [sys.executable, __file__, "--workload", workload.name.split()[0]]
    for part in workload.name.split()[1:]:
        command += ["--set", part]
    found = {}
    for name in names:
        done = subprocess.run([*command, "--memory-of", name], capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip():  # nothing: it does not train
            found[name] = float(done.stdout)
    return found


def options_of(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--set", nargs="+", default=[], metavar="SHAPE=N", action="extend")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS)
    parser.add_argument(
        "--figures",
        nargs="+",
        metavar="FIGURE",
        help="such as 'decode, batch 8' or memory; other figures in the result file are kept",
    )
    parser.add_argument("--threads", nargs="+", type=int, help="of the CPU; default: 1 2")
    parser.add_argument("--rounds", type=int, help="turns of each contender; default: 7, GPU 3")
    parser.add_argument("--emulate-avx2", action="store_true", help="use no AVX-512")
    parser.add_argument("--tf32", action="store_true", help="fp32 products with TF32 (GPU)")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="default: results/bench/KIND")
    options = parser.parse_args(words)
    if options.emulate_avx2:
        emulate_avx2()
    options.device = choose_device(options.device)
    on_gpu = options.device.type == "cuda"
    known = {*figure_names(torch.device("cpu")), *figure_names(options.device), MEMORY}
    if unknown := set(options.figures or ()) - known:
        parser.error(f"--figures: {sorted(unknown)[0]!r} is none of {', '.join(sorted(known))}")
    if options.tf32 and not on_gpu:
        parser.error("--tf32: of a GPU, not of a CPU")
    options.figures = options.figures or [*figure_names(options.device), MEMORY]
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
        print(resident_megabytes(workloads[0], options.memory_of) or "")
        return
    (names, skipped), machine = chosen(options.contenders, device), describe()
    machine |= {"emulates_avx2": options.emulate_avx2}
    if on_gpu:
        machine |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    for workload in workloads:
        memory = {}
        if MEMORY in options.figures and not on_gpu:
            memory = measure_memory(workload, names)
        results = []
        for threads in options.threads:
            limits = machine_limits(threads, bool(set(names) & set(BF16)), device)
            result = {
                "workload": vars(workload),
                "threads": threads,
                "device": device.type,
                "fp32_products": "tf32" if options.tf32 else "fp32",
                "peak_megabytes": memory,
                **time_workload(workload, names, threads, options),
            }
            result["skipped"] |= skipped
            compare(workload, result, limits)
            about = {
                "command": command_line(),
                "commit": machine["commit"],
                "cpu": machine["cpu"],
                "rounds": options.rounds,
                "limits": limits,
            }
            result["runs"] = {figure: about for figure in options.figures}
            print_table(result)
            results.append(result)
        write(merge(options.out, results), machine, options.out)


if __name__ == "__main__":
    main()
