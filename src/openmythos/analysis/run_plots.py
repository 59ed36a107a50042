"""Curves of training runs against each other: a panel per metric, in the style of `plots`."""

from collections.abc import Mapping, Sequence
from typing import Any

from openmythos.analysis.plots import (
    GREY,
    draw_smoothed,
    looks,
    new_figure,
    short_number,
    style,
)

Figure = Any  # matplotlib's, which only `plots` knows
Points = Sequence[tuple[float, float]]
# Inches of the figure's height: of a panel, and of a line of the legend.
_PANEL, _LINE = 3.2, 0.23


def metric_curves(
    panels: Mapping[str, Mapping[str, Points]], *, x_label: str, single: bool = False
) -> Figure:
    """Per metric and run the (x, value) points as a faint line and smoothed as a bold one.

    A run has the same colour in all panels, and one line of the legend; `single` leaves that out.
    """
    runs = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    if not runs or not all(points for lines in panels.values() for points in lines.values()):
        raise ValueError("panels: no line to draw")
    with style():
        chosen = dict(zip(runs, looks(), strict=False))
        figure = new_figure()
        lines = 1 + (0 if single else len(runs))
        figure.set_size_inches(7.5, _PANEL * len(panels) + _LINE * lines + 0.3)
        column = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        handles: dict[str, Any] = {}
        for axes, (metric, series) in zip(column, panels.items(), strict=True):
            for name, points in series.items():
                handles[name] = draw_smoothed(axes, points, chosen[name], name)
            axes.set_ylabel(metric)
        column[-1].set_xlabel(x_label)
        column[-1].xaxis.set_major_formatter(short_number)
        shown = {} if single else handles
        legend = figure.legend(
            list(shown.values()),
            list(shown),
            loc="outside upper left",
            title="bold: smoothed, faint: raw",
            alignment="left",
            fontsize=9,
        )
        legend.get_title().set_color(GREY)
    return figure
