"""The figures of the studies: data in, figure out, in the style of `plots`.

Where there is a value per seed, the mean is drawn with the range.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from openmythos.analysis.plots import COLOURS, GREY, looks, new_axes, new_figure, style

Figure = Any  # matplotlib's, which only `plots` knows


def hops_against_loops(
    grid: Mapping[int, Mapping[int, float | int]],
    lines: Mapping[str, Mapping[int, Sequence[float | int]]],
    *,
    trained_hops: int,
) -> Figure:
    """Left: accuracy of one model by hops and num_loops. Right: the best of each arm by hops.

    `lines` holds a value per seed: drawn are their mean and their range.
    """
    if not grid or not lines:
        raise ValueError("grid, lines: nothing to draw")
    hops, loops = sorted(grid), sorted({loop for row in grid.values() for loop in row})
    with style():
        figure = new_figure()
        figure.set_size_inches(11.0, 5.1)
        left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
        cells = [[100 * grid[hop].get(loop, math.nan) for loop in loops] for hop in hops]
        image = left.imshow(cells, origin="lower", aspect="auto", cmap="cividis", vmin=0, vmax=100)
        for y, row in enumerate(cells):
            for x, value in enumerate(row):
                colour = "black" if value > 60 else "white"
                left.text(x, y, f"{value:.0f}", color=colour, ha="center", va="center", fontsize=7)
        left.set_xticks(range(len(loops)), [str(loop) for loop in loops])
        left.set_yticks(range(len(hops)), [str(hop) for hop in hops])
        left.axhline(sum(hop <= trained_hops for hop in hops) - 0.5, color="white", linewidth=2)
        left.set_xlabel("num_loops at inference")
        left.set_ylabel(f"hops (line: trained up to {trained_hops})")
        left.grid(visible=False)
        figure.colorbar(image, ax=left, label="accuracy [%]", pad=0.02)
        _mean_and_range(right, lines, 100)
        right.axvline(trained_hops, color="#D9D9D9", linewidth=6, zorder=0.9)
        right.set_xlabel("hops (grey: the longest trained)")
        right.set_ylabel("accuracy at the best num_loops [%]")
        right.set_ylim(-3, 103)
        handles, labels = right.get_legend_handles_labels()
        columns = math.ceil(len(labels) / 2)
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9)
    return figure


def loops_against_hops(
    loops: Mapping[str, Mapping[int, Sequence[float | int]]],
    accuracies: Mapping[str, Mapping[int, Sequence[float | int]]],
    *,
    trained_hops: int,
) -> Figure:
    """Left: mean loops used by hops, per rule; dashed, as many loops as hops. Right: accuracy.

    A value per seed: drawn are their mean and their range.
    """
    if not loops or not accuracies:
        raise ValueError("loops, accuracies: nothing to draw")
    with style():
        figure = new_figure()
        figure.set_size_inches(11.0, 4.6)
        left, right = figure.subplots(1, 2)
        for axes, lines, scale in ((left, loops, 1), (right, accuracies, 100)):
            _mean_and_range(axes, lines, scale)
            axes.axvline(trained_hops, color="#D9D9D9", linewidth=6, zorder=0.9)
            axes.set_xlabel("hops (grey: the longest trained)")
        hops = sorted({hop for points in loops.values() for hop in points})
        left.plot(hops, hops, color=GREY, linewidth=1.2, linestyle=(0, (5, 3)))
        left.set_ylabel("mean loops used (dashed: as many as hops)")
        right.set_ylabel("accuracy [%]")
        right.set_ylim(-3, 103)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=4)
    return figure


def line_panels(
    panels: Mapping[str, Mapping[str, Mapping[Any, Sequence[float | int]]]],
    *,
    x_labels: Sequence[str],
    y_labels: Sequence[str],
    log_x: bool = False,
    log_y: Sequence[bool] = (),
    percent: bool = False,
) -> Figure:
    """Side by side: lines of values against x, with titles; `percent` shows shares as percent."""
    if not panels:
        raise ValueError("panels: nothing to draw")
    with style():
        figure = new_figure()
        figure.set_size_inches(4.2 * len(panels) + 0.6, 3.9)
        row = figure.subplots(1, len(panels), sharey=percent, squeeze=False)[0]
        for place, (axes, (title, lines)) in enumerate(zip(row, panels.items(), strict=True)):
            _mean_and_range(axes, lines, 100 if percent else 1)
            axes.set_title(title, fontsize=10.5, loc="left")
            axes.set_xlabel(x_labels[place % len(x_labels)])
            axes.set_ylabel(y_labels[place % len(y_labels)])
            if percent:
                axes.set_ylim(-3, 103)
            if log_x:
                _log_x(axes, {x for points in lines.values() for x in points})
            if place < len(log_y) and log_y[place]:
                axes.set_yscale("log")
        row[0].legend(fontsize=9)
    return figure


def _log_x(axes: Any, xs: set[Any]) -> None:
    """Whole numbers, such as loops, at powers of two and as they are written."""
    whole = all(isinstance(x, int) for x in xs)
    axes.set_xscale("log", base=2 if whole else 10)
    if whole:
        axes.xaxis.set_major_formatter("{x:g}")


def _mean_and_range(
    axes: Any, lines: Mapping[str, Mapping[Any, Sequence[float | int]]], scale: int
) -> None:
    """A line per name through the means of the values at each x, and their range."""
    for look, (name, points) in zip(looks(), lines.items(), strict=False):
        xs = sorted(points)
        means = [scale * sum(points[x]) / len(points[x]) for x in xs]
        axes.plot(xs, means, **look, linewidth=2, label=name)
        low = [scale * min(points[x]) for x in xs]
        high = [scale * max(points[x]) for x in xs]
        axes.fill_between(xs, low, high, color=look["color"], alpha=0.15, linewidth=0)


def effects(
    bars: Mapping[str, tuple[float | int, float | int, Sequence[float | int]]], *, x_label: str
) -> Figure:
    """Per name a mean, the half width of its interval (nan: none) and single values, about zero."""
    if not bars:
        raise ValueError("bars: no effect to draw")
    with style():
        figure, axes = new_axes(x_label, "")
        figure.set_size_inches(7.5, 0.32 * len(bars) + 1.1)
        for line, (mean, half, values) in enumerate(bars.values()):
            axes.plot(values, [line] * len(values), "o", color=GREY, markersize=3, alpha=0.6)
            half = 0.0 if math.isnan(half) else half
            axes.errorbar(
                mean, line, xerr=half, color=COLOURS[0], marker="o", markersize=7, capsize=4
            )
        axes.set_yticks(range(len(bars)), list(bars))
        axes.axvline(0, color=GREY, linewidth=1.2)
        axes.grid(visible=False, axis="y")
        axes.invert_yaxis()
    return figure
