"""Content of the figures; saving writes a PNG and its CSV, or neither."""

import csv
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.lines import Line2D

from openmythos.analysis.plots import (
    loss_against_loops,
    metric_curves,
    save_figure,
)
from openmythos.config import ConfigError

POINTS = [(1000 * (i + 1), 1.5 + 4 / (1 + i / 20) + 0.1 * (-1) ** i) for i in range(300)]
CURVE = {4: 1.9, 1: 2.6, 2: 2.2, 16: 1.85, 8: 1.84}
ROWS: list[dict[str, object]] = [
    {"run": "a, b", "num_loops": 1, "bpb": 0.1 + 0.2},
    {"run": "ü", "note": "new"},
]


def loss_curve(series: Mapping[str, list[tuple[float, float]]]) -> Figure:
    """One panel, with a line per run."""
    panels = {"loss": {name: {"": points} for name, points in series.items()}}
    return metric_curves(panels, x_label="training tokens")


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def named(figure: Figure, label: str) -> Line2D:
    (line,) = (line for line in figure.axes[0].lines if line.get_label() == label)
    return line


def points(line: Line2D) -> list[tuple[float, float]]:
    return [(x, y) for x, y in np.asarray(line.get_data()).T.tolist()]


def ticks(figure: Figure) -> list[str]:
    """The labels of the x axis as they are drawn within its limits."""
    figure.canvas.draw()
    low, high = figure.axes[0].get_xlim()
    labels = figure.axes[0].get_xticklabels()
    return [text.get_text() for text in labels if low <= text.get_position()[0] <= high]


def test_what_is_not_smoothed_is_not_called_so() -> None:
    def title(figure: Figure) -> str:
        return figure.legends[0].get_title().get_text() if figure.legends else ""

    assert title(loss_curve({"run": POINTS})) == "bold: smoothed, faint: raw"
    assert title(loss_curve({"run": POINTS[:20]})) == ""
    for count, said in ((300, "bold: smoothed, faint: raw"), (20, "")):
        panels = {"loss": {"run": {"": POINTS[:count]}}}
        assert title(metric_curves(panels, x_label="step", single=True)) == said


def test_a_value_seen_once_has_a_marker() -> None:
    figure = metric_curves({"bits": {"run": {"": [(3.0, 2.0)]}}}, x_label="step")
    assert figure.axes[0].lines[-1].get_marker() not in ("", "None")
    figure = metric_curves({"bits": {"run": {"": [(3.0, 2.0), (4.0, 1.0)]}}}, x_label="step")
    assert figure.axes[0].lines[-1].get_marker() in ("", "None")


def test_items_of_a_list_share_a_panel() -> None:
    lines = {str(loop): [(0.0, 1.0 * loop), (1.0, 2.0 * loop)] for loop in range(1, 9)}
    figure = metric_curves({"state_rms": {"run": lines}}, x_label="step", single=True)
    (axes,) = figure.axes
    assert len(axes.lines) == 8 and len({line.get_color() for line in axes.lines}) == 8
    assert [text.get_text() for text in axes.texts] == ["loop 1", "loop 8"]
    assert figure.get_size_inches()[1] < 4


def test_each_run_is_drawn_raw_and_smoothed() -> None:
    figure = loss_curve({"looped": POINTS, "control": POINTS[:50]})
    axes = figure.axes[0]
    assert axes.get_xlabel() == "training tokens"
    assert axes.get_ylabel() == "loss"
    assert legend(figure) == ["looped", "control"]
    assert figure.legends[0].get_title().get_text() == "bold: smoothed, faint: raw"
    raw, smoothed, other_raw, other = axes.lines
    assert points(raw) == POINTS
    assert raw.get_linewidth() < smoothed.get_linewidth()
    assert raw.get_color() == smoothed.get_color() != other.get_color() == other_raw.get_color()


