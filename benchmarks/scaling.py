"""How cost grows with loops, context and halted positions; writes results/bench/KIND/scaling.*.

    python benchmarks/scaling.py

Shapes of workload S at batch 1 (halting: batch 8), one thread, fp32. All figures are medians; the
settings of a curve take turns.
"""

import argparse
import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from contenders import S
from figures import cost_lines
from host import command_line, peak_bytes, processor_kind
from rich.console import Console
from torch import Tensor

from openmythos import MythosConfig, OpenMythos
from openmythos.analysis import plots
from openmythos.files import write_json
from openmythos.machine import describe, keep_freed_memory
from openmythos.nn.layout import TokenLayout, attention_context
from openmythos.nn.view import LayerView
from openmythos.recurrence import schedule
from openmythos.recurrence.exit_rules import StateChangeExit
from openmythos.recurrence.schedule import LoopPlan
from openmythos.recurrence.trace import RecurrentOutput

LOOPS = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (256, 512, 1024, 2048, 4096, 8192)
SHARES = (0.0, 0.25, 0.5, 0.75, 0.9)
OUT = Console(highlight=False, markup=False)


def model_of(config: MythosConfig) -> OpenMythos:
    return OpenMythos(config, seed=0).eval()


def interleaved(runs: Mapping[Any, Callable[[], object]], rounds: int) -> dict[Any, float]:
    """Median seconds of each function; they take turns, after a warmup turn."""
    taken: dict[Any, list[float]] = {key: [] for key in runs}
    for turn in range(rounds + 1):
        for key, run in runs.items():
            started = time.perf_counter()
            run()
            if turn:
                taken[key].append(time.perf_counter() - started)
    return {key: statistics.median(times) for key, times in taken.items()}


def draw(batch: int, seq: int) -> Tensor:
    return torch.randint(S.vocab, (batch, seq), generator=torch.Generator().manual_seed(seq))


def against_loops(rounds: int) -> dict[str, dict[int, float]]:
    model, tokens = model_of(S.config()), draw(1, 256)

    def train(loops: int) -> None:
        model.losses(tokens, tokens, num_loops=loops).cross_entropy.backward()
        model.zero_grad()

    forward = torch.no_grad()(lambda loops: model(tokens, num_loops=loops))
    return {
        "forward": interleaved({n: (lambda n=n: forward(n)) for n in LOOPS}, rounds),
        "forward + backward": interleaved({n: (lambda n=n: train(n)) for n in LOOPS}, rounds),
    }


def outside_the_loop(rounds: int) -> float:
    """Seconds of embedding, prelude, coda and head alone, for a forward pass of 256 tokens."""
    config = S.config()
    model, tokens = model_of(config), draw(1, 256)
    layout = TokenLayout(256, 0, tokens.device)
    context = attention_context(layout, config.attention, config.dim)

    @torch.no_grad()
    def run() -> None:
        x = model.embed(tokens)
        for layer in (*model.prelude, *model.coda):
            x, _ = layer(x, LayerView(context))
        torch.nn.functional.linear(model.norm(x), model.head_weight)

    return interleaved({0: run}, rounds)[0]


