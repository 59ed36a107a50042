"""Time this project's models beside its peers' in one run; writes results/bench/KIND.

KIND is the kind of processor, such as avx2 or avx512-bf16. On processors that emulate bf16, the
contenders in bf16 are skipped unless they are named on the command line.

    make bench                                     (own virtual environment, both workloads)
    python benchmarks/bench.py --workload S --threads 1 --rounds 7 --set seq=512 batch=4

Contenders take turns (A B A B ...), so that a slowdown of the machine affects all of them. Each
runs in its own process; a figure is the median over rounds. This project's processes use the malloc
settings of its command line, the others the system's defaults.
"""

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from contenders import CONTENDERS, REFERENCE, WORKLOADS, Contender, S, Workload, with_shape
from figures import speed_ratios
from host import peak_bytes, processor_kind
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from openmythos.analysis import plots
from openmythos.files import read_json, write_json
from openmythos.machine import (
    bf16_is_native,
    describe,
    keep_freed_memory,
)
from openmythos.nn.cache import ExactCache
from openmythos.planning import cost

PROMPT = 512
FP32 = ("openmythos-fp32", "openmythos-compiled")
BF16 = ("openmythos-bf16", "openmythos-bf16-compiled")
# Goals: (contenders, figure, speed-up of the best of them over the reference on (S, M)).
FLOORS = (
    (FP32, "training step", (1.35, 1.4)),
    (BF16, "training step", (2.0, 2.3)),
    (FP32, "prefill, batch 8", (2.3, 1.4)),
    (FP32 + BF16, "decode, batch 1", (2.5, 2.5)),
    (FP32 + BF16, "decode, batch 8", (5.0, 4.0)),
)
PEAK_FLOORS = {"S": 0.60, "M": 0.65}
MEMORY_CEILING = 0.7
OUT = Console(highlight=False, markup=False)


def median_seconds(run: Callable[[], object], rounds: int) -> float:
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def chosen(asked: list[str] | None) -> tuple[tuple[str, ...], dict[str, str]]:
    """(contenders to time, reason for each one that is skipped)."""
    if asked or bf16_is_native():
        return tuple(asked or CONTENDERS), {}
    why = f"bf16 is not native on this processor ({processor_kind()}): it would be emulated"
    skipped = {name: why for name in CONTENDERS if name in BF16}
    return tuple(name for name in CONTENDERS if name not in skipped), skipped


def machine_limits(threads: int, names: tuple[str, ...]) -> dict[str, float]:
    """Matmul peaks in FLOP/s and memory bandwidth in byte/s, at this number of threads."""
    torch.set_num_threads(threads)
    found = {}
    dtypes = {"fp32": torch.float32}
    if bf16_is_native() or set(names) & set(BF16):
        dtypes["bf16"] = torch.bfloat16
    for kind, dtype in dtypes.items():
        rates = []
        for m, k, n in ((1024, 1024, 1024), (2048, 256, 1024), (2048, 512, 512)):
            a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
            rounds = 30 if kind == "fp32" or bf16_is_native() else 1
            seconds = median_seconds(lambda a=a, b=b: a @ b, rounds)
            rates.append(2 * m * k * n / seconds)
        found[kind] = max(rates)
    large = torch.zeros(64 << 20)
    found["bandwidth"] = large.nbytes / median_seconds(large.sum, 9)
    return found


def measures(workload: Workload) -> dict[str, Callable[[Contender], Callable[[], object]]]:
    """For each figure, a function that prepares a contender and returns the function to time."""
    generator = torch.Generator().manual_seed(0)

    def tokens(batch: int, seq: int) -> torch.Tensor:
        return torch.randint(workload.vocab, (batch, seq), generator=generator)

    batch, targets = (tokens(workload.batch, workload.seq) for _ in range(2))
    prompts = {size: tokens(size, PROMPT) for size in (1, 8)}

    def training(contender: Contender) -> Callable[[], object]:
        contender.start_training()
        return lambda: contender.train_step(batch, targets)

    def without_grad(contender: Contender, run: Callable[[], object]) -> Callable[[], object]:
        contender.model.eval()
        return torch.no_grad()(run)

    def decoding(size: int) -> Callable[[Contender], Callable[[], object]]:
        def prepare(contender: Contender) -> Callable[[], object]:
            contender.model.eval()
            with torch.no_grad():
                cache = contender.prefill(prompts[size], 256)
            return without_grad(contender, lambda: contender.decode(cache, prompts[size][:, :1]))

        return prepare

    return {
        "forward": lambda c: without_grad(c, lambda: c.forward(batch)),
        "training step": training,
        "prefill, batch 1": lambda c: without_grad(c, lambda: c.prefill(prompts[1], 256)),
        "prefill, batch 8": lambda c: without_grad(c, lambda: c.prefill(prompts[8], 256)),
        "decode, batch 1": decoding(1),
        "decode, batch 8": decoding(8),
    }


