"""Output of the commands: tables, streamed text, abbreviated numbers; does not import torch."""

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from openmythos.inference.generation import Request
    from openmythos.inference.text import Engine
    from openmythos.planning import cost, fit

# Only rank 0 prints. No highlighting and no rich markup in texts; in a file or a pipe, lines are
# not wrapped.
_WIDTH = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 1000
_QUIET = os.environ.get("RANK", "0") != "0"
# By state of a run; all other states are dim.
STYLES = {"running": "green", "finished": "bold", "stopped": "yellow"}
STYLES |= dict.fromkeys(("failed", "dead"), "red")
OUT = Console(highlight=False, markup=False, quiet=_QUIET, width=_WIDTH)


def print_heat_map(found: Mapping[int, Mapping[int, float]], trained_hops: int) -> None:
    """Print accuracy in percent by hops and loops; hops beyond training are marked "new"."""
    loops = list(next(iter(found.values())))
    OUT.print("\ncorrect answers in %:  hops (down) against loops at inference (across)")
    OUT.print("        " + "".join(f"{loop:>5}" for loop in loops))
    for hops, row in found.items():
        line = Text(f"{hops:>3}{' new' if hops > trained_hops else '':<5}")
        for share in row.values():
            shade = round(40 + 180 * share)
            ink = "black" if share > 0.5 else "white"
            style = f"{ink} on rgb({shade},{shade},{round(110 - 60 * share)})"
            line.append(f"{100 * share:>5.0f}", style=style)
        OUT.print(line)


def stream(engine: "Engine", prompt: str, request: "Request") -> list[int]:
    """Print the prompt and its continuation token by token; returns the loops of every token."""
    loops = []
    pieces = engine.stream(prompt, request)
    # Without rich, which would turn ":smile:" into an emoji and tabs into spaces.
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece.text, end="", flush=True)
        loops.append(piece.loops_used)
    print()
    return loops


def print_plan(name: str, plan: "cost.Plan") -> None:
    """Print the estimated cost of a config, in four blocks."""
    count, training = plan.parameters, plan.training
    parts = ("embedding", "prelude", "recurrent", "coda", "head")
    shape = f"{plan.batch} x {plan.context:,} tokens, {str(plan.dtype).removeprefix('torch.')}"
    _print_table(
        "",
        name,
        {
            "parameters, total": short(count.total),
            "  active per token": short(count.active),
            **{f"  {part}": short(getattr(count, part)) for part in parts},
            "  of it routed experts": short(count.routed_experts),
        },
        {
            "layers executed": f"{plan.effective_depth} with {plan.num_loops} loops",
            "FLOPs per token, forward": short(plan.forward_flops),
            "FLOPs per token, training": short(plan.training_flops),
        },
        {
            "weights": _bytes(plan.weight_bytes),
            f"KV cache, {shape}": _bytes(plan.cache_bytes),
            "  all loops sharing one slot": _bytes(plan.shared_cache_bytes),
        },
        {
            f"training memory, {shape}": _bytes(training.total),
            "  weights": _bytes(training.weights),
            "  gradients": _bytes(training.gradients),
            "  optimizer state": _bytes(training.optimizer),
            "  activations": _bytes(training.activations),
            "  logits": _bytes(training.logits),
            "  with activation checkpointing": _bytes(plan.checkpointed.total),
        },
    )


def print_fit(name: str, found: "fit.Fit") -> None:
    """Print the memory per device, and the training settings with which it fits."""
    from openmythos.planning.fit import USABLE

    memory, settings = found.memory, found.settings
    _print_table(
        "memory of each device",
        name,
        {part: _bytes(getattr(memory, part)) for part in vars(memory)},
        {"total": _bytes(memory.total), f"usable ({USABLE:.0%})": _bytes(found.usable)},
    )
    where = f"{settings.gpus} device{'s' if settings.gpus > 1 else ''}"
    result = f"fits {where} with"
    if not found.fits:
        result = f"does not fit {where}, not even with these settings, which need least"
    OUT.print(f"{name} {result}:\n    --set {' '.join(settings.overrides())}", soft_wrap=True)


def _print_table(title: str, name: str, *blocks: Mapping[str, str]) -> None:
    table = Table(title, name)
    for block in blocks:
        for row in block.items():
            table.add_row(*row)
        table.add_section()
    OUT.print(table)


def short(number: int | float) -> str:
    """A count with three significant digits: 1.23 M."""
    return _scaled(number, {"T": 1e12, "B": 1e9, "M": 1e6, "k": 1e3}, 3, "")


def _bytes(number: int | float) -> str:
    return _scaled(number, {"TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10}, 4, " B")


def _scaled(number: int | float, units: Mapping[str, float], digits: int, none: str) -> str:
    for unit, size in units.items():
        if number >= size:
            return f"{number / size:.{digits}g} {unit}"
    return f"{number:.0f}{none}"
