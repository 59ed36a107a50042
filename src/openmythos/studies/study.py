"""What a study is: its claim, arms, measure and verdict rule, all fixed in code before any run.

A run is an arm with a seed; its result is plain data, written as soon as it is known, so that an
interrupted study resumes where it stopped.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from openmythos.analysis.study_plots import Lines
from openmythos.config import ConfigError, apply_overrides, from_dict
from openmythos.data.tokenizer import BPE
from openmythos.model.config import MythosConfig
from openmythos.model.mythos import OpenMythos
from openmythos.studies.statistics import percent, plus_minus
from openmythos.tasks import Task, TaskWithFacts
from openmythos.train.config import RunConfig, TaskData, TextData
from openmythos.train.task_source import fitted

# "holds": every bar is met. "holds in part": the central bar is met, and at least half of all.
# "premise not met": an assumption of the claim does not hold here (such as that sharing weights
# costs something), so the claim was not tested, whatever the other bars say.
Verdict = Literal["holds", "holds in part", "does not hold here", "premise not met"]
Curve = dict[int, float]  # by loops
Grid = dict[int, Curve]  # by hops, then by loops


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One alternative that is compared: a model, the text or task it learns, and its training.

    Each learning rate in `rates` is tried at full length with `trial_seeds` seeds, and in worlds,
    that no run has; the grid grows until its best is inside. Runs use the rate with the least
    validation loss; without `rates`, the optimizer's `lr`. `factors` are what the arms differ in; a
    study groups them by these. `most_seeds` > 0: no run for seeds beyond that number. An arm with
    `tuned_as` uses the rate of the arm of that name.
    """

    name: str
    run: RunConfig  # seed and device are not part of it
    why: str = ""  # what this arm controls for
    factors: dict[str, str] = field(default_factory=dict)
    rates: tuple[float, ...] = ()
    trial_seeds: int = 3
    most_seeds: int = 0
    tuned_as: str = ""

    def has(self, settings: Mapping[str, Any]) -> bool:
        """Whether stored settings are this arm's in any world; missing fields have defaults."""
        try:
            return _in_world(from_dict(RunConfig, settings), 0) == _in_world(self.run, 0)
        except ConfigError:
            return False

    def in_world(self, seed: int) -> "Arm":
        """This arm with the facts of that seed, if its task has facts: no two seeds share them."""
        return replace(self, run=_in_world(self.run, seed))

    @property
    def model(self) -> MythosConfig:
        return self.run.model

    @property
    def rate(self) -> float:
        return self.run.train.optimizer.lr

    @property
    def task(self) -> Task:
        """The task of an arm that learns one."""
        assert isinstance(self.run.data, TaskData)
        return self.run.data.task

    def at_rate(self, rate: float) -> "Arm":
        """This arm with that learning rate."""
        return self._training(optimizer=replace(self.run.train.optimizer, lr=rate))

    def quick(self) -> "Arm":
        """This arm with three steps: shows that it runs, not what it finds."""
        data = self.run.data
        if isinstance(data, TextData):
            short = self._training(num_steps=3, batch_size=2).run
            small = replace(data, limit_mb=0.05)
            run = replace(short, data=small, tokenizer=BPE(vocab_size=300))
            return replace(self, run=run, rates=())
        first = min(max(2, data.min_hops), data.max_hops)
        most = min(first + 1, data.max_hops)
        if data.thoughts.kind != "none":
            first = most  # thoughts know no curriculum on the hops
        short = self._training(num_steps=3, batch_size=4).run
        run = replace(short, data=replace(data, max_hops=most, first_hops=first))
        return replace(self, run=fitted(run), rates=())

    def changed(self, overrides: Sequence[str]) -> "Arm":
        """This arm with overrides ("a.b=value") of its run."""
        return replace(self, run=fitted(apply_overrides(self.run, overrides)))

    def _training(self, **changes: Any) -> "Arm":
        return replace(self, run=replace(self.run, train=replace(self.run.train, **changes)))


def _in_world(run: RunConfig, seed: int) -> RunConfig:
    data = run.data
    if isinstance(data, TaskData) and isinstance(data.task, TaskWithFacts):
        return replace(run, data=replace(data, task=replace(data.task, facts_seed=seed)))
    return run


@dataclass(frozen=True)
class RunResult:
    """One arm with one seed."""

    arm: str
    seed: int
    settings: Mapping[str, Any]
    curve: Mapping[str, Any]  # what the study's measure found
    parameters: int
    training_flops: int | float
    seconds: int | float  # of CPU time, training and measuring
    commit: str
    # Mean loss per token or answer at the training's loops, on text or problems never reported.
    # None: not finite.
    validation: float | None = None
    machine: str = ""  # what it ran on; "": not recorded

    @property
    def rate(self) -> float:
        """The learning rate it was learned with."""
        return float(self.settings["train"]["optimizer"]["lr"])


@dataclass(frozen=True)
class Trial:
    """One arm at one learning rate, with other seeds than any run."""

    arm: str
    rate: float
    settings: Mapping[str, Any]
    fit: int | float  # minus the validation loss, mean over seeds
    seconds: int | float


