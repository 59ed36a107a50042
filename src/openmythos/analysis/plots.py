"""Draw data as a ``Figure``, all in one style. Nothing is computed, no window is opened.

The only module that imports matplotlib. It does so when a figure is drawn, so the module can be
imported without that extra.
"""

import contextlib
import csv
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from openmythos.config import ConfigError, needs, require
from openmythos.files import replacing

Figure = Any  # matplotlib's
Points = Sequence[tuple[float, float]]
Lines = Mapping[str, Points]  # a metric of a run: one line, or one per item of a list
# The colour-blind safe palette of Okabe and Ito without yellow, which is too faint for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
# One more than the colours, so that a colour has another marker when it is used again.
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GREY = "#595959"
_STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.labelsize": 11,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.figsize": (7.0, 4.2),
    "font.size": 10.5,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
    "legend.handlelength": 2.5,
    "xtick.color": GREY,
    "xtick.labelcolor": "black",
    "ytick.color": GREY,
    "ytick.labelcolor": "black",
}
_DPI = 150
_HORIZON = 0.05  # smoothing averages over about the last twentieth of the points before
_LOG_SPAN = 1000
_MIN_Y_SPAN = 0.1
_LEGEND_WIDTH = 80  # characters
_PANEL, _LINE = 3.2, 0.23  # height in inches of a panel and of a line of the legend


def metric_curves(
    panels: Mapping[str, Mapping[str, Lines]], *, x_label: str, single: bool = False
) -> Figure:
    """Curves by metric (panel) and run: raw values as a faint line, smoothed values as a bold one.

    A metric that is a list, such as a value per loop, gets a line per item from pale to dark; the
    first and the last are labelled. A run has the same colour in all panels and one legend entry;
    `single` omits the legend. x is logarithmic from three decades on; nan and inf leave a gap.
    """
    runs = dict.fromkeys(name for series in panels.values() for name in series)
    lines = [each for series in panels.values() for each in series.values()]
    drawn = [points for each in lines for points in each.values()]
    if not runs or not all(drawn):
        raise ValueError("panels: no line to draw")
    with style():
        look_of = dict(zip(runs, looks(), strict=False))
        # Explain raw lines only if smoothing changes them; metrics that are lists have none.
        scalars = [p for each in lines if len(each) == 1 for p in each.values()]
        longest = max(map(_count_finite, scalars), default=0)
        title = "bold: smoothed, faint: raw" if longest * _HORIZON > 1 else ""
        figure = new_figure()
        height = (0 if single else len(runs)) + (1 if title else 0)
        figure.set_size_inches(7.5, _PANEL * len(panels) + _LINE * height + 0.3)
        column = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        handles: dict[str, Any] = {}
        for axes, (metric, series) in zip(column, panels.items(), strict=True):
            for name, each in series.items():
                handle = _draw_lines(axes, each, look_of[name], name)
                handles.setdefault(name, handle)
            axes.set_ylabel(metric)
        xs = [x for points in drawn for x, _ in points]
        if min(xs) > 0 and max(xs) >= _LOG_SPAN * min(xs):
            column[-1].set_xscale("log")
        column[-1].set_xlabel(x_label)
        column[-1].xaxis.set_major_formatter(_short_number)
        if height:
            legend = figure.legend(
                *([], []) if single else (list(handles.values()), list(handles)),
                loc="outside upper left",
                title=title,
                alignment="left",
                fontsize=9,
            )
            legend.get_title().set_color(GREY)
    return figure


def _draw_lines(axes: Any, lines: Lines, look: Mapping[str, Any], name: str) -> Any:
    """Draw the lines of one run in one panel; returns the line for the legend."""
    many, handle = len(lines) > 1, None
    for tint, (item, points) in zip(_tints(look["color"], len(lines)), lines.items(), strict=True):
        xs, values = [x for x, _ in points], [_finite(y) for _, y in points]
        if not many:
            axes.plot(xs, values, color=tint, linewidth=0.8, alpha=0.4)
        # A single point needs a marker. Bold lines are drawn above the raw lines of all runs.
        bold = {**look, "marker": look["marker"] if _count_finite(points) == 1 else ""}
        bold |= {"color": tint, "linewidth": 1.4 if many else 2, "zorder": 2.5, "label": name}
        handle = axes.plot(xs, _smoothed(values), **bold)[0]
        if many and item in (next(iter(lines)), list(lines)[-1]):
            place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(f"loop {item}", points[-1], **place, fontsize=8)
    return handle


