"""The commands that compare training runs: a table, curves."""

# Each `run` imports what it needs: torch takes seconds, and flags are parsed without it.

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich import box
from rich.table import Table
from rich.text import Text

from openmythos.cli.flags import shown
from openmythos.cli.progress import duration
from openmythos.cli.screen import OUT, STYLES, short
from openmythos.config import ConfigError, require
from openmythos.train.metrics import (
    Metrics,
    chosen_metrics,
    finite_or_none,
    metric_names,
    read_metrics,
    scalars,
    seconds_trained,
    tokens_seen,
)

if TYPE_CHECKING:
    from openmythos.train.config import RunConfig
    from openmythos.train.overview import RunSummary

LEGEND_KEYS = 5  # at most this many config values per line of the legend
NARROWEST_NAME = 12  # characters; with less room, `runs` prints a line per value
X_LABELS = {
    "steps": "training step",
    "tokens": "training tokens",
    "seconds": "time spent in training steps [s]",
}


@dataclass(frozen=True)
class Runs:
    """List training runs: state, step, loss, held-out bits per byte, speed, age, parameters."""

    folders: tyro.conf.Positional[Annotated[tuple[str, ...], shown("FOLDER ...", "runs")]] = ()
    """Folders to look in, at any depth."""
    json: bool = False
    """Print a JSON list instead of a table."""

    def run(self) -> None:
        from openmythos.train.overview import find_runs, summarize

        folders = [Path(folder) for folder in self.folders or ("runs",)]
        if not self.folders and not folders[0].exists():
            empty = "[]" if self.json else "no runs yet: `openmythos train` makes runs/demo-1"
            print(empty)
            return
        found = dict.fromkeys(run for folder in folders for run in find_runs(folder))
        summaries = [summarize(run) for run in found]
        # Running ones first, then the most recent.
        summaries.sort(key=lambda s: (s.state != "running", math.inf if s.age is None else s.age))
        if self.json:
            print(json.dumps(finite_or_none([asdict(s) for s in summaries]), indent=2))
            return
        if not summaries:
            OUT.print(f"no run in {', '.join(map(str, folders))}")
            return
        _print_summaries(summaries)
        for summary in summaries:
            if summary.error:
                OUT.print(summary.error)


@dataclass(frozen=True)
class Plot:
    """Plot metrics of one or several training runs: PNG and CSV."""

    runs: tyro.conf.Positional[Annotated[tuple[str, ...], shown("RUN ...", "")]]
    """Run folders."""
    metric: Annotated[tuple[str, ...], shown("NAME ...")] = ("loss",)
    """Metrics of metrics.jsonl, a panel each; a list such as state_rms gets a line per loop."""
    x: Literal["steps", "tokens", "seconds"] = "steps"
    """The x axis."""
    out: Annotated[str, shown("FILE", "curves.png in the run folder; of several runs, in .")] = ""
    """PNG file."""

    def run(self) -> None:
        from openmythos.analysis import plots
        from openmythos.train.folder import read_config

        require(bool(self.runs), "runs", [], "must name at least one run folder")
        require(bool(self.metric), "metric", [], "must name at least one")
        runs = list(dict.fromkeys(Path(run) for run in self.runs))
        out = Path(self.out or Path(runs[0] if len(runs) == 1 else ".", "curves.png"))
        require(out.suffix == ".png", "out", self.out, "must end in .png")
        require(out.parent.is_dir() or not self.out, "out", self.out, "its folder does not exist")
        labels = _labels(runs, [read_config(run) for run in runs])
        metrics = [read_metrics(run) for run in runs]
        if not all(metrics):
            raise ConfigError(f"{runs[metrics.index([])]}: no step has been logged yet")
        known = list(dict.fromkeys(name for entries in metrics for name in metric_names(entries)))
        chosen = chosen_metrics(self.metric, known)
        panels: dict[str, dict[str, dict[str, plots.Points]]] = {
            _panel(name, chosen)[0]: {} for name in chosen
        }
        rows: list[dict[str, object]] = []
        for run, label, entries in zip(runs, labels, metrics, strict=True):
            xs = _positions(self.x, run, entries)
            values = [scalars(entry) for entry in entries]
            for name in chosen:
                points = [(x, v[name]) for x, v in zip(xs, values, strict=True) if name in v]
                if points:
                    panel, item = _panel(name, chosen)
                    panels[panel].setdefault(label, {})[item] = points
                else:
                    OUT.print(f"{run} has no {name}")
            for entry, x, v in zip(entries, xs, values, strict=True):
                where: dict[str, float] = {} if self.x == "steps" else {self.x: x}
                shown_values = {name: v[name] for name in chosen if name in v}
                rows.append({"run": str(run), "step": entry["step"], **where, **shown_values})
        figure = plots.metric_curves(panels, x_label=X_LABELS[self.x], single=len(runs) == 1)
        plots.save_figure(figure, out, rows)
        OUT.print(f"Written: {out}, {out.with_suffix('.csv')}")