def bound_seconds(workload: Workload, figure: str, limits: dict[str, float], peak: str) -> float:
    """Lower bound of the time on this machine: the larger of arithmetic and memory traffic."""
    config, loops = workload.config(), workload.loops
    parameters = cost.parameters(config)
    weight = 2 if peak == "bf16" else 4
    moved = 0.0
    if figure in ("training step", "forward"):
        count, seq = workload.batch * workload.seq, workload.seq
        per_token = (
            cost.Flops(config, seq).training(loops)
            if figure == "training step"
            else cost.Flops(config, seq).forward(loops)
        )
    elif figure.startswith("prefill"):
        count = int(figure.split()[-1]) * PROMPT
        per_token = cost.Flops(config, PROMPT).forward(loops)
    else:
        count = int(figure.split()[-1])
        # A new token attends to all keys, twice the mean over a causal forward pass.
        per_token = cost.Flops(config, 2 * PROMPT).forward(loops)
        cache = cost.cache_bytes(
            config,
            context=PROMPT,
            batch=count,
            num_loops=loops,
            policy=ExactCache(),
            dtype=torch.bfloat16 if peak == "bf16" else torch.float32,
        )
        moved = min(parameters.total, parameters.active * count) * weight + cache
    return max(count * per_token / limits[peak], moved / limits["bandwidth"])


def _as_installed(name: str) -> None:
    if name.startswith("openmythos"):
        keep_freed_memory()


def serve(pipe: Connection, workload: Workload, name: str, threads: int) -> None:
    """Run a contender in its own process, so that contenders do not share an allocator."""
    torch.set_num_threads(threads)
    _as_installed(name)
    contender, figures = CONTENDERS[name](workload), measures(workload)
    run: Callable[[], object] = lambda: None  # noqa: E731
    while True:
        order, value = pipe.recv()
        if order == "prepare":
            run = figures[value](contender)
            pipe.send(None)
        elif order == "run":
            taken = []
            for _ in range(value):
                started = time.perf_counter()
                run()
                taken.append(time.perf_counter() - started)
            pipe.send(taken)
        elif order == "cache":
            contender.model.eval()
            with torch.no_grad():
                held = contender.prefill(torch.zeros(1, value, dtype=torch.long), 0)
            pipe.send(contender.cache_bytes(held) / value)
        else:
            return


