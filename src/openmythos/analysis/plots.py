"""The figures, in one style: data in, ``Figure`` out; nothing is computed, no window is opened.

The only file that knows matplotlib, which it imports when a figure is drawn: without that extra
the module can still be imported.
"""

import contextlib
import csv
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from openmythos.config import ConfigError, needs, require
from openmythos.files import replacing

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure
    import matplotlib.lines

# Okabe and Ito's, which colour-blind readers can tell apart; their yellow is too faint for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
# One more than the colours: a colour that comes again has another marker.
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
# A smoothed point averages about the last twentieth of what came before it.
_HORIZON = 0.05
_LOG_SPAN = 1000
_MIN_Y_SPAN = 0.1
# One line of text beside the axes, as a share of their height.
_LABEL_HEIGHT = 0.065
# In characters.
_LEGEND_WIDTH = 80


def loss_curve(
    series: Mapping[str, Sequence[tuple[float | int, float | int]]],
    *,
    x_label: str = "training tokens",
    y_label: str = "cross-entropy [nats / token]",
) -> "matplotlib.figure.Figure":
    """Every run's (x, loss) points as a faint line and smoothed exponentially as a bold one.

    x is logarithmic where it spans three decades or more. A loss that is not finite leaves a gap.
    """
    xs = [x for points in series.values() for x, _ in points]
    if not xs or not all(series.values()):
        raise ValueError(f"series of {[len(points) for points in series.values()]} points: no line")
    with style():
        figure, axes = new_axes(x_label, y_label)
        for look, (name, points) in zip(looks(), series.items(), strict=False):
            draw_smoothed(axes, points, look, name)
        if min(xs) > 0 and max(xs) >= _LOG_SPAN * min(xs):
            axes.set_xscale("log")
        axes.xaxis.set_major_formatter(short_number)
        _legend(figure, series, title=smoothing_title(series.values()))
    return figure


def loss_against_loops(
    curves: Mapping[str, Mapping[int, float | int]],
    *,
    references: Mapping[str, float | int] = MappingProxyType({}),
    trained_loops: float | int | None = None,
    y_label: str = "held-out bits per byte",
) -> "matplotlib.figure.Figure":
    """Each curve's value by ``num_loops``, beside constants to compare with.

    The y axis holds every value and at least 0.1, lest noise look like an effect. A value that is
    not finite leaves a gap.
    """
    loops = sorted({loop for curve in curves.values() for loop in curve})
    if not loops or not all(curves.values()):
        raise ValueError(f"curves of {[len(curve) for curve in curves.values()]} points: no line")
    marks = [*loops, *([] if trained_loops is None else [trained_loops])]
    if min(marks) < 1:
        raise ValueError(f"num_loops = {min(marks)}: the log axis begins at 1")
    with style():
        figure, axes = new_axes("num_loops", y_label)
        for look, (name, curve) in zip(looks(), curves.items(), strict=False):
            values = [_finite(curve[loop]) for loop in sorted(curve)]
            axes.plot(sorted(curve), values, **look, linewidth=2, markersize=6, label=name)
        _loop_axis(axes, loops, marks)
        shown = [*(curve.values() for curve in curves.values()), references.values()]
        axes.set_ylim(_y_range(itertools.chain.from_iterable(shown)))
        _draw_references(axes, references)
        if trained_loops is not None:
            _draw_trained_loops(axes, trained_loops)
        _legend(figure, curves)
    return figure


def speed_ratios(
    panels: Mapping[str, Mapping[str, Mapping[str, float | int]]], *, reference: str
) -> "matplotlib.figure.Figure":
    """Bars per panel, figure and contender: how many times as fast as the reference, log scale."""
    if not panels or not all(panels.values()):
        raise ValueError("panels: no bar to draw")
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    names = list(dict.fromkeys(n for bars in panels.values() for r in bars.values() for n in r))
    colours = dict(zip(names, itertools.cycle(COLOURS), strict=False))
    highest = max(x for bars in panels.values() for r in bars.values() for x in r.values())
    lowest = min(x for bars in panels.values() for r in bars.values() for x in r.values())
    with style():
        figure = new_figure()
        columns = min(2, len(panels))
        rows = math.ceil(len(panels) / columns)
        tall = 0.125 * (len(names) + 1) * max(map(len, panels.values()))
        figure.set_size_inches(4.6 * columns + 1, max(3.1, tall) * rows + 0.9)
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, (title, bars) in zip(grid.flat, panels.items(), strict=False):
            height = 0.8 / len(names)
            for line, ratios in enumerate(bars.values()):
                for place, name in enumerate(names):
                    if name not in ratios:
                        continue
                    y = line + (place - (len(names) - 1) / 2) * height
                    axes.barh(y, ratios[name], height, color=colours[name], label=name)
                    text = f" {ratios[name]:.1f}x"
                    axes.text(ratios[name], y, text, verticalalignment="center", fontsize=8)
            axes.set_title(title, fontsize=10.5, loc="left")
            axes.set_yticks(range(len(bars)), list(bars))
            axes.axvline(1, color=GREY, linewidth=1.2)
            axes.grid(visible=False, axis="y")
            axes.set_xscale("log", base=2)
            axes.set_xlim(min(1, lowest) / 1.3, highest * 1.7)
            powers = [2.0**i for i in range(-6, 8) if lowest / 2 <= 2.0**i <= 1.5 * highest]
            axes.xaxis.set_major_locator(FixedLocator(powers))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}x"))
            axes.xaxis.set_minor_locator(NullLocator())
        grid[0][0].invert_yaxis()
        for unused in grid.flat[len(panels) :]:
            figure.delaxes(unused)
        figure.supxlabel(f"times as fast as {reference} (line: equal)", fontsize=11)
        handles, labels = grid[0][0].get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        figure.legend(
            list(unique.values()), list(unique), loc="outside upper left", ncols=2 * columns
        )
    return figure


