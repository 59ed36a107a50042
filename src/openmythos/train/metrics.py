"""Metrics of a run: one JSON object per line in RUN/metrics.jsonl, and summaries of them."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from openmythos.config import ConfigError, require, unknown_name
from openmythos.files import write_atomically

FILE = "metrics.jsonl"
Metrics = dict[str, Any]  # numbers, and lists of numbers by loop
# Speeds are medians over this many logged steps, robust to single slow ones.
RECENT = 20


class MetricsLog:
    """Appends metrics; on resuming drops the lines at or after the step that comes next."""

    def __init__(self, run: Path, next_step: int) -> None:
        self._run, self._path = run, run / FILE
        self.rewind(next_step)

    def rewind(self, next_step: int) -> None:
        """Drop the lines at or after a step."""
        known = next_step > 0 and self._path.is_file()
        kept = [m for m in read_metrics(self._run) if m["step"] < next_step] if known else []
        write_atomically(self._path, "".join(map(_line, kept)))

    def write(self, metrics: Mapping[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(_line(metrics))


def _line(metrics: Mapping[str, Any]) -> str:
    """JSON has no nan and no infinity: they become null, which is read as nan."""
    return json.dumps(finite_or_none(metrics), allow_nan=False) + "\n"


def finite_or_none(value: Any) -> Any:
    """The value with None in place of every number in it that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsTail:
    """Metrics of a run that is still being written; `read` reads only what was added."""

    def __init__(self, run: Path) -> None:
        self._path = run / FILE
        self._inode, self._place = -1, 0
        self._metrics: list[Metrics] = []

    def read(self) -> list[Metrics]:
        """All metrics so far; none while the file does not exist."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            # A resumed run replaces the file.
            inode = os.fstat(file.fileno()).st_ino
            if inode != self._inode:
                self._inode, self._place, self._metrics = inode, 0, []
            file.seek(self._place)
            added = file.read()
        whole = added[: added.rfind(b"\n") + 1]
        self._place += len(whole)
        self._metrics += [entry for line in whole.splitlines() if (entry := _parsed(line))]
        return self._metrics


def read_metrics(run: Path) -> list[Metrics]:
    """All metrics of a run, in order; a last line cut short by a crash is left out."""
    path = run / FILE
    if not path.is_file():
        raise ConfigError(f"{path}: is missing; no step of this run has been logged")
    lines = path.read_bytes().splitlines()
    metrics = []
    for number, line in enumerate(lines, start=1):
        entry = _parsed(line)
        if entry is not None:
            metrics.append(entry)
        elif number < len(lines):
            raise ConfigError(f"{path}, line {number}: is not JSON with a step")
    return metrics


def _parsed(line: bytes) -> Metrics | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
        return None
    return {key: _none_is_nan(value) for key, value in entry.items()}


def _none_is_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_none_is_nan(item) for item in value]
    return math.nan if value is None else value


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a step except its own; those of a list are called name/1, name/2, ..."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, list | tuple):
            found |= {f"{name}/{place}": float(item) for place, item in enumerate(value, start=1)}
        elif name != "step":
            found[name] = float(value)
    return found


def metric_names(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of all scalars, in order of appearance."""
    return list(dict.fromkeys(name for entry in metrics for name in scalars(entry)))


def chosen_metrics(asked: Sequence[str], known: Sequence[str]) -> list[str]:
    """The scalars asked for: by their own names, or all of a list by the list's name."""
    found: list[str] = []
    for name in asked:
        matching = [k for k in known if k == name or k.rpartition("/")[0] == name]
        require(len(matching) > 0, "metric", name, unknown_name("metric", name, known))
        found += [k for k in matching if k not in found]
    return found


def tokens_seen(metrics: Sequence[Mapping[str, Any]]) -> list[float]:
    """Training tokens seen after each logged step; unlogged steps count as the next logged one."""
    return _accumulated(metrics, [float(m["tokens"]) for m in metrics])


def seconds_trained(metrics: Sequence[Mapping[str, Any]]) -> list[float]:
    """Seconds of training after each logged step, without evaluation and pauses."""
    return _accumulated(metrics, [seconds_per_step(m) for m in metrics])


def seconds_per_step(metrics: Mapping[str, Any]) -> float:
    """Duration of a logged step; nan if unknown."""
    speed = float(metrics.get("tokens_per_second", math.nan))
    return float(metrics.get("tokens", math.nan)) / speed if speed > 0 else math.nan


def recent_median(metrics: Sequence[Mapping[str, Any]], name: str) -> float:
    """The median of the last logged steps; nan where there is none."""
    values = [float(m[name]) for m in metrics[-RECENT:] if name in m]
    return median(values) if values else math.nan


def seconds_left(metrics: Sequence[Mapping[str, Any]], num_steps: int) -> float:
    """Estimated seconds to the end of training, from the last logged steps; nan if unknown."""
    paces = [s for m in metrics[-RECENT:] if math.isfinite(s := seconds_per_step(m))]
    return median(paces) * (num_steps - 1 - metrics[-1]["step"]) if paces else math.nan


def _accumulated(metrics: Sequence[Mapping[str, Any]], each: Sequence[float]) -> list[float]:
    total, before, found = 0.0, -1, []
    for entry, amount in zip(metrics, each, strict=True):
        total += amount * (entry["step"] - before)
        before = entry["step"]
        found.append(total)
    return found
