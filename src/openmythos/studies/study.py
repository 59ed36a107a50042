"""What a study is, and how its runs become a report.

A study fixes its claim, arms, measure and verdict rule in code, before any run. A run is an arm
with a seed; its result is plain data, written the moment it is there, so that an interrupted study
goes on where it stopped and nothing is run twice.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from openmythos.config import ConfigError, to_dict
from openmythos.model.config import MythosConfig
from openmythos.studies.learning import Learning
from openmythos.tasks import Task

Verdict = Literal["holds", "holds in part", "does not hold here"]
# Two-sided 95% quantiles of Student's t by degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One thing that is compared: a model, a task and how it is learned."""

    name: str
    model: MythosConfig
    task: Task
    learning: Learning
    why: str = ""  # what this arm controls for

    def settings(self) -> dict[str, Any]:
        """Everything that a run of this arm is a function of, besides its seed."""
        return {
            "model": to_dict(self.model),
            "task": to_dict(self.task),
            "learning": to_dict(self.learning),
        }

    def quick(self) -> "Arm":
        """The same machinery in a second or two: it shows that it runs, not what it finds."""
        learning = replace(self.learning, num_steps=3, max_hops=3, first_hops=2, batch_size=4)
        return replace(self, learning=learning)


@dataclass(frozen=True)
class RunResult:
    """One arm with one seed."""

    arm: str
    seed: int
    settings: Mapping[str, Any]
    curve: Mapping[str, Any]  # what the study's measure found
    parameters: int
    training_flops: int | float
    seconds: int | float
    commit: str


@dataclass(frozen=True)
class Finding:
    """What a study concludes from its runs."""

    verdict: Verdict
    sentence: str
    table: list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class Study:
    """A claim with all that is needed to test it."""

    name: str
    claim: str
    source: str
    method: str
    not_shown: tuple[str, ...]
    arms: Callable[[], Sequence[Arm]]
    measure: Callable[..., dict[str, Any]]  # (model, arm, quick) -> curve
    judge: Callable[[Sequence[RunResult]], Finding]
    draw: Callable[[Sequence[RunResult]], Any]  # -> (figure, rows)


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of the 95% interval by Student's t; one value has none (nan)."""
    if len(values) < 2:
        return values[0], math.nan
    quantile = _T95[len(values) - 2] if len(values) <= len(_T95) + 1 else 1.96
    return statistics.mean(values), quantile * statistics.stdev(values) / len(values) ** 0.5


def percent(values: Sequence[float]) -> str:
    """Shares as "97.3 ± 1.2"."""
    mean, half = mean_and_half_width(values)
    text = f"{100 * mean:.1f}"
    return text if math.isnan(half) else f"{text} ± {100 * half:.1f}"


def by_arm(results: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    """Results grouped by arm, in order of appearance."""
    groups: dict[str, list[RunResult]] = {}
    for result in results:
        groups.setdefault(result.arm, []).append(result)
    return groups


def report_markdown(study: Study, results: Sequence[RunResult], finding: Finding) -> str:
    """report.md."""
    seeds = sorted({result.seed for result in results})
    lines = [
        f"# {study.name}",
        "",
        f"**Claim** ({study.source}): {study.claim}",
        "",
        f"**Verdict: {finding.verdict}.** {finding.sentence}",
        "",
        "![figure](figure.png)",
        "",
        f"**Method.** {study.method} Seeds: {', '.join(map(str, seeds))}; means with 95% intervals "
        "(Student's t over seeds).",
        "",
        *_markdown_table(finding.table),
        "",
        "## Not shown",
        "",
        *(f"- {point}" for point in study.not_shown),
        "",
    ]
    return "\n".join(lines)


def _markdown_table(rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
    if not rows:
        raise ConfigError("table: a finding shows at least one row")
    columns = list(rows[0])
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield "| " + " | ".join(row[column] for column in columns) + " |"