def cost_lines(
    panels: Mapping[str, Mapping[str, Mapping[float | int, float | int]]],
    *,
    y_labels: Sequence[str],
    x_names: Sequence[str] = (),
    logarithmic: bool = True,
) -> "matplotlib.figure.Figure":
    """One panel per x quantity: lines of a cost against it, with a y label per panel.

    `x_names` are written at x = 0, 1, ... in place of numbers.
    """
    if not panels or not all(panels.values()):
        raise ValueError("panels: no line to draw")
    from matplotlib.ticker import NullLocator, StrMethodFormatter

    plain = StrMethodFormatter("{x:g}")
    with style():
        figure = new_figure()
        figure.set_size_inches(4.2 * len(panels) + 0.6, 3.8)
        row = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, label, (x_label, lines) in zip(row, y_labels, panels.items(), strict=True):
            for look, (name, points) in zip(looks(), lines.items(), strict=False):
                xs = sorted(points)
                axes.plot(xs, [points[x] for x in xs], **look, linewidth=2, label=name)
            xs = sorted({x for points in lines.values() for x in points})
            if logarithmic:
                axes.set_yscale("log", base=2)
                axes.yaxis.set_major_formatter(plain)
            if logarithmic and not x_names:
                axes.set_xscale("log", base=2)
            if not logarithmic:
                axes.set_ylim(bottom=0)
            axes.set_xticks(xs, list(x_names) if x_names else [f"{x:g}" for x in xs])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel(x_label)
            axes.set_ylabel(label)
            axes.legend(fontsize=9)
    return figure