def loss_against_loops(
    curves: Mapping[str, Mapping[int, float | int]],
    *,
    references: Mapping[str, float | int] = MappingProxyType({}),
    trained_loops: float | int | None = None,
    y_label: str = "held-out bits per byte",
) -> Figure:
    """Values against ``num_loops``, one curve per name; `references` are horizontal lines.

    The y axis spans at least 0.1, so that noise does not look like an effect. nan and inf leave a
    gap.
    """
    loops = sorted({loop for curve in curves.values() for loop in curve})
    if not loops or not all(curves.values()):
        raise ValueError(f"curves of {[len(curve) for curve in curves.values()]} points: no line")
    marks = [*loops, *([] if trained_loops is None else [trained_loops])]
    if min(marks) < 1:
        raise ValueError(f"num_loops = {min(marks)}: the log axis begins at 1")
    with style():
        figure = new_figure()
        axes = figure.add_subplot()
        axes.set_xlabel("num_loops")
        axes.set_ylabel(y_label)
        for look, (name, curve) in zip(looks(), curves.items(), strict=False):
            values = [_finite(curve[loop]) for loop in sorted(curve)]
            axes.plot(sorted(curve), values, **look, linewidth=2, markersize=6, label=name)
        _loop_axis(axes, loops, marks)
        shown = [*(curve.values() for curve in curves.values()), references.values()]
        axes.set_ylim(_y_range(itertools.chain.from_iterable(shown)))
        _draw_references(axes, references)
        if trained_loops is not None:
            axes.axvline(trained_loops, color="#D9D9D9", linewidth=6, zorder=0.9)
            axes.text(
                trained_loops,
                1.01,
                f"mean loops in training: {trained_loops:g}",
                transform=axes.get_xaxis_transform(),
                color=GREY,
                horizontalalignment="center",
                verticalalignment="bottom",
            )
        columns = max(1, _LEGEND_WIDTH // (max(map(len, curves)) + 8))
        figure.legend(loc="outside upper left", ncols=columns, alignment="left", columnspacing=1.5)
    return figure


def save_figure(figure: Figure, path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write the figure as PNG and its data, `rows`, as CSV: both files or neither.

    The columns are the keys of the rows in order of appearance.
    """
    require(path.suffix == ".png", "path", str(path), "must end in .png")
    if not rows:
        raise ValueError("rows: a figure is saved with the rows that it shows")
    columns = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    with replacing(path.with_suffix(".csv")) as table, replacing(path) as image:
        with open(table, "x", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        with style():
            # No matplotlib version in the file, so that equal figures give identical files.
            figure.savefig(image, format="png", dpi=_DPI, metadata={"Software": None})


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Apply the figure style within the block."""
    try:
        import matplotlib.style
    except ImportError as error:
        raise ConfigError(f"a figure {needs('plots')}") from error
    # Starts from matplotlib's defaults, not from the user's settings file.
    with matplotlib.style.context(_STYLE, after_reset=True):
        yield


def new_figure() -> Figure:
    """A figure without axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure()
    FigureCanvasAgg(figure)
    return figure


def looks() -> Iterator[dict[str, Any]]:
    """Colours and markers of successive lines; once all colours are used, also other dashes."""
    markers = itertools.cycle(_MARKERS)
    for dashes in itertools.cycle(("-", "--", ":", "-.")):
        for colour in COLOURS:
            yield {"color": colour, "marker": next(markers), "linestyle": dashes}


def _tints(colour: str, count: int) -> list[tuple[float, float, float]]:
    """`count` tints of a colour, from pale to the colour itself."""
    from matplotlib.colors import to_rgb

    shares = [1 - 0.75 * (count - 1 - i) / max(1, count - 1) for i in range(count)]
    red, green, blue = to_rgb(colour)
    return [(1 - s + s * red, 1 - s + s * green, 1 - s + s * blue) for s in shares]


def _finite(value: float | int) -> float:
    return float(value) if math.isfinite(value) else math.nan


def _count_finite(points: Points) -> int:
    return sum(math.isfinite(value) for _, value in points)


def _smoothed(values: Sequence[float]) -> list[float]:
    """Exponential moving average; its horizon grows with the number of values: no lag at first."""
    smoothed: list[float] = []
    average, count = 0.0, 0
    for value in values:
        if math.isfinite(value):
            average += (value - average) / max(1, _HORIZON * count)
            count += 1
        smoothed.append(average if math.isfinite(value) else math.nan)
    return smoothed


def _short_number(value: float | int, _position: object = None) -> str:
    """Format 1500000 as 1.5M and 1e9 as 1B."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{letter}"
    return f"{value:g}"


def _loop_axis(axes: Any, loops: Sequence[int], marks: Sequence[float | int]) -> None:
    """Ticks at the powers of two within ``marks``; if there are fewer than two, at ``loops``."""
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    powers = [2**i for i in range(int(max(marks)).bit_length()) if 2**i >= min(marks)]
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(marks) / 1.2, max(marks) * 1.2)
    axes.xaxis.set_major_locator(FixedLocator(powers if len(powers) > 1 else list(loops)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _y_range(values: Iterable[float | int]) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    centre = (min(finite) + max(finite)) / 2
    half = max(max(finite) - min(finite), _MIN_Y_SPAN) / 2 * 1.08
    return centre - half, centre + half


def _draw_references(axes: Any, references: Mapping[str, float | int]) -> None:
    """Dashed lines, labelled at the right: the highest label above its line, the others below."""
    beside = axes.get_yaxis_transform()
    for name, value in references.items():
        place = "bottom" if value == max(references.values()) else "top"
        axes.axhline(value, color=GREY, linewidth=1.2, linestyle=(0, (5, 3)), zorder=1.5)
        axes.text(1.01, value, name, color=GREY, transform=beside, verticalalignment=place)
