"""One frame of `openmythos watch`: how a run stands, in characters."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from openmythos.train.metrics import Metrics, recent_median, scalars, seconds_left
from openmythos.train.state import RunState, State

HEIGHT = 10
STYLES: Mapping[State, str] = {
    "running": "green",
    "finished": "bold",
    "stopped": "yellow",
    "failed": "red",
    "dead": "red",
    "new": "dim",
    "unknown": "dim",
}
# The dots of a braille character: bit by (column, row), of two columns and four rows.
_DOTS = ((0, 1, 2, 6), (3, 4, 5, 7))
_LABEL = 9


def frame(
    run: Path,
    state: State,
    record: RunState | None,
    metrics: Sequence[Metrics],
    num_steps: int,
    *,
    width: int,
    unicode: bool = True,
) -> Panel:
    """The panel that shows a run; `unicode` is whether the terminal can show braille dots."""
    done = max(metrics[-1]["step"] + 1 if metrics else 0, record.step if record else 0)
    title = Text(f" {run}: ") + Text(state, style=STYLES[state]) + Text(" ")
    bar = Table.grid(padding=(0, 1))
    bar.add_row(
        Text(f"step {done:,} of {num_steps:,}"),
        ProgressBar(total=num_steps, completed=done, width=24),
        Text(_timing(state, record, metrics, num_steps)),
    )
    parts: list[RenderableType] = [bar]
    if metrics:
        losses = [(float(m["step"]), float(m.get("loss", math.nan))) for m in metrics]
        parts += [Text(), *chart(losses, max(1, width - _LABEL - 6), HEIGHT, unicode), Text()]
        parts.append(_numbers(metrics))
    if record is not None and record.error and state == "failed":
        parts.append(Text(record.error, style="red"))
    return Panel(Group(*parts), title=title, width=width)


def chart(
    points: Sequence[tuple[float, float]], columns: int, rows: int, unicode: bool = True
) -> list[Text]:
    """A curve of (x, y) with its y range at the left; what is not finite leaves a gap."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    if not finite:
        return [Text("no finite loss yet")]
    wide, high = (2, 4) if unicode else (1, 1)
    low, top = min(y for _, y in finite), max(y for _, y in finite)
    first, last = points[0][0], points[-1][0]
    cells = [[0] * columns for _ in range(rows)]
    for x, values in _columns(finite, first, last, columns * wide).items():
        mean = sum(values) / len(values)
        y = round((top - mean) / ((top - low) or 1.0) * (rows * high - 1))
        cells[y // high][x // wide] |= 1 << (_DOTS[x % wide][y % high] if unicode else 0)
    lines = []
    for place, row in enumerate(cells):
        label = {0: f"{top:.4g}", rows - 1: f"{low:.4g}"}.get(place, "")
        drawn = "".join(chr(0x2800 + bits) if unicode else " *"[bits] for bits in row)
        lines.append(Text(f"{label:>{_LABEL}} ") + Text(drawn, style="cyan"))
    middle = "loss by step"
    edges = f"{first:,.0f}".ljust(columns)[: columns - len(f"{last:,.0f}")] + f"{last:,.0f}"
    place = max(0, (columns - len(middle)) // 2)
    if edges[place : place + len(middle)].strip() == "":
        edges = edges[:place] + middle + edges[place + len(middle) :]
    lines.append(Text(" " * (_LABEL + 1) + edges, style="dim"))
    return lines


def _columns(
    points: Sequence[tuple[float, float]], first: float, last: float, count: int
) -> dict[int, list[float]]:
    """The values that fall on each dot of the x axis."""
    found: dict[int, list[float]] = {}
    for x, y in points:
        place = min(count - 1, int((x - first) / ((last - first) or 1.0) * count))
        found.setdefault(place, []).append(y)
    return found


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
    table: Any = Table.grid(padding=(0, 2))
    half = (len(cells) + 1) // 2
    for left, right in zip(cells[:half], [*cells[half:], ("", "")], strict=False):
        table.add_row(Text(left[0], style="dim"), left[1], Text(right[0], style="dim"), right[1])
    return table


def duration(seconds: float) -> str:
    """Two units at most: 42 s, 3 min, 5 h 12 min, 2 d 7 h."""
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if minutes < 1:
        return f"{seconds:.0f} s"
    if hours < 1:
        return f"{minutes:.0f} min"
    if days < 1:
        return f"{int(hours)} h {int(minutes) % 60} min"
    return f"{int(days)} d {int(hours) % 24} h"