def save_figure(
    figure: "matplotlib.figure.Figure", path: Path, rows: Sequence[Mapping[str, object]]
) -> None:
    """Write the figure as PNG and, beside it, the rows it shows as CSV: both or neither.

    The columns are the rows' keys in order of appearance; what a row lacks stays empty.
    """
    require(path.suffix == ".png", "path", str(path), "must end in .png")
    if not rows:
        raise ValueError("rows: a figure is saved with what it shows")
    columns = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    with replacing(path.with_suffix(".csv")) as table, replacing(path) as image:
        with open(table, "x", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        with style():
            # Without the version of matplotlib, so that equal pictures are equal files.
            figure.savefig(image, format="png", dpi=_DPI, metadata={"Software": None})


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The look of every figure, while it is drawn."""
    try:
        import matplotlib.style
    except ImportError as error:
        raise ConfigError(f"a figure {needs('plots')}") from error
    # From matplotlib's defaults, not from the settings file of whoever draws.
    with matplotlib.style.context(_STYLE, after_reset=True):
        yield


def new_figure() -> "matplotlib.figure.Figure":
    """A figure without axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure()
    FigureCanvasAgg(figure)
    return figure


def new_axes(x_label: str, y_label: str) -> "tuple[matplotlib.figure.Figure, matplotlib.axes.Axes]":
    """A figure with one pair of axes."""
    figure = new_figure()
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return figure, axes


def draw_smoothed(
    axes: "matplotlib.axes.Axes",
    points: Sequence[tuple[float | int, float | int]],
    look: Mapping[str, Any],
    name: str,
) -> "matplotlib.lines.Line2D":
    """Points as a faint line and, in front, smoothed as a bold one; returns that."""
    values = [_finite(value) for _, value in points]
    positions = [x for x, _ in points]
    axes.plot(positions, values, color=look["color"], linewidth=0.8, alpha=0.4)
    return draw_line(axes, points, look, name)


def draw_line(
    axes: "matplotlib.axes.Axes",
    points: Sequence[tuple[float | int, float | int]],
    look: Mapping[str, Any],
    name: str,
) -> "matplotlib.lines.Line2D":
    """Points smoothed, as a bold line; a single one, which has no line, as a marker."""
    values = [_finite(value) for _, value in points]
    marker = look.get("marker", "o") if sum(map(math.isfinite, values)) == 1 else ""
    # Above the raw lines of all others, or theirs would hide it.
    bold = {"linewidth": 2, "zorder": 2.5, **look, "marker": marker}
    return axes.plot([x for x, _ in points], _smoothed(values), **bold, label=name)[0]


def smoothing_title(
    series: Iterable[Sequence[tuple[float | int, float | int]]],
) -> str:
    """What a legend says of bold and faint lines: nothing where too few points leave them equal."""
    longest = max(sum(math.isfinite(value) for _, value in points) for points in series)
    return "bold: smoothed, faint: raw" if longest * _HORIZON > 1 else ""


def looks() -> Iterator[dict[str, Any]]:
    """What tells lines apart: colour, marker and, once the colours are used up, dashes."""
    markers = itertools.cycle(_MARKERS)
    for dashes in itertools.cycle(("-", "--", ":", "-.")):
        for colour in COLOURS:
            yield {"color": colour, "marker": next(markers), "linestyle": dashes}


def tints(colour: str, count: int) -> list[tuple[float, float, float]]:
    """A colour from pale to itself, in so many steps."""
    from matplotlib.colors import to_rgb

    shares = [1 - 0.75 * (count - 1 - i) / max(1, count - 1) for i in range(count)]
    red, green, blue = to_rgb(colour)
    return [(1 - s + s * red, 1 - s + s * green, 1 - s + s * blue) for s in shares]


def _legend(figure: "matplotlib.figure.Figure", names: Iterable[str], title: str = "") -> None:
    """Above the axes, where no data is, in as many columns as the names leave room for."""
    columns = max(1, _LEGEND_WIDTH // (max(map(len, names)) + 8))
    legend = figure.legend(
        loc="outside upper left", ncols=columns, title=title, alignment="left", columnspacing=1.5
    )
    legend.get_title().set_color(GREY)


def _finite(value: float | int) -> float:
    return float(value) if math.isfinite(value) else math.nan


def _smoothed(values: Sequence[float]) -> list[float]:
    """An exponential average whose horizon grows with what it has seen: no lag at the start."""
    smoothed: list[float] = []
    average, seen = 0.0, 0
    for value in values:
        if math.isfinite(value):
            average += (value - average) / max(1, _HORIZON * seen)
            seen += 1
        smoothed.append(average if math.isfinite(value) else math.nan)
    return smoothed


def short_number(value: float | int, _position: object = None) -> str:
    """1500000 as 1.5M; matplotlib's own formatter would write 1e9 as 1G."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{letter}"
    return f"{value:g}"


def _loop_axis(
    axes: "matplotlib.axes.Axes", loops: Sequence[int], marks: Sequence[float | int]
) -> None:
    """Ticks at the powers of two within ``marks``; where those are too few, at ``loops``."""
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


def _draw_references(axes: "matplotlib.axes.Axes", references: Mapping[str, float | int]) -> None:
    """Dashed lines named beside the axes, the names moved apart where lines are close."""
    low, high = axes.get_ylim()
    names = sorted(references, key=lambda name: references[name])
    places = _apart([float(references[name]) for name in names], (high - low) * _LABEL_HEIGHT)
    beside = axes.get_yaxis_transform()
    for name, place in zip(names, places, strict=True):
        axes.axhline(references[name], color=GREY, linewidth=1.2, linestyle=(0, (5, 3)), zorder=1.5)
        axes.text(1.01, place, name, color=GREY, transform=beside, verticalalignment="center")


def _apart(values: Sequence[float], gap: float) -> list[float]:
    """Ascending values at least a gap apart: those too close are spread about their mean."""
    groups: list[list[float]] = []
    for value in values:
        groups.append([value])
        while len(groups) > 1 and _spread(groups[-1], gap)[0] - _spread(groups[-2], gap)[-1] < gap:
            last = groups.pop()
            groups[-1] += last
    return [place for group in groups for place in _spread(group, gap)]


def _spread(group: Sequence[float], gap: float) -> list[float]:
    lowest = sum(group) / len(group) - gap * (len(group) - 1) / 2
    return [lowest + i * gap for i in range(len(group))]


def _draw_trained_loops(axes: "matplotlib.axes.Axes", trained_loops: float | int) -> None:
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