def time_workload(workload: Workload, names: tuple[str, ...], threads: int, rounds: int) -> Any:
    """Median seconds for every figure and contender, and KV cache bytes per token."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for name in names:
        pipes[name], far_end = context.Pipe()
        arguments = (far_end, workload, name, threads)
        processes.append(context.Process(target=serve, args=arguments, daemon=True))
        processes[-1].start()

    def ask(name: str, order: str, value: object) -> Any:
        pipes[name].send((order, value))
        return pipes[name].recv()

    figures = list(measures(workload))
    seconds: dict[str, dict[str, float]] = {}
    first: dict[str, dict[str, float]] = {}
    with Progress(console=OUT, transient=True) as bar:
        task = bar.add_task("", total=len(figures) * (rounds + 1))
        for figure in figures:
            bar.update(task, description=f"{workload.name}, {threads} thread(s): {figure}")
            for name in names:
                ask(name, "prepare", figure)
            taken: dict[str, list[float]] = {name: [] for name in names}
            # Decode steps are short, so time several of them per turn.
            steps = 5 if figure.startswith("decode") else 1
            for turn in range(rounds + 1):
                for name in names:
                    times = ask(name, "run", steps)
                    if turn:
                        taken[name] += times
                    else:  # first call: warmup and compilation
                        first.setdefault(figure, {})[name] = times[0]
                bar.advance(task)
            seconds[figure] = {name: statistics.median(times) for name, times in taken.items()}
    cache = {name: ask(name, "cache", 64) for name in names}
    for name in names:
        pipes[name].send(("stop", None))
    for process in processes:  # no other process while the next workload is measured
        process.join()
    return {"seconds": seconds, "first_call_seconds": first, "cache_bytes_per_token": cache}


def peak_megabytes(workload: Workload, name: str) -> float:
    """Peak memory in MiB that model, optimizer and three steps add to this process."""
    torch.set_num_threads(1)
    _as_installed(name)
    # A small model first: libraries and kernels that any training step loads do not count.
    small = CONTENDERS[name](with_shape(S, batch=1, seq=64))
    small.start_training()
    small.train_step(*torch.zeros(2, 1, 64, dtype=torch.long))
    del small
    before = peak_bytes()
    contender = CONTENDERS[name](workload)
    contender.start_training()
    tokens = torch.randint(workload.vocab, (workload.batch, workload.seq))
    for _ in range(3):
        contender.train_step(tokens, tokens)
    return (peak_bytes() - before) / 2**20


def measure_memory(workload: Workload, names: tuple[str, ...]) -> dict[str, float]:
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


def report(workload: Workload, threads: int, result: dict[str, Any], limits: Any) -> None:
    """Print a table of times, ratios to the reference and fractions of the bound."""
    seconds = result["seconds"]
    names = list(next(iter(seconds.values())))
    table = Table("", *names, title=f"workload {workload.name}, {threads} thread(s)")
    result["ratio"], result["share_of_bound"] = {}, {}
    for figure, times in seconds.items():
        ratios = {name: times[REFERENCE] / times[name] for name in names if REFERENCE in times}
        shares = {}
        for name in names:
            peak = "bf16" if "bf16" in name else "fp32"
            shares[name] = bound_seconds(workload, figure, limits, peak) / times[name]
        result["ratio"][figure], result["share_of_bound"][figure] = ratios, shares
        cells = []
        for name in names:
            ratio = f"{ratios[name]:.2f}x " if ratios else ""
            cells.append(f"{1e3 * times[name]:.1f} ms {ratio}{100 * shares[name]:.0f}%")
        table.add_row(figure, *cells)
    cache = result["cache_bytes_per_token"]
    table.add_row("cache, bytes per token", *(f"{cache[name]:.0f}" for name in names))
    if "peak_megabytes" in result:
        memory = result["peak_megabytes"]
        table.add_row("peak memory, training", *(f"{memory[name]:.0f} MiB" for name in names))
    OUT.print(table)


def check_floors(results: list[dict[str, Any]]) -> list[str]:
    """A message for each goal that this run missed or did not measure."""
    missed = []

    def expect(fits: bool, text: str) -> None:
        if not fits:
            missed.append(text)

    for result in results:
        base = result["workload"]["name"]
        if base not in PEAK_FLOORS:
            continue
        where = f"{base}, {result['threads']} thread(s)"
        for names, figure, floors in FLOORS:
            ratios = {
                name: ratio for name, ratio in result["ratio"][figure].items() if name in names
            }
            floor = floors[0 if base == "S" else 1]
            if ratios:
                name = max(ratios, key=lambda name: ratios[name])
                text = f"{where}: {figure} of {name} {ratios[name]:.2f}x < {floor}x"
                expect(ratios[name] >= floor, text)
        share = result["share_of_bound"]["training step"].get("openmythos-fp32")
        if share is not None:
            text = f"{where}: fp32 training at {share:.0%} of peak < {PEAK_FLOORS[base]:.0%}"
            expect(share >= PEAK_FLOORS[base], text)
        memory = result.get("peak_megabytes", {})
        if REFERENCE in memory and "openmythos-fp32" in memory:
            ratio = memory["openmythos-fp32"] / memory[REFERENCE]
            text = f"{where}: peak memory {ratio:.2f}x > {MEMORY_CEILING}x"
            expect(ratio <= MEMORY_CEILING, text)
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--set", nargs="+", default=[], metavar="SHAPE=N", action="extend")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("results/bench") / processor_kind())
    options = parser.parse_args()
    changes = {key: int(value) for key, value in (text.split("=") for text in options.set)}
    workloads = [with_shape(WORKLOADS[name], **changes) for name in options.workload]
    if options.memory_of:
        print(peak_megabytes(workloads[0], options.memory_of))
        return
    (names, skipped), machine = chosen(options.contenders), describe()
    for name, why in skipped.items():
        OUT.print(f"skipped: {name}: {why}")
    for workload in workloads:
        results = []
        memory = {} if options.no_memory else measure_memory(workload, names)
        for threads in options.threads:
            limits = machine_limits(threads, names)
            result = time_workload(workload, names, threads, options.rounds)
            if memory:
                result["peak_megabytes"] = memory
            report(workload, threads, result, limits)
            shape = vars(workload)
            measured = {"commit": machine["commit"], "limits": limits, **result}
            results.append({"workload": shape, "threads": threads, **measured})
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
    if not all(REFERENCE in result["seconds"]["forward"] for result in results):
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