def _positions(x: str, run: Path, metrics: list[Metrics]) -> list[float]:
    if x == "steps":
        return [float(entry["step"]) for entry in metrics]
    needed = ("tokens",) if x == "tokens" else ("tokens", "tokens_per_second")
    for name in needed:
        logged = all(name in entry for entry in metrics)
        require(logged, "x", x, f"is not known: some steps of {run} have no {name}")
    return tokens_seen(metrics) if x == "tokens" else seconds_trained(metrics)


def _panel(name: str, chosen: Sequence[str]) -> tuple[str, str]:
    """(panel, line) of a metric: items of a list, such as state_rms/0, share a panel."""
    of_list, _, item = name.rpartition("/")
    together = [other for other in chosen if of_list and other.rpartition("/")[0] == of_list]
    return (of_list, item) if len(together) > 1 else (name, "")


def _labels(runs: list[Path], configs: "list[RunConfig]") -> list[str]:
    """The name of each run and the config values in which the runs differ."""
    from openmythos.train.overview import differences, names_of

    labels = []
    for name, values in zip(names_of(runs), differences(configs), strict=True):
        parts = [f"{key}={value}" for key, value in values.items()]
        parts = [*parts[:LEGEND_KEYS], "..."] if len(parts) > LEGEND_KEYS else parts
        labels.append(f"{name}: {', '.join(parts)}" if parts else name)
    return labels


def _print_summaries(summaries: "Sequence[RunSummary]") -> None:
    """A table, or on a narrow terminal a few lines per run."""
    rows = [_cells(summary) for summary in summaries]
    needed = sum(
        max(len(name), *(len(row[name]) for row in rows)) + 1 for name in list(rows[0])[1:]
    )
    if OUT.width < needed + NARROWEST_NAME:
        for row in rows:
            for key, value in row.items():
                if value:
                    OUT.print(value if key == "run" else f"  {key} {value}", soft_wrap=True)
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    # In a narrow terminal names are wrapped, numbers never.
    table.add_column("run", overflow="fold")
    table.add_column("state", no_wrap=True)
    for name in list(rows[0])[2:]:
        table.add_column(name, justify="right", no_wrap=True)
    for summary, row in zip(summaries, rows, strict=True):
        name, state, *numbers = row.values()
        table.add_row(name, Text(state, style=STYLES.get(summary.state, "dim")), *numbers)
    OUT.print(table)


def _cells(s: "RunSummary") -> dict[str, str]:
    """The cells of a row, by column name."""
    return {
        "run": s.folder,
        "state": s.state,
        "step": f"{s.step}/{'?' if s.num_steps is None else s.num_steps}",
        "loss": "" if s.loss is None else f"{s.loss:.4f}",
        "held-out": "" if s.bits_per_byte is None else f"{s.bits_per_byte:.4f} @{s.loops}",
        "tokens/s": "" if s.tokens_per_second is None else f"{s.tokens_per_second:,.0f}",
        "age": "" if s.age is None else duration(s.age),
        "params": "" if s.parameters is None else short(s.parameters),
    }
