"""Figures of the studies, in the style of `plots`.

Values of several seeds are drawn as their mean and range.
"""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from openmythos.analysis.plots import GREY, looks, new_figure, style

Figure = Any  # matplotlib's, which only `plots` imports
MOST_MARKERS = 20  # on a line
LONG_LEGEND = 9  # names; a longer one finds no room in a panel
DIGIT = 0.03  # of the axis: width of a digit of a tick's label, with room around
TRAINED = {"color": "#D9D9D9", "linewidth": 6, "zorder": 0.9}  # marks the trained range


class Lines(dict[str, dict[Any, list[float]]]):
    """Values of all seeds, by line and x."""

    def add(self, line: str, x: float | str, value: float) -> None:
        self.setdefault(line, {}).setdefault(x, []).append(value)


class Panels(dict[str, Lines]):
    """Values of all seeds, by panel, line and x; panels in the order in which they are named."""

    def add(self, panel: str, line: str, x: float | str, value: float) -> None:
        self.setdefault(panel, Lines()).add(line, x, value)


def hops_against_loops(
    grid: Mapping[int, Mapping[int, float | int]],
    lines: Mapping[str, Mapping[int, Sequence[float | int]]],
    *,
    trained_hops: int,
) -> Figure:
    """Left: accuracy of a model by hops and num_loops. Right: each arm's best accuracy by hops."""
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
        right.axvline(trained_hops, **TRAINED)
        right.set_xlabel("hops (grey: longest trained; bands: min to max of seeds)", fontsize=10)
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
    spare: int,
) -> Figure:
    """Left: loops used minus hops, per exit rule, and their limit `spare`. Right: accuracy by hops.

    Only means are drawn: the ranges of so many rules would overlap.
    """
    beyond = {
        name: {hop: [used - hop for used in values] for hop, values in points.items()}
        for name, points in loops.items()
    }
    with style():
        figure, (left, right) = _row(2, 11.0, 5.2, False)
        for axes, lines, scale in ((left, beyond, 1), (right, accuracies, 100)):
            _mean_and_range(axes, lines, scale, bands=False)
            axes.axvline(trained_hops, **TRAINED)
            axes.set_xlabel("hops (grey: the longest trained)")
        left.axhline(spare, color=GREY, linewidth=1.2, linestyle=(0, (5, 3)))
        left.set_ylim(-17, 17)
        left.set_ylabel(f"mean loops used minus hops (dashed: {spare}, the bar)", fontsize=10)
        right.set_ylabel("accuracy, mean over seeds [%]", fontsize=10)
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
    percent: bool = False,
    same_y: bool = False,
    laws: Collection[str] = (),
    note: str = "",
) -> Figure:
    """Panels side by side: lines of values against x; `percent` shows fractions as percent.

    Where x are names, a panel has a dot per value. `laws`: lines that are computed, not measured;
    they are dashed. `note`: a line of text below. A panel gets its own legend if its lines are not
    the first ones of the first panel, whose legend, if long or of dots alone, is beside all panels.
    """
    one = next(iter(panels.values()))
    first, only_dots = list(one), all(isinstance(x, str) for points in one.values() for x in points)
    beside = len(first) > LONG_LEGEND or (only_dots and len(panels) == 1)
    with style():
        width = 4.2 * len(panels) + (2.8 if beside else 0.6)
        figure, row = _row(len(panels), width, 3.9, percent or same_y)
        for place, (axes, (title, lines)) in enumerate(zip(row, panels.items(), strict=True)):
            xs = list(dict.fromkeys(x for points in lines.values() for x in points))
            if all(isinstance(x, str) for x in xs):
                _strips(axes, lines, xs)
            else:
                _mean_and_range(axes, lines, 100 if percent else 1, laws=laws)
                _x_ticks(axes, sorted(xs), log=log_x)
            axes.set_title(title, fontsize=10.5, loc="left")
            axes.set_xlabel(x_labels[place % len(x_labels)])
            axes.set_ylabel(y_labels[place % len(y_labels)])
            if percent:
                axes.set_ylim(-3, 103)
            if place == 0 and beside:
                figure.legend(*axes.get_legend_handles_labels(), fontsize=9, loc="outside right")
            elif place == 0 or list(lines) != first[: len(lines)]:
                axes.legend(fontsize=9)
        if note:
            figure.supxlabel(note, fontsize=9, color=GREY)
    return figure


def dot_panels(
    panels: Mapping[str, Mapping[str, Mapping[str, Sequence[float | int]]]],
    *,
    order: Sequence[str],
    x_label: str,
    y_label: str,
) -> Figure:
    """Panels side by side: a dot per value, by kind and category."""
    with style():
        figure, row = _row(len(panels), 4.6 * len(panels) + 0.6, 3.9, True)
        for axes, (title, kinds) in zip(row, panels.items(), strict=True):
            _strips(axes, kinds, order, beside=False)
            axes.set_title(title, fontsize=10.5, loc="left")
            axes.set_xlabel(x_label)
        row[0].set_ylabel(y_label)
        if len({kind for kinds in panels.values() for kind in kinds}) > 1:
            row[0].legend(fontsize=9)
    return figure


