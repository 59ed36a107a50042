"""Figures of the benchmarks, in the style of ``openmythos.analysis.plots``."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from openmythos.analysis.plots import COLOURS, GREY, looks, new_figure, style

Figure = Any  # matplotlib's


def speed_ratios(
    panels: Mapping[str, Mapping[str, Mapping[str, float | int]]], *, reference: str
) -> Figure:
    """Speed relative to the reference on a log scale: bars by panel, measure and contender."""
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
        for number in range(len(panels), rows * columns):
            figure.delaxes(grid.flat[number])
            grid.flat[number - columns].tick_params(labelbottom=True)
        figure.supxlabel(f"times as fast as {reference} (line: equal)", fontsize=11)
        unique: dict[str, Any] = {}
        for axes in figure.axes:
            handles, labels = axes.get_legend_handles_labels()
            unique |= dict(zip(labels, handles, strict=True))
        figure.legend(
            list(unique.values()), list(unique), loc="outside upper left", ncols=2 * columns
        )
    return figure


def time_bars(cases: Mapping[str, Any]) -> Figure:
    """A panel per case: a bar of stacked parts before and after, in ms, with lower bounds.

    A case holds "parts", seconds by part for each bar, and "bounds", seconds by name.
    """
    parts = list(dict.fromkeys(p for c in cases.values() for b in c["parts"].values() for p in b))
    colours = dict(zip(parts, itertools.cycle(COLOURS), strict=False))
    with style():
        figure = new_figure()
        columns = min(2, len(cases))
        rows = math.ceil(len(cases) / columns)
        figure.set_size_inches(4.6 * columns + 0.6, 1.7 * rows + 1.0)
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, (title, case) in zip(grid.flat, cases.items(), strict=False):
            for line, (_, bar) in enumerate(case["parts"].items()):
                left = 0.0
                for part in parts:
                    width = 1e3 * bar.get(part, 0.0)
                    axes.barh(line, width, 0.62, left=left, color=colours[part], label=part)
                    left += width
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # above the bounds
                text = f" {left:.3g} ms"
                axes.text(left, line, text, verticalalignment="center", fontsize=9, bbox=box)
            for (name, seconds), dash in zip(case["bounds"].items(), ("-", ":"), strict=True):
                axes.axvline(1e3 * seconds, color="black", linestyle=dash, label=f"bound: {name}")
            axes.set_yticks(range(len(case["parts"])), list(case["parts"]))
            axes.invert_yaxis()
            axes.set_xlim(0, 1.18 * axes.get_xlim()[1])
            axes.grid(visible=False, axis="y")
            axes.set_title(title, fontsize=10.5, loc="left")
        for unused in grid.flat[len(cases) :]:
            figure.delaxes(unused)
        figure.supxlabel("milliseconds per decoded token of every row", fontsize=11)
        handles, labels = grid[0][0].get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        figure.legend(list(unique.values()), list(unique), loc="outside upper left", ncols=3)
    return figure


def cost_lines(
    panels: Mapping[str, Mapping[str, Mapping[float | int, float | int]]],
    *,
    y_labels: Sequence[str],
    x_names: Sequence[str] = (),
    logarithmic: bool = True,
) -> Figure:
    """Lines of a cost against x: a panel per x quantity, each with its y label.

    `x_names` are tick labels at x = 0, 1, ... in place of the numbers.
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