def test_smoothing_removes_noise_but_not_the_level() -> None:
    smoothed = [loss for _, loss in points(named(loss_curve({"run": POINTS}), "run"))]
    losses = [loss for _, loss in POINTS]
    assert smoothed[:20] == pytest.approx(losses[:20])
    steps = [abs(after - before) for before, after in pairwise(smoothed[100:])]
    assert max(steps) < 0.03  # raw: 0.2
    assert smoothed[-1] == pytest.approx(1.5 + 4 / (1 + 299 / 20), abs=0.05)


def test_a_loss_that_is_not_finite_leaves_a_gap() -> None:
    figure = loss_curve({"run": [(1, 3.0), (2, math.nan), (3, math.inf), (4, 2.0)]})
    figure.canvas.draw()
    for line in figure.axes[0].lines:
        assert [math.isnan(loss) for _, loss in points(line)] == [False, True, True, False]
    assert figure.axes[0].get_ylim()[1] < 4


@pytest.mark.parametrize(
    ("first", "last", "scale"),
    [(1000, 999_000, "linear"), (1000, 1_000_000, "log"), (0, 1_000_000, "linear")],
)
def test_x_is_logarithmic_over_three_decades(first: int, last: int, scale: str) -> None:
    figure = loss_curve({"run": [(first, 5), (last, 2)]})
    assert figure.axes[0].get_xscale() == scale


def test_tokens_are_written_short() -> None:
    assert ticks(loss_curve({"run": [(0, 5), (2e6, 2)]}))[::2] == ["0", "500k", "1M", "1.5M", "2M"]
    assert ticks(loss_curve({"run": [(9e7, 5), (2e12, 2)]})) == ["100M", "1B", "10B", "100B", "1T"]


def test_runs_past_the_last_colour_are_dashed() -> None:
    figure = loss_curve({str(i): POINTS for i in range(20)})
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines[1::2]}
    assert len(looks) == 20


def test_curves_are_drawn_in_order_of_loops() -> None:
    figure = loss_against_loops({"looped": CURVE, "control": {1: 2.0, 16: 2}})
    axes = figure.axes[0]
    assert axes.get_xlabel() == "num_loops"
    assert axes.get_ylabel() == "held-out bits per byte"
    assert legend(figure) == ["looped", "control"]
    assert points(named(figure, "looped")) == sorted(CURVE.items())
    assert named(figure, "looped").get_marker() != named(figure, "control").get_marker() != "None"
    assert not texts(figure)


@pytest.mark.parametrize(
    ("loops", "trained", "labels"),
    [
        ([1, 2, 4, 8, 16], None, ["1", "2", "4", "8", "16"]),
        (range(1, 13), None, ["1", "2", "4", "8"]),
        ([3, 6, 12], 32, ["4", "8", "16", "32"]),
        ([5, 6, 7], None, ["5", "6", "7"]),
        ([4], None, ["4"]),
    ],
)
def test_ticks_are_whole_loops(loops: list[int], trained: float | None, labels: list[str]) -> None:
    figure = loss_against_loops({"run": dict.fromkeys(loops, 2.0)}, trained_loops=trained)
    assert figure.axes[0].get_xscale() == "log"
    assert ticks(figure) == labels
    assert not figure.axes[0].get_xticks(minor=True).size


def test_references_and_trained_loops_are_lines_with_names() -> None:
    references = {"gzip -9": 2.7, "xz -9": 2}
    figure = loss_against_loops({"run": CURVE}, references=references, trained_loops=6.4)
    curve, gzip, xz, trained = figure.axes[0].lines
    assert {y for _, y in points(gzip)} == {2.7} and {y for _, y in points(xz)} == {2}
    assert gzip.is_dashed() and xz.is_dashed() and not curve.is_dashed()
    assert {x for x, _ in points(trained)} == {6.4}
    assert texts(figure) == ["gzip -9", "xz -9", "mean loops in training: 6.4"]
    assert legend(figure) == ["run"]


@pytest.mark.parametrize("references", [{}, {"gzip -9": 1.2}, {"gzip -9": 1.001}])
def test_a_flat_curve_looks_flat(references: Mapping[str, float]) -> None:
    figure = loss_against_loops({"run": {1: 1.002, 2: 1.001, 4: 1.0}}, references=references)
    low, high = figure.axes[0].get_ylim()
    assert high - low >= 0.1
    assert low < 1.0 and high > max(1.002, *references.values(), 0)