def stability(
    loss: Mapping[str, Mapping[float, Sequence[float | int]]],
    radii: Mapping[str, Mapping[float, Sequence[float | int]]],
    sizes: Mapping[float, Mapping[str, Sequence[Mapping[int, float | None]]]],
    *,
    trained_loops: int,
) -> Figure:
    """Top: final loss and spectral radius of every run, by name and learning rate. Bottom: a panel
    per rate with the RMS of the state by loops, a line per run. A hollow mark at the top: None."""
    rates = sorted(sizes)
    with style():
        figure = new_figure()
        figure.set_size_inches(11.0, 7.4)
        names = [f"{rate:g}" for rate in rates]
        top_row = ["loss"] * len(rates) + ["rho"] * len(rates)
        wide: Any = [top_row, [name for name in names for _ in range(2)]]
        axes_of = figure.subplot_mosaic(wide)
        left, right = axes_of["loss"], axes_of["rho"]
        _strips(left, loss, rates)
        left.set_ylabel("final loss [nats / token]")
        _strips(right, radii, rates)
        for axes in (left, right):
            axes.set_xlabel("learning rate (a dot per run)")
        right.set_yscale("log")
        right.axhline(1, color=GREY, linewidth=1.2)
        right.set_ylabel("spectral radius rho (line: 1)")
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
        finite = [
            size
            for runs in sizes.values()
            for run in itertools.chain.from_iterable(runs.values())
            for size in run.values()
            if size is not None
        ]
        low, top = 0.3 * min(finite), 30 * max(finite)
        for number, (name, rate) in enumerate(zip(names, rates, strict=True)):
            axes = axes_of[name]
            _state_sizes(axes, sizes[rate], top)
            axes.axvline(trained_loops, color="#D9D9D9", linewidth=5, zorder=0.9)
            axes.set_title(f"learning rate {name}", fontsize=10.5, loc="left")
            axes.set_ylim(low, 3 * top)
            axes.tick_params(labelleft=number == 0)
        axes_of[names[0]].set_ylabel("RMS of the state, a line per run")
        text = (
            f"Grey: mean loops in training ({trained_loops}). Hollow, at the top: overflows fp32."
        )
        figure.supxlabel(text, fontsize=9, color=GREY)
    return figure


def _state_sizes(
    axes: Any, runs: Mapping[str, Sequence[Mapping[int, float | None]]], top: float
) -> None:
    """A line per run against loops; None is a hollow mark at `top`."""
    for place, (look, each) in enumerate(zip(looks(), runs.values(), strict=False)):
        colour = look["color"]
        width = 1.0 if place else 2.2  # so that the first line can be seen behind others
        for run in each:
            known = [(n, size) for n, size in sorted(run.items()) if size is not None]
            axes.plot(*zip(*known, strict=True), color=colour, linewidth=width)
            if lost := [n for n in sorted(run) if run[n] is None]:
                hollow = {"color": colour, "markerfacecolor": "white"}
                axes.plot(lost, [top] * len(lost), look["marker"], **hollow)
    axes.set_yscale("log")
    axes.set_xlabel("num_loops")
    _log_x(axes, {n for each in runs.values() for run in each for n in run})


def _row(count: int, width: float, height: float, sharey: bool) -> tuple[Figure, Any]:
    """A figure with `count` panels side by side; size in inches."""
    figure = new_figure()
    figure.set_size_inches(width, height)
    return figure, figure.subplots(1, count, sharey=sharey, squeeze=False)[0]


def _strips(
    axes: Any,
    groups: Mapping[str, Mapping[Any, Sequence[float | int]]],
    xs: Sequence[Any],
    *,
    beside: bool = True,
) -> None:
    """A dot per value in a column per x; `beside` puts the groups next to each other."""
    width = 0.8 / len(groups) if beside else 0.5
    for place, (look, (name, points)) in enumerate(zip(looks(), groups.items(), strict=False)):
        middle = (place - (len(groups) - 1) / 2) * width if beside else 0.0
        placed = [
            (number + middle + width * 0.5 * (k / max(1, len(values) - 1) - 0.5), value)
            for number, x in enumerate(xs)
            for values in [points.get(x, [])]
            for k, value in enumerate(values)
        ]
        dots = {"color": look["color"], "markersize": 4, "alpha": 0.7}
        axes.plot(*zip(*placed, strict=True), look["marker"], **dots, label=name)
    axes.set_xticks(range(len(xs)), [x if isinstance(x, str) else f"{x:g}" for x in xs])
    axes.grid(visible=False, axis="x")


def _x_ticks(axes: Any, xs: Sequence[float], *, log: bool) -> None:
    """Ticks at the data if they are few and far enough apart; a log axis has its own."""
    if log:
        _log_x(axes, set(xs))
        return
    room = DIGIT * (xs[-1] - xs[0]) * max(len(f"{x:g}") for x in xs)
    if all(b - a > room for a, b in itertools.pairwise(xs)):
        axes.set_xticks(xs)


def _log_x(axes: Any, xs: set[Any]) -> None:
    """A log axis; integers, such as loops, get ticks at powers of two."""
    integers = all(isinstance(x, int) for x in xs)
    axes.set_xscale("log", base=2 if integers else 10)
    if integers:
        axes.xaxis.set_major_formatter("{x:g}")


def _mean_and_range(
    axes: Any,
    lines: Mapping[str, Mapping[Any, Sequence[float | int]]],
    scale: int,
    *,
    bands: bool = True,
    laws: Collection[str] = (),
) -> None:
    """A line per name through the means at each x, and a band for the range."""
    for look, (name, points) in zip(looks(), lines.items(), strict=False):
        xs = sorted(points)
        means = [scale * sum(points[x]) / len(points[x]) for x in xs]
        if name in laws:
            dashed = {"color": look["color"], "linestyle": "--", "zorder": 2.5}
            axes.plot(xs, means, **dashed, linewidth=1.5, label=name)
            continue
        every = math.ceil(len(xs) / MOST_MARKERS)
        axes.plot(xs, means, **look, linewidth=2, markevery=every, label=name)
        if bands:
            low = [scale * min(points[x]) for x in xs]
            high = [scale * max(points[x]) for x in xs]
            axes.fill_between(xs, low, high, color=look["color"], alpha=0.15, linewidth=0)
