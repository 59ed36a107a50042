"""What a study is, and how its runs become a report.

A study fixes its claim, arms, measure and verdict rule in code, before any run. A run is an arm
with a seed; its result is plain data, written as soon as it is known, so that an interrupted
study resumes where it stopped.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from scipy.special import stdtrit

from openmythos.config import ConfigError, apply_overrides, from_dict, to_dict
from openmythos.data.tokenizer import BPE
from openmythos.model.config import MythosConfig
from openmythos.studies.learning import TASK_TRAINING
from openmythos.studies.text import RATES, on_text
from openmythos.tasks import Task
from openmythos.train.config import RunConfig, TaskData, TextData, TrainConfig
from openmythos.train.task_source import fitted

# "premise not met": an assumption of the claim does not hold here (such as that sharing weights
# costs something), so the claim was not tested, whatever the other bars say.
Verdict = Literal["holds", "holds in part", "does not hold here", "premise not met"]
Curve = dict[int, float]  # by loops
Grid = dict[int, Curve]  # by hops, then by loops


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One alternative that is compared: a model, the text or task it learns, and its training.

    Each learning rate in `rates` is tried for num_steps / trial_share steps on `trial_seeds` seeds
    that no run uses; runs use the one with the best mean fit. Without `rates` they use the
    optimizer's `lr`. `factors` are what the arms differ in; a study groups them by these.
    """

    name: str
    run: RunConfig  # seed and device are not part of it
    why: str = ""  # what this arm controls for
    factors: dict[str, str] = field(default_factory=dict)
    rates: tuple[float, ...] = ()
    trial_share: int = 3
    trial_seeds: int = 1

    @classmethod
    def on_text(cls, name: str, model: MythosConfig, training: TrainConfig) -> "Arm":
        """An arm that learns text; each of three learning rates is tried at half length.

        On three seeds: a rate that is too high for some seeds can be the best for others.
        """
        run = on_text(model, training)
        return cls(name=name, run=run, rates=RATES, trial_share=2, trial_seeds=3)

    def has(self, settings: Mapping[str, Any]) -> bool:
        """Whether stored settings are this arm's; missing fields have their defaults."""
        try:
            return config_of(settings) == self.run
        except ConfigError:
            return False

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

    def trials(self) -> "list[Arm]":
        """This arm at each of its rates, with the number of steps of a trial."""
        steps = max(1, self.run.train.num_steps // self.trial_share)
        short = replace(self._training(num_steps=steps), rates=())
        return [short.at_rate(rate) for rate in self.rates]

    def quick(self) -> "Arm":
        """This arm with three steps: shows that it runs, not what it finds."""
        data = self.run.data
        if isinstance(data, TextData):
            short = self._training(num_steps=3, batch_size=2).run
            small = replace(data, limit_mb=0.05)
            run = replace(short, data=small, tokenizer=BPE(vocab_size=300))
            return replace(self, run=run, trial_seeds=1)
        first = max(2, data.min_hops)
        most = min(first + 1, data.max_hops)
        short = self._training(num_steps=3, batch_size=4).run
        run = replace(short, data=replace(data, max_hops=most, first_hops=first))
        return replace(self, run=fitted(run))

    def changed(self, overrides: Sequence[str]) -> "Arm":
        """This arm with overrides ("a.b=value") of its run."""
        return replace(self, run=fitted(apply_overrides(self.run, overrides)))

    def _training(self, **changes: Any) -> "Arm":
        return replace(self, run=replace(self.run, train=replace(self.run.train, **changes)))


def config_of(settings: Mapping[str, Any]) -> RunConfig:
    """The run that the settings of results.json describe.

    Older results name the task and how it is learned instead of data and training.
    """
    if "learning" not in settings:
        return from_dict(RunConfig, settings)
    model, task, learning = (settings[name] for name in ("model", "task", "learning"))
    if learning["kind"] == "text":
        parts = {"tokenizer": task["tokenizer"], "data": task["data"], "train": learning["train"]}
        return from_dict(RunConfig, {"model": model, **parts})
    names = {f.name for f in fields(TaskData)}
    data = {n: value for n, value in learning.items() if n in names} | {"task": task}
    own = {n: value for n, value in learning.items() if n not in names}
    train = to_dict(TASK_TRAINING) | own | {"seq_len": 1}
    return fitted(from_dict(RunConfig, {"model": model, "data": data, "train": train}))


@dataclass(frozen=True)
class RunResult:
    """One arm with one seed."""

    arm: str
    seed: int
    settings: Mapping[str, Any]
    curve: Mapping[str, Any]  # what the study's measure found
    parameters: int
    training_flops: int | float | None  # None: counted wrongly at the time, not derivable
    seconds: int | float
    commit: str

    @property
    def rate(self) -> float:
        """The learning rate it was learned with."""
        learning = self.settings.get("learning", self.settings)
        return float(learning.get("train", learning)["optimizer"]["lr"])


@dataclass(frozen=True)
class Trial:
    """One arm at one learning rate, with other seeds than any run."""

    arm: str
    rate: float
    settings: Mapping[str, Any]
    fit: int | float  # mean over seeds
    seconds: int | float


@dataclass(frozen=True)
class Finding:
    """What a study concludes from its runs."""

    verdict: Verdict
    sentence: str
    table: list[dict[str, str]]
    brief: str  # the sentence in a dozen words, for a table of all studies


@dataclass(frozen=True, kw_only=True)
class Study:
    """A claim with all that is needed to test it."""

    name: str
    claim: str
    headline: str  # the claim in a few words, with the paper's name
    source: str
    method: str
    not_shown: tuple[str, ...]
    arms: Callable[[], Sequence[Arm]]
    # (model, or TextRun if the arm learns text; arm; quick) -> curve
    measure: Callable[..., dict[str, Any]]
    fit: Callable[[RunResult], float]  # how well a run learned its training range: tunes rates
    judge: Callable[[Sequence[RunResult]], Finding]
    draw: Callable[[Sequence[RunResult]], Any]  # -> (figure, rows)
    # Number of evenly spaced measurements during training: curve["by_step"].
    snapshots: int = 0
    # Deviations from what was fixed before the first run, and why.
    changed: tuple[str, ...] = ()


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of the 95% interval by Student's t; one value has none (nan)."""
    if len(values) < 2:
        return values[0], math.nan
    quantile = float(stdtrit(len(values) - 1, 0.975))
    return statistics.mean(values), quantile * statistics.stdev(values) / len(values) ** 0.5


def percent(values: Sequence[float]) -> str:
    """Shares in percent: "97.3 ± 1.2", or "82.0 (10.1 to 100.0)" if that would leave 0 to 100."""
    mean, half = mean_and_half_width([100 * value for value in values])
    if half > min(mean, 100 - mean) and half > 0:
        return f"{mean:.1f} ({100 * min(values):.1f} to {100 * max(values):.1f})"
    return plus_minus([100 * value for value in values], digits=1)


def differs(values: Sequence[float]) -> bool:
    """Whether the 95% interval of the mean of paired differences excludes 0."""
    mean, half = mean_and_half_width(values)
    return abs(mean) > (half if not math.isnan(half) else 0.0)


def plus_minus(values: Sequence[float], digits: int = 3) -> str:
    """Numbers as "3.141 ± 0.027"."""
    mean, half = mean_and_half_width(values)
    text = f"{mean:.{digits}f}"
    return text if math.isnan(half) else f"{text} ± {half:.{digits}f}"


def as_sentence(statements: Mapping[str, bool]) -> str:
    """Statements, each followed by (yes) or (no)."""
    return "; ".join(f"{text} ({'yes' if so else 'no'})" for text, so in statements.items()) + "."


def factors_of(arms: Iterable[Arm]) -> dict[str, dict[str, str]]:
    """The factors of each arm, by its name: results do not hold them."""
    return {arm.name: arm.factors for arm in arms}


def curve_of(stored: Mapping[str, Any]) -> Curve:
    """A curve by loops as results.json holds it."""
    return {int(loops): float(value) for loops, value in stored.items()}


def grid_of(stored: Mapping[str, Any]) -> Grid:
    """A grid by hops and loops as results.json holds it."""
    return {int(hops): curve_of(row) for hops, row in stored.items()}


def to_json(grid: Mapping[int, Any]) -> dict[str, Any]:
    """A curve or a grid as JSON, where keys are strings."""
    return {str(n): to_json(x) if isinstance(x, Mapping) else x for n, x in grid.items()}


def by_arm(results: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    """Results grouped by arm, in order of appearance."""
    groups: dict[str, list[RunResult]] = {}
    for result in results:
        groups.setdefault(result.arm, []).append(result)
    return groups


def report_markdown(
    study: Study,
    results: Sequence[RunResult],
    finding: Finding,
    tried: Sequence[Trial] = (),
    notes: Sequence[str] = (),
) -> str:
    """The text of report.md; `notes` are deviations from the current study."""
    by_name = [{run.seed for run in runs} for runs in by_arm(results).values()]
    shared = set.intersection(*by_name)
    more = set.union(*by_name) - shared
    seeds = ", ".join(map(str, sorted(shared)))
    if more:
        seeds += f" (some arms also {', '.join(map(str, sorted(more)))})"
    minutes = (sum(r.seconds for r in results) + sum(t.seconds for t in tried)) / 60
    lines = [
        f"# {study.name}",
        "",
        f"**Claim** ({study.source}): {study.claim}",
        "",
        f"**Verdict: {finding.verdict}.** {finding.sentence}",
        "",
        "![figure](figure.png)",
        "",
        f"**Method.** {study.method} Seeds: {seeds}; means with 95% intervals (Student's t over "
        "seeds); where a share's interval would leave 0 to 100%, minimum and maximum. Bands in the "
        "figure: minimum to maximum of the seeds.",
        "",
        *_markdown_table(finding.table),
        "",
        f"{len(results)} runs and {len(tried)} trials of learning rates took {minutes:.0f} minutes "
        "by the clock, added up; each had one thread, and shared its machine with others.",
        "",
        *_tuning(tried),
        *_changed((*study.changed, *notes)),
        "## Not shown",
        "",
        *(f"- {point}" for point in study.not_shown),
        "",
    ]
    return "\n".join(lines)


def _tuning(tried: Sequence[Trial]) -> Iterator[str]:
    """The learning rates tried, and how well each fitted its training range."""
    if not tried:
        return
    yield from (
        "## Learning rates",
        "",
        "Fit of the training range (share right, or minus the loss) with seeds that no run has, on "
        "the held-out text or problems that the runs are reported on: there is no second set.",
        "",
    )
    for arm in dict.fromkeys(trial.arm for trial in tried):
        own = [trial for trial in tried if trial.arm == arm]
        fits = [f"{t.rate:g}: {t.fit:.3f}" for t in sorted(own, key=lambda t: t.rate)]
        yield f"- {arm}: {', '.join(fits)}"
    yield ""


def _changed(points: Sequence[str]) -> Iterator[str]:
    if points:
        yield from ("## Changed after the first runs", "", *(f"- {point}" for point in points), "")


def _markdown_table(rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
    if not rows:
        raise ConfigError("table: a finding shows at least one row")
    columns = list(rows[0])
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield "| " + " | ".join(row[column] for column in columns) + " |"