def test_a_value_that_is_not_finite_keeps_its_place() -> None:
    figure = loss_against_loops({"run": {1: 1.5, 2: math.nan, 4: 1.4, 8: math.inf}})
    assert ticks(figure) == ["1", "2", "4", "8"]
    assert figure.axes[0].get_ylim()[1] < 2
    loss_against_loops({"run": {1: math.nan}})


def test_names_of_close_references_do_not_overlap() -> None:
    figure = loss_against_loops({"run": CURVE}, references={"xz": 2.0, "gzip": 2.001})
    figure.canvas.draw()
    lower, upper = (text.get_window_extent() for text in figure.axes[0].texts)
    assert upper.y0 >= lower.y1 - 1


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: loss_curve({}), "no line"),
        (lambda: loss_curve({"a": POINTS, "b": []}), "panels: no line"),
        (lambda: loss_against_loops({}), "no line"),
        (lambda: loss_against_loops({"a": CURVE, "b": {}}), "curves of .5, 0. points: no line"),
        (lambda: loss_against_loops({"a": {0: 2.0, 1: 1.0}}), "num_loops = 0"),
        (lambda: loss_against_loops({"a": CURVE}, trained_loops=0.0), r"num_loops = 0\.0"),
    ],
)
def test_what_cannot_be_drawn_raises(draw: Callable[[], Figure], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw()


def test_png_and_csv_lie_side_by_side(tmp_path: Path) -> None:
    figure = loss_against_loops({"run": CURVE}, references={"gzip -9": 2.7}, trained_loops=8)
    for _ in range(2):  # the second time over the first
        save_figure(figure, tmp_path / "v1.loops.png", ROWS)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["v1.loops.csv", "v1.loops.png"]
    picture = imread(tmp_path / "v1.loops.png")
    assert picture.shape == (630, 1050, 4) and picture.std() > 0.01
    with open(tmp_path / "v1.loops.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["run", "num_loops", "bpb", "note"]
    assert rows[0] == {"run": "a, b", "num_loops": "1", "bpb": repr(0.1 + 0.2), "note": ""}
    assert rows[1] == {"run": "ü", "num_loops": "", "bpb": "", "note": "new"}


def test_equal_figures_are_equal_files(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        save_figure(loss_curve({"run": POINTS}), tmp_path / name, ROWS)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_failure_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = loss_curve({"run": POINTS})
    save_figure(figure, tmp_path / "loss.png", ROWS)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        save_figure(figure, tmp_path / "loss.png", [{"other": 1}])
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_figure_is_a_png_with_rows(tmp_path: Path) -> None:
    figure = loss_curve({"run": POINTS})
    with pytest.raises(ConfigError, match=r"must end in \.png"):
        save_figure(figure, tmp_path / "loss.csv", ROWS)
    with pytest.raises(ValueError, match="rows"):
        save_figure(figure, tmp_path / "loss.png", [])
    assert not list(tmp_path.iterdir())


def test_nothing_opens_a_window_or_touches_global_settings(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from openmythos.analysis.plots import loss_against_loops, metric_curves, save_figure
assert "matplotlib" not in sys.modules
import matplotlib
matplotlib.rcParams["lines.linewidth"] = 9
def settings():  # reading the backend would choose one and import pyplot
    return {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}
before = settings()
figure = metric_curves({"loss": {"run": {"": [(1, 2), (2, 1)]}}}, x_label="x")
save_figure(figure, Path(sys.argv[1], "a.png"), [{"x": 1}])
save_figure(loss_against_loops({"run": {1: 2}}), Path(sys.argv[1], "b.png"), [{"x": 1}])
assert settings() == before
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script, tmp_path], check=True)
    assert isinstance(loss_curve({"run": POINTS}).canvas, FigureCanvasAgg)


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'openmythos\[plots\]'") as caught:
        loss_curve({"run": POINTS})
    assert "\n" not in str(caught.value)
