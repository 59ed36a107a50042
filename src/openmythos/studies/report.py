"""The page of a study: claim, verdict, figure, tables, deviations, and how to run it again."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from openmythos.config import ConfigError
from openmythos.studies.storage import Stored, rule_of
from openmythos.studies.study import Finding, RunResult, Study, Trial, by_arm, table_of


def report_markdown(study: Study, stored: Stored) -> str:
    """The text of report.md."""
    finding, results = stored.finding, stored.runs
    assert finding is not None
    lines = [
        f"# {study.name}",
        "",
        f"**Claim** ({study.source}): {study.claim}",
        "",
        f"**Verdict: {finding.verdict}.** {finding.sentence}",
        "",
        "![figure](figure.png)",
        "",
        *([f"*{study.caption}*", ""] if study.caption else []),
        f"**Method.** {study.method} Seeds: {_seeds(results)}; means with 95% intervals (Student's "
        "t over seeds); where a share's interval would leave 0 to 100%, minimum and maximum; "
        "counts of successes with the interval of Clopper and Pearson. Bands in the figure: "
        "minimum to maximum of the seeds.",
        "",
        *_section("Paper and here", beside_the_paper(study, finding)),
        *_section("Measured", markdown_table(finding.table)),
        *_section("Every seed", _every_seed(study, results)),
        *_section("Learning rates", _tuning(stored)),
        *_section("Deviations", _points(deviations(study, stored))),
        *_section("Not shown", _points(study.not_shown)),
        *_section("Run it again", _again(study, stored)),
    ]
    return "\n".join(lines[:-1]) + "\n"


def _section(title: str, lines: Iterator[str]) -> list[str]:
    """A heading and its lines; nothing if there are none."""
    found = list(lines)
    return [f"## {title}", "", *found, ""] if found else []


def _points(points: Sequence[str]) -> Iterator[str]:
    return (f"- {point}" for point in points)


def _seeds(results: Sequence[RunResult]) -> str:
    each = [{run.seed for run in runs} for runs in by_arm(results).values()]
    shared = set.intersection(*each)
    more = set.union(*each) - shared
    listed = ", ".join(map(str, sorted(shared)))
    return listed + (f" (some arms also {', '.join(map(str, sorted(more)))})" if more else "")


def beside_the_paper(study: Study, finding: Finding) -> Iterator[str]:
    """A table of the paper's result and set-up beside ours."""
    rows = [*study.setups]
    if not study.paper.startswith("none"):
        rows.insert(0, ("result", study.paper, finding.brief.rstrip(".")))
    if rows:
        yield from markdown_table([{"": what, "paper": p, "here": h} for what, p, h in rows])


def _every_seed(study: Study, results: Sequence[RunResult]) -> Iterator[str]:
    if not study.columns:
        return
    rows = table_of(results, study.columns, each=True)
    for row, runs in zip(rows, by_arm(results).values(), strict=True):
        row["parameters"] = f"{runs[0].parameters:,}"
        row["training FLOPs"] = f"{runs[0].training_flops:.2e}"
        row["learning rate"] = f"{runs[0].rate:g}"
        row["CPU minutes"] = f"{sum(run.seconds for run in runs) / 60 / len(runs):.1f}"
    yield from markdown_table(rows)


def _tuning(stored: Stored) -> Iterator[str]:
    """The learning rates tried, and how well each did."""
    if not stored.trials:
        return
    yield (
        "Validation loss at each rate, trained at full length with seeds, and facts, that no run "
        "has; its text or problems are never reported. A grid grows until its best is inside, or "
        "three times."
    )
    yield ""
    by_name: dict[str, list[Trial]] = {}
    for trial in sorted(stored.trials, key=lambda trial: trial.rate):
        by_name.setdefault(trial.arm, []).append(trial)
    for arm, trials in by_name.items():
        yield f"- {arm}: " + ", ".join(f"{t.rate:g}: {-t.fit:.3f}" for t in trials)


def deviations(study: Study, stored: Stored) -> list[str]:
    """What was changed after the first runs: written by hand, and whether the rule was."""
    points = [*study.deviations]
    rule = stored.rule
    if rule["sha256"] != rule_of(study, stored.hardware)["sha256"]:
        points.append(
            f"The verdict rule or its bars changed after the first run: they were those of commit "
            f"{rule['commit'][:10]}."
        )
    return points


def _again(study: Study, stored: Stored) -> Iterator[str]:
    runs, trials, machine = stored.runs, stored.trials, stored.hardware
    minutes = (sum(r.seconds for r in runs) + sum(t.seconds for t in trials)) / 60
    seeds = 1 + max(run.seed for run in runs)
    commits = ", ".join(dict.fromkeys(run.commit[:10] for run in runs))
    yield f"    openmythos study {study.name} --seeds {seeds}"
    yield ""
    yield (
        f"{len(runs)} runs and {len(trials)} trials of learning rates took {minutes:.0f} minutes "
        f"of CPU time, each on one thread of {_machines(runs, machine)}, at commit "
        f"{commits}{', with uncommitted changes' if machine.get('dirty') else ''}."
    )
    yield ""
    yield f"Rule, fixed at commit {stored.rule['commit'][:10]}: {stored.rule['words']}"


def _machines(runs: Sequence[RunResult], machine: Mapping[str, Any]) -> str:
    """What the runs ran on, with the number of runs on each if there are several."""
    last = f"{machine['cpu']} ({machine.get('capability', 'instructions not recorded')})"
    counts = Counter(run.machine or last for run in runs)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{name} ({count} of {len(runs)} runs)" for name, count in counts.items())


def markdown_table(rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """Rows of equal keys as a table in Markdown."""
    if not rows:
        raise ConfigError("table: a finding shows at least one row")
    columns = list(rows[0])
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield "| " + " | ".join(row[column] for column in columns) + " |"
