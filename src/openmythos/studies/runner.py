"""Run a study: seeds in parallel processes, results saved one by one, then report and figure."""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from openmythos.analysis import plots
from openmythos.config import ConfigError, to_dict, unknown_name
from openmythos.files import read_json, write_atomically, write_json
from openmythos.machine import choose_device, describe, keep_freed_memory
from openmythos.planning import cost
from openmythos.processes import worker_pool
from openmythos.studies import (
    adaptive_computation,
    depth_extrapolation,
    depth_lora,
    expert_routing,
    loop_use,
    parameter_efficiency,
    stability,
    systematic_generalization,
    test_time_depth,
    what_makes_it_extrapolate,
)
from openmythos.studies.study import Arm, Finding, RunResult, Study, Trial, report_markdown
from openmythos.studies.text import trained_on_text
from openmythos.train.config import RunConfig, TextData
from openmythos.train.task_source import task_trainer

# First seed of trials, above those of runs: rates are not tuned on the reported runs.
TRIAL_SEED = 1000

STUDIES: dict[str, Study] = {
    study.name: study
    for study in (
        depth_extrapolation.STUDY,
        what_makes_it_extrapolate.STUDY,
        parameter_efficiency.STUDY,
        systematic_generalization.STUDY,
        stability.STUDY,
        test_time_depth.STUDY,
        loop_use.STUDY,
        expert_routing.STUDY,
        depth_lora.STUDY,
        adaptive_computation.STUDY,
    )
}


def get(name: str) -> Study:
    """The study of that name."""
    if name not in STUDIES:
        raise ConfigError(f"study = {name!r}: {unknown_name('study', name, STUDIES)}")
    return STUDIES[name]


def run_study(
    study: Study,
    out: Path,
    *,
    seeds: int,
    quick: bool,
    overrides: Sequence[str] = (),
    processes: int = 2,
    device: str = "auto",
    on_progress: Callable[[int, int, str], None] | None = None,
) -> Finding:
    """Run what results.json lacks, then write results.json, report.md and figure.png in `out`.

    Runs in results.json are kept, also those of other seeds. If one has an arm or settings that
    the study does not have, a ConfigError is raised and no file changes. All processes share the
    `device`. `on_progress` is called with (runs done, runs in total, what was done last).
    """
    name = str(choose_device(device))
    arms = [(arm.quick() if quick else arm).changed(overrides) for arm in study.arms()]
    out.mkdir(parents=True, exist_ok=True)
    runs, tried = _load(out / "results.json")
    done = {(run.arm, run.seed): run for run in runs}
    fits = {(trial.arm, trial.rate): trial for trial in tried}
    trials = [trial for arm in arms for trial in arm.trials()]
    seeds_of = {arm.name: arm.trial_seeds for arm in arms}
    _refuse_others(out, tried, trials)
    wanted = [(arm.name, seed) for seed in range(seeds) for arm in arms]
    total = len(trials) + len({*done, *wanted})
    machine = describe() | {"device": name}

    def keep(what: str) -> None:
        if what != "kept":
            _save(out, study, machine, _in_order(done, arms), list(fits.values()), None)
        if on_progress is not None:
            on_progress(len(fits) + len(done), total, what)

    keep("kept")
    with worker_pool(processes) as pool:
        untried = [trial for trial in trials if (trial.name, trial.rate) not in fits]
        rates = [(arm, TRIAL_SEED + n) for arm in untried for n in range(arm.trial_seeds)]
        found: dict[tuple[str, float], list[RunResult]] = {}
        for result in _finished(pool, study, rates, quick, name):
            same = found.setdefault((result.arm, result.rate), [])
            same.append(result)
            if len(same) == seeds_of[result.arm]:
                fits[result.arm, result.rate] = _trial(study, same)
                keep(f"{result.arm}, learning rate {result.rate:g}")
        arms = [_tuned(arm, list(fits.values())) for arm in arms]
        _refuse_others(out, runs, arms)
        chosen = {arm.name: arm for arm in arms}
        todo = [(chosen[name], seed) for name, seed in wanted if (name, seed) not in done]
        for result in _finished(pool, study, todo, quick, name):
            done[result.arm, result.seed] = replace(result, commit=str(machine["commit"]))
            keep(f"{result.arm}, seed {result.seed}")
    finding = _concluded(out, study, machine, _in_order(done, arms), list(fits.values()))
    if on_progress is not None:
        on_progress(total, total, "judged")
    return finding


def judge_kept(study: Study, out: Path) -> Finding:
    """Judge the runs of out/results.json by the current rule; write report and figure again.

    Nothing is trained. Every run must have the settings of an arm, at any learning rate. Trials
    that the study would no longer make are kept, and the report says so.
    """
    path = out / "results.json"
    if not path.exists():
        raise ConfigError(f"{path}: is not there: no runs to judge")
    runs, tried = _load(path)
    arms = {arm.name: arm for arm in study.arms()}
    rates = {(run.arm, run.rate) for run in runs if run.arm in arms}
    _refuse_others(out, runs, [arms[name].at_rate(rate) for name, rate in rates])
    missing = sorted(arms.keys() - {run.arm for run in runs})
    if missing:
        raise ConfigError(f"{path}: has no run of {', '.join(map(repr, missing))}")
    results = _in_order({(run.arm, run.seed): run for run in runs}, list(arms.values()))
    notes = _older_trials(tried, list(arms.values()))
    return _concluded(out, study, read_json(path)["hardware"], results, tried, notes)


