"""Metrics of training runs, compared: a panel per metric, in the style of `plots`."""

from collections.abc import Mapping, Sequence
from typing import Any

from openmythos.analysis.plots import (
    GREY,
    draw_line,
    draw_smoothed,
    looks,
    new_figure,
    short_number,
    smoothing_title,
    style,
    tints,
)

Figure = Any  # matplotlib's, which only `plots` imports
Points = Sequence[tuple[float, float]]
Lines = Mapping[str, Points]  # of one run and metric: one line, or one per item of a list
_PANEL, _LINE = 3.2, 0.23  # height in inches of a panel and of a line of the legend


def metric_curves(
    panels: Mapping[str, Mapping[str, Lines]], *, x_label: str, single: bool = False
) -> Figure:
    """(x, value) of each metric and run, as a faint line and smoothed as a bold one.

    A list, such as a value per loop, gets a line per item from pale to dark; the first and the last
    are named. A run has one colour in all panels and one line of the legend, which `single` omits.
    """
    runs = list(dict.fromkeys(name for series in panels.values() for name in series))
    drawn = [p for series in panels.values() for lines in series.values() for p in lines.values()]
    if not runs or not all(drawn):
        raise ValueError("panels: no line to draw")
    with style():
        chosen = dict(zip(runs, looks(), strict=False))
        figure = new_figure()
        scalar = [
            p for s in panels.values() for ls in s.values() if len(ls) == 1 for p in ls.values()
        ]
        title = smoothing_title(scalar) if scalar else ""
        height = (0 if single else len(runs)) + (1 if title else 0)
        figure.set_size_inches(7.5, _PANEL * len(panels) + _LINE * height + 0.3)
        column = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        handles: dict[str, Any] = {}
        for axes, (metric, series) in zip(column, panels.items(), strict=True):
            for name, lines in series.items():
                handle = _draw(axes, lines, chosen[name], name)
                handles.setdefault(name, handle)
            axes.set_ylabel(metric)
        column[-1].set_xlabel(x_label)
        column[-1].xaxis.set_major_formatter(short_number)
        if height:
            shown = {} if single else handles
            legend = figure.legend(
                list(shown.values()),
                list(shown),
                loc="outside upper left",
                title=title,
                alignment="left",
                fontsize=9,
            )
            legend.get_title().set_color(GREY)
    return figure


def _draw(axes: Any, lines: Lines, look: Mapping[str, Any], name: str) -> Any:
    """Draw the lines of one run in one panel; returns the line for the legend."""
    if len(lines) == 1:
        return draw_smoothed(axes, next(iter(lines.values())), look, name)
    handle = None
    for tint, (item, points) in zip(tints(look["color"], len(lines)), lines.items(), strict=True):
        # Without raw lines: so many would hide each other.
        handle = draw_line(axes, points, {**look, "color": tint, "linewidth": 1.4}, name)
        if item in (next(iter(lines)), list(lines)[-1]):
            axes.annotate(
                f"loop {item}",
                points[-1],
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
    return handle