@dataclass(frozen=True)
class Finding:
    """What a study concludes from its runs."""

    verdict: Verdict
    sentence: str
    table: list[dict[str, str]]
    brief: str  # the sentence in a dozen words, for a table of all studies


@dataclass(frozen=True)
class Column:
    """A number of a run: a column of the table, and given for every seed in the report."""

    name: str
    value: Callable[[RunResult], float | None]
    show: Callable[[Sequence[float]], str] = plus_minus  # the values of all seeds
    each: str = ".3f"  # format of one value


def percent_columns(
    name: str, share: Callable[[RunResult, int], float | None], numbers: Iterable[int]
) -> tuple[Column, ...]:
    """A column of shares for each number; `name` has its place, such as "{} hops [%]"."""

    def column(number: int) -> Column:
        return Column(name.format(number), lambda run: share(run, number), percent)

    return tuple(map(column, numbers))


@dataclass(frozen=True, kw_only=True)
class Study:
    """A claim with all that is needed to test it."""

    name: str
    claim: str
    headline: str  # the claim in a few words, with the paper's name
    source: str
    paper: str  # the paper's number and size
    method: str
    not_shown: tuple[str, ...]
    arms: Callable[[], Sequence[Arm]]
    # (model, or TextRun if the arm learns text; arm; quick) -> curve
    measure: Callable[..., dict[str, Any]]
    judge: Callable[[Sequence[RunResult]], Finding]
    draw: Callable[[Sequence[RunResult]], Any]  # -> (figure, rows)
    columns: tuple[Column, ...] = ()
    # Rows (what, in the paper, here) of a table of set-ups; the figure's finding in a sentence.
    setups: tuple[tuple[str, str, str], ...] = ()
    caption: str = ""
    # (model, run) -> what a trial minimises; None: the validation loss.
    score: Callable[[OpenMythos, RunConfig], float] | None = None
    # Number of evenly spaced measurements during training: curve["by_step"].
    snapshots: int = 0
    # Written by hand: deviations from what was fixed before the first run, and why.
    deviations: tuple[str, ...] = ()


def bands_note(results: Sequence[RunResult]) -> str:
    """The line below a figure that says what its bands are."""
    return f"Bands: minimum to maximum of {len({run.seed for run in results})} seeds."


def lines_of(
    results: Sequence[RunResult], curve: Callable[[RunResult], Curve], x: str, y: str
) -> tuple[Lines, list[dict[str, object]]]:
    """A line per arm through a curve of its runs, and a row per point with columns `x` and `y`."""
    lines, rows = Lines(), []
    for run in results:
        for place, value in curve(run).items():
            lines.add(run.arm, place, value)
            rows.append({"arm": run.arm, "seed": run.seed, x: place, y: value})
    return lines, rows


def table_of(
    results: Sequence[RunResult], columns: Sequence[Column], *, each: bool = False
) -> list[dict[str, str]]:
    """A row per arm with its columns; `each`: the values of all seeds, else their summary."""
    rows = []
    for arm, runs in by_arm(results).items():
        row = {"arm": arm}
        for column in columns:
            values = [value for run in runs if (value := column.value(run)) is not None]
            if not values:
                row[column.name] = "-"
            elif each:
                row[column.name] = ", ".join(format(value, column.each) for value in values)
            else:
                row[column.name] = column.show(values)
        rows.append(row)
    return rows


def by_bars(statements: Mapping[str, bool], *, premise: bool = True) -> Verdict:
    """The verdict of statements, of which the first is the claim's central one."""
    met = list(statements.values())
    if not premise:
        return "premise not met"
    if all(met):
        return "holds"
    return "holds in part" if met[0] and 2 * sum(met) >= len(met) else "does not hold here"


def as_sentence(statements: Mapping[str, bool]) -> str:
    """Statements, each followed by (yes) or (no); the first letter is a capital."""
    said = "; ".join(f"{text} ({'yes' if so else 'no'})" for text, so in statements.items())
    return f"{said[0].upper()}{said[1:]}."


def factors_of(arms: Iterable[Arm]) -> dict[str, dict[str, str]]:
    """The factors of each arm, by its name: results do not hold them."""
    return {arm.name: arm.factors for arm in arms}


def curve_of(stored: Mapping[str, Any]) -> Curve:
    """A curve by loops as results.json holds it."""
    return {int(loops): float(value) for loops, value in stored.items()}


def grid_of(stored: Mapping[str, Any]) -> Grid:
    """A grid by hops and loops as results.json holds it."""
    return {int(hops): curve_of(row) for hops, row in stored.items()}


def best(result: RunResult, hops: int) -> float:
    """The highest accuracy at so many hops, over loops; 0 if they were not asked."""
    return max(grid_of(result.curve).get(hops, {}).values(), default=0.0)


def to_json(grid: Mapping[int, Any]) -> dict[str, Any]:
    """A curve or a grid as JSON, where keys are strings."""
    return {str(n): to_json(x) if isinstance(x, Mapping) else x for n, x in grid.items()}


def by_arm(results: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    """Results grouped by arm, in order of appearance."""
    groups: dict[str, list[RunResult]] = {}
    for result in results:
        groups.setdefault(result.arm, []).append(result)
    return groups