def _concluded(
    out: Path,
    study: Study,
    machine: Mapping[str, Any],
    results: Sequence[RunResult],
    trials: Sequence[Trial],
    notes: Sequence[str] = (),
) -> Finding:
    """Judge, and write results.json, report.md and the figure."""
    finding = study.judge(results)
    _save(out, study, machine, results, trials, finding)
    write_atomically(out / "report.md", report_markdown(study, results, finding, trials, notes))
    figure, rows = study.draw(results)
    plots.save_figure(figure, out / "figure.png", rows)
    return finding


def _older_trials(tried: Sequence[Trial], arms: Sequence[Arm]) -> list[str]:
    """A note on the trials that these arms would no longer make, if there are any."""
    asked = {arm.name: arm.trials() for arm in arms}
    older = [
        trial
        for trial in tried
        if not any(arm.has(trial.settings) for arm in asked.get(trial.arm, []))
    ]
    if not older:
        return []
    names = "; ".join(dict.fromkeys(trial.arm for trial in older))
    return [
        f"{len(older)} of {len(tried)} trials (those of {names}) were made by an older rule, with "
        "other steps than a run of today would give them. The rates they chose were kept."
    ]


def run_arm(study: str, arm: Arm, seed: int, quick: bool, device: str = "auto") -> RunResult:
    """One arm with one seed, on one thread."""
    torch.set_num_threads(1)
    keep_freed_memory()
    started = time.perf_counter()
    run = replace(arm.run, train=replace(arm.run.train, seed=seed, device=device))
    if isinstance(run.data, TextData):
        with trained_on_text(run) as trained:
            curve = get(study).measure(trained, arm, quick)
            flops = sum(step.flops for step in trained.history)
    else:
        curve, flops = _learned(get(study), arm, run, quick)
    return RunResult(
        arm=arm.name,
        seed=seed,
        settings=to_dict(arm.run),
        curve=curve,
        parameters=cost.parameters(arm.model).total,
        training_flops=flops,
        seconds=round(time.perf_counter() - started, 3),
        commit="",
    )


def _learned(study: Study, arm: Arm, run: RunConfig, quick: bool) -> tuple[dict[str, Any], float]:
    """(curve, training FLOPs) of a run that learns a task."""
    trainer = task_trainer(run)
    steps, flops, by_step = run.train.num_steps, 0.0, {}
    for metrics in trainer.steps():
        flops += metrics.flops
        done = metrics.step + 1
        if done * study.snapshots // steps > metrics.step * study.snapshots // steps:
            by_step[str(done)] = study.measure(trainer.model, arm, quick)
    curve = study.measure(trainer.model, arm, quick)
    if by_step:
        curve["by_step"] = by_step
    return curve, flops


def _finished(
    pool: Executor, study: Study, work: Sequence[tuple[Arm, int]], quick: bool, device: str
) -> Iterator[RunResult]:
    """Runs of (arm, seed), in the order in which they finish."""
    futures = [pool.submit(run_arm, study.name, arm, seed, quick, device) for arm, seed in work]
    for future in as_completed(futures):
        yield future.result()


def _trial(study: Study, runs: Sequence[RunResult]) -> Trial:
    """Combine runs of one arm at one learning rate, with different seeds, into a trial."""
    fit = statistics.mean(map(study.fit, runs))
    seconds = round(sum(run.seconds for run in runs), 3)
    return Trial(runs[0].arm, runs[0].rate, runs[0].settings, fit, seconds)


def _tuned(arm: Arm, trials: Sequence[Trial]) -> Arm:
    """The arm at the rate with the best fit; the lowest of equal ones."""
    own = sorted((t for t in trials if t.arm == arm.name), key=lambda trial: trial.rate)
    return arm.at_rate(max(own, key=lambda trial: trial.fit).rate) if own else arm


def _refuse_others(
    out: Path, found: Sequence[RunResult] | Sequence[Trial], arms: Sequence[Arm]
) -> None:
    """Raise a ConfigError unless every result belongs to one of these arms, with its settings."""
    # Check equal settings once: parsing takes a millisecond, and seeds share them.
    for one in {f"{one.arm} {json.dumps(one.settings)}": one for one in found}.values():
        if not any(arm.has(one.settings) for arm in arms if arm.name == one.arm):
            raise ConfigError(
                f"{out}/results.json: holds a run of {one.arm!r} with other settings; "
                "choose another --out, or judge what is there with --report-only"
            )


def _in_order(done: Mapping[tuple[str, int], RunResult], arms: Sequence[Arm]) -> list[RunResult]:
    """Results sorted by arm, in the order of the study, then by seed."""
    places = {arm.name: place for place, arm in enumerate(arms)}
    return [done[key] for key in sorted(done, key=lambda key: (places[key[0]], key[1]))]


def _load(path: Path) -> tuple[list[RunResult], list[Trial]]:
    if not path.exists():
        return [], []
    data = read_json(path)
    return [RunResult(**run) for run in data["runs"]], [Trial(**t) for t in data["trials"]]


def _save(
    out: Path,
    study: Study,
    machine: Mapping[str, Any],
    results: Sequence[RunResult],
    trials: Sequence[Trial],
    finding: Finding | None,
) -> None:
    write_json(
        {
            "study": study.name,
            "claim": study.claim,
            "hardware": machine,
            "finding": None if finding is None else asdict(finding),
            "trials": [asdict(trial) for trial in trials],
            "runs": [asdict(result) for result in results],
        },
        out / "results.json",
    )