def against_context(rounds: int) -> dict[str, dict[int, float]]:
    config = replace(S.config(), context=2 * max(CONTEXTS))
    model = model_of(config)
    prefill, decode = {}, {}
    for context in CONTEXTS:
        tokens = draw(1, context)
        with torch.no_grad():
            cache = model.new_cache(1, context + 64)
            model(tokens, cache=cache)
            cache.advance(context)
        # The cache is not advanced: every step overwrites the same position.
        decode[context] = torch.no_grad()(
            lambda cache=cache, tokens=tokens: model(tokens[:, :1], cache=cache)
        )
        prefill[context] = torch.no_grad()(lambda tokens=tokens: model(tokens))
    return {
        "prefill": interleaved(prefill, max(3, rounds // 2)),
        "decode, one token": interleaved(decode, 3 * rounds),
    }


def peak_of(loops: int, context: int, mode: str) -> float:
    """MiB that a training step adds to the peak memory of a new process."""
    command = [sys.executable, __file__, "--peak-of", str(loops), str(context), mode]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def added_to_peak(loops: int, context: int, mode: str) -> float:
    """MiB that a training step adds to the peak memory of this process."""
    model = model_of(replace(S.config(), context=max(CONTEXTS))).train()
    model.recurrent.checkpoint_loops = mode == "checkpointed"
    backprop_loops = 4 if mode == "last 4 loops" else 0
    tokens, before = draw(1, context), peak_bytes()
    losses = model.losses(tokens, tokens, num_loops=loops, backprop_loops=backprop_loops)
    losses.cross_entropy.backward()
    return (peak_bytes() - before) / 2**20


class _Halted:
    """A mock exit rule: a fixed set of positions halts after the first loop."""

    def __init__(self, share: float, batch: int, seq: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._running = torch.rand(batch, seq, generator=generator).argsort(dim=1) >= share * seq

    def update(self, states: object, active: Tensor, loop: int) -> Tensor:
        return active & self._running

    def finish(self, out: RecurrentOutput) -> RecurrentOutput:
        return out


def against_halted_share(rounds: int) -> dict[str, dict[float, float]]:
    """Seconds per loop by fraction of halted positions; 256 tokens, batch 8."""
    config = S.config()
    model, batch, seq = model_of(config), 8, 256
    layout = TokenLayout(seq, 0, torch.device("cpu"))
    context = attention_context(layout, config.attention, config.dim)
    encoded = torch.randn(batch, seq, config.dim, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def run(share: float | None, loops: int) -> None:
        tracker: Any = None if share is None else _Halted(share, batch, seq)
        plan = LoopPlan(num_loops=loops, exits=tracker)
        schedule.run(model.recurrent, encoded, context, plan)

    keys = [(share, loops) for share in (None, *SHARES) for loops in (1, 9)]
    found = interleaved({key: functools.partial(run, *key) for key in keys}, rounds)
    seconds = {share: (found[share, 9] - found[share, 1]) / 8 for share in (None, *SHARES)}
    return {"time of a loop": {100 * share: seconds[share] / seconds[None] for share in SHARES}}


def against_exit(rounds: int) -> dict[str, dict[int, float]]:
    """Seconds per decoded token by the loop, of 16, after which an exit rule stops it."""
    model, tokens = model_of(S.config()), draw(1, 512)
    runs: dict[Any, Callable[[], object]] = {}
    for loops in (1, 2, 4, 8, 16):
        with torch.no_grad():
            cache = model.new_cache(1, 520, num_loops=16)
            model(tokens, num_loops=16, cache=cache)
            cache.advance(512)
        # Every change is below the threshold, so tokens exit after exactly min_loops loops.
        rule = StateChangeExit(threshold=1e9, min_loops=loops)
        step = torch.no_grad()(
            lambda cache=cache, rule=rule: model(
                tokens[:, :1], num_loops=16, cache=cache, exit_rule=rule
            )
        )
        used = int(step().recurrence.loops_used)
        assert used == loops, (used, loops)
        runs[loops] = step
    return {"decode, one token": interleaved(runs, 5 * rounds)}


def line_fit(points: Mapping[int, float]) -> dict[str, float]:
    """Fit seconds = fixed + slope * loops by least squares of the relative error; largest error."""
    x = torch.tensor(list(points), dtype=torch.double)
    y = torch.tensor(list(points.values()), dtype=torch.double)
    terms = torch.stack((torch.ones_like(x), x), dim=1) / y[:, None]
    fixed, slope = torch.linalg.lstsq(terms, torch.ones_like(y)[:, None]).solution[:, 0].tolist()
    worst = max(abs(fixed + slope * n - seconds) / seconds for n, seconds in points.items())
    return {"fixed_seconds": fixed, "seconds_per_loop": slope, "largest_relative_error": worst}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peak-of", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("results/bench") / processor_kind())
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    if options.peak_of:
        loops_of, context_of, mode_of = options.peak_of
        print(added_to_peak(int(loops_of), int(context_of), mode_of))
        return
    machine = describe()
    rounds = options.rounds
    OUT.print("time against loops")
    loops = against_loops(rounds)
    fits = {name: line_fit(points) for name, points in loops.items()}
    outside = outside_the_loop(3 * rounds)
    for name, fit in fits.items():
        OUT.print(f"  {name}: {fit}")
    OUT.print(f"  outside the loop, measured alone: {outside:.4f} s")
    OUT.print("time against context")
    contexts = against_context(rounds)
    OUT.print("time against halted share and exit")
    halted, exits = against_halted_share(rounds), against_exit(rounds)
    OUT.print(f"  {halted}\n  {exits}")
    OUT.print("memory")
    modes = ("all loops", "last 4 loops", "checkpointed")
    memory = {mode: {n: peak_of(n, 256, mode) for n in LOOPS} for mode in modes}
    memory_context = {"4 loops": {n: peak_of(4, n, "all loops") for n in CONTEXTS}}
    OUT.print(f"  {memory}\n  {memory_context}")
    options.out.mkdir(parents=True, exist_ok=True)
    milliseconds = {
        name: {line: {x: 1e3 * y for x, y in points.items()} for line, points in lines.items()}
        for name, lines in (("loops", loops), ("context", contexts), ("exit", exits))
    }
    write_json(
        {
            "command": command_line(),
            "hardware": machine,
            "dtype": "fp32",
            "rounds": rounds,
            "milliseconds_by_loops": _text_keys(milliseconds["loops"]),
            "line_fits": fits,
            "outside_the_loop_seconds": outside,
            "milliseconds_by_context": _text_keys(milliseconds["context"]),
            "loop_cost_by_halted_percent": _text_keys(halted),
            "milliseconds_by_exit_loop": _text_keys(milliseconds["exit"]),
            "training_mib_by_loops": _text_keys(memory),
            "training_mib_by_context": _text_keys(memory_context),
        },
        options.out / "scaling.json",
    )
    draw_figures(options.out, milliseconds, memory, halted)


def draw_figures(out: Path, milliseconds: Any, memory: Any, halted: Any) -> None:
    """Write scaling.png and stopping.png."""
    panels = {
        "num_loops, 256 tokens": milliseconds["loops"],
        "context, 4 loops": milliseconds["context"],
    }
    rows = _rows({**panels, "num_loops, training memory": memory})
    figure = cost_lines(
        {**panels, "num_loops, training step": memory},
        y_labels=("time [ms]", "time [ms]", "peak memory [MiB]"),
    )
    plots.save_figure(figure, out / "scaling.png", rows)
    panels = {
        "halted positions [%]": {"measured": halted["time of a loop"]},
        "loops used, of at most 16": milliseconds["exit"],
    }
    figure = cost_lines(
        panels, y_labels=("time of a loop, relative", "time per token [ms]"), logarithmic=False
    )
    plots.save_figure(figure, out / "stopping.png", _rows(panels))


def _text_keys(lines: Mapping[str, Mapping[Any, float]]) -> dict[str, dict[str, float]]:
    return {name: {f"{x:g}": y for x, y in points.items()} for name, points in lines.items()}


def _rows(panels: Mapping[str, Mapping[str, Mapping[Any, float]]]) -> list[dict[str, object]]:
    return [
        {"against": name, "line": line, "x": x, "y": y}
        for name, lines in panels.items()
        for line, points in lines.items()
        for x, y in points.items()
    ]


if __name__ == "__main__":
    main()
