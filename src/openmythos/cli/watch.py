"""The command `watch`: the state of a run, its progress and its newest metrics, live."""

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from openmythos.cli.flags import RunFolder
from openmythos.cli.progress import duration
from openmythos.cli.screen import OUT, STYLES
from openmythos.config import require_number
from openmythos.train.metrics import Metrics, MetricsTail, recent_median, scalars, seconds_left
from openmythos.train.state import ENDED, RunState, State, progress, read_state

LOSSES = 8  # number of mean losses shown


@dataclass(frozen=True)
class Watch:
    """Show a training run live, on this machine or on another that sees its folder."""

    folder: RunFolder
    every: float = 1.0
    """Seconds between updates."""
    once: bool = False
    """Print one frame and return."""

    def run(self) -> None:
        require_number("every", self.every, above=0)
        run = Path(self.folder)
        tail = MetricsTail(run)
        shown, ended = _frame(run, tail)
        if self.once:
            OUT.print(shown)
            return
        with Live(shown, console=OUT, auto_refresh=False) as live, suppress(KeyboardInterrupt):
            while not ended:
                time.sleep(self.every)
                shown, ended = _frame(run, tail)
                live.update(shown, refresh=True)


def _frame(run: Path, tail: MetricsTail) -> tuple[Panel, bool]:
    """The frame to show, and whether it is the last one."""
    from openmythos.train.folder import read_config

    # Read the state before the metrics: then the last frame includes the last step.
    record = read_state(run)
    metrics = tail.read()
    num_steps = read_config(run).train.num_steps
    state, done = progress(record, metrics, num_steps)
    bar = Table.grid(padding=(0, 1))
    bar.add_row(
        Text(f"step {done:,} of {num_steps:,}"),
        ProgressBar(total=num_steps, completed=done, width=24),
        Text(_timing(state, record, metrics, num_steps)),
    )
    parts: list[RenderableType] = [bar]
    if metrics:
        parts += [Text(loss_so_far(metrics)), _numbers(metrics)]
    if record is not None and record.error and state == "failed":
        parts.append(Text(record.error, style="red"))
    title = Text(f" {run}: ") + Text(state, style=STYLES.get(state, "dim")) + Text(" ")
    return Panel(Group(*parts), title=title, width=min(100, OUT.width)), state in ENDED


def loss_so_far(metrics: Sequence[Metrics]) -> str:
    """The mean loss in each of up to 8 equal intervals of the run, without nan and inf."""
    losses = [m["loss"] for m in metrics if math.isfinite(m.get("loss", math.nan))]
    size = math.ceil(len(losses) / LOSSES) or 1
    means = [f"{fmean(losses[i : i + size]):.3f}" for i in range(0, len(losses), size)]
    return f"loss, first to last: {' '.join(means)}" if means else "no finite loss yet"


def _timing(
    state: State, record: RunState | None, metrics: Sequence[Metrics], num_steps: int
) -> str:
    if state == "running":
        left = seconds_left(metrics, num_steps) if metrics else math.nan
        return f"ETA {duration(left)}" if math.isfinite(left) else "waiting for a step"
    since = time.time() - record.stepped if record else math.nan
    return f"last step {duration(since)} ago" if math.isfinite(since) else ""


def _numbers(metrics: Sequence[Metrics]) -> Table:
    last = scalars(metrics[-1])
    speed = recent_median(metrics, "tokens_per_second")
    cells: list[tuple[str, str]] = [("tokens/s", f"{speed:,.0f}")]
    shown: Mapping[str, tuple[str, Callable[[float], str]]] = {
        "loss": ("loss", "{:.4f}".format),
        "gradient_norm": ("gradient norm", "{:.3g}".format),
        "mean_loops": ("mean loops", "{:.3g}".format),
        "max_violation": ("max violation", "{:.3g}".format),
        "max_decay": ("max decay", "{:.6f}".format),
        "skipped": ("skipped steps", "{:.0f}".format),
        "mfu": ("MFU", "{:.1%}".format),
    }
    cells += [(label, form(last[key])) for key, (label, form) in shown.items() if key in last]
    table = Table.grid(padding=(0, 2))
    half = (len(cells) + 1) // 2
    for left, right in itertools.zip_longest(cells[:half], cells[half:], fillvalue=("", "")):
        table.add_row(Text(left[0], style="dim"), left[1], Text(right[0], style="dim"), right[1])
    return table
