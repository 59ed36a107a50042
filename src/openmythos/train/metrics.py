"""Metrics of a run: one JSON object per line in RUN/metrics.jsonl."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openmythos.config import ConfigError

FILE = "metrics.jsonl"
Metrics = dict[str, Any]  # numbers, and lists of numbers by loop


class MetricsLog:
    """Appends metrics; on resuming drops the lines at or after the step that comes next."""

    def __init__(self, run: Path, next_step: int) -> None:
        self._run, self._path = run, run / FILE
        self.rewind(next_step)

    def rewind(self, next_step: int) -> None:
        """Drop the lines at or after a step."""
        kept = [m for m in read_metrics(self._run) if m["step"] < next_step] if next_step else []
        self._path.write_text("".join(json.dumps(m) + "\n" for m in kept))

    def write(self, metrics: Mapping[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(dict(metrics)) + "\n")


def read_metrics(run: Path) -> list[Metrics]:
    """All metrics of a run, in order; a last line cut short by a crash is left out."""
    path = run / FILE
    if not path.is_file():
        raise ConfigError(f"{path}: is missing; {run} is not the folder of a run")
    lines = path.read_text().splitlines()
    metrics = []
    for number, line in enumerate(lines, start=1):
        try:
            metrics.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ConfigError(f"{path}, line {number}: is not JSON: {error}") from error
    return metrics
