"""Run a study: seeds in parallel processes, results saved one by one, then report and figure."""

import functools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from openmythos.analysis import plots
from openmythos.config import ConfigError, to_dict, unknown_name
from openmythos.eval.accuracy import task_loss
from openmythos.eval.likelihood import depth_sweep
from openmythos.files import write_atomically
from openmythos.machine import choose_device, describe, device_name, keep_freed_memory
from openmythos.planning import cost
from openmythos.processes import worker_pool
from openmythos.studies import (
    bounded_state,
    breadth_and_depth,
    capacity_and_manipulation,
    contrastive_loops,
    depth_extrapolation,
    experts_by_loop,
    in_context_hops,
    inside_the_loop,
    iso_parameter_text,
    latent_reasoning,
    linear_frontier,
    loop_use,
    looped_layers,
    looped_scaling,
    loops_against_tokens,
    lora_between_loops,
    ltg_as_published,
    stopping,
    test_time_depth,
    two_hops_in_english,
    universal_transformer,
    unseen_compositions,
    what_extrapolation_needs,
)
from openmythos.studies.report import report_markdown
from openmythos.studies.storage import Stored, load, rule_of, save
from openmythos.studies.study import Arm, Finding, RunResult, Study, Trial
from openmythos.studies.text import TextRun, corpus, text_trainer
from openmythos.train.config import RunConfig, TextData, TiedLoops
from openmythos.train.task_source import task_trainer
from openmythos.train.trainer import StepMetrics, Trainer

# First seed of trials, above those of runs: rates are not tuned on the reported runs.
TRIAL_SEED = 1000
# The grid of rates grows at most this often beyond the one that an arm asks for.
MOST_GROWTH = 3
_DIVERGED = 1e9  # the validation loss of a run whose loss is not finite

STUDIES: dict[str, Study] = {
    study.name: study
    for study in (
        depth_extrapolation.STUDY,
        what_extrapolation_needs.STUDY,
        looped_layers.STUDY,
        unseen_compositions.STUDY,
        bounded_state.STUDY,
        test_time_depth.STUDY,
        loop_use.STUDY,
        experts_by_loop.STUDY,
        lora_between_loops.STUDY,
        stopping.STUDY,
        breadth_and_depth.STUDY,
        loops_against_tokens.STUDY,
        latent_reasoning.STUDY,
        looped_scaling.STUDY,
        iso_parameter_text.STUDY,
        linear_frontier.STUDY,
        contrastive_loops.STUDY,
        inside_the_loop.STUDY,
        capacity_and_manipulation.STUDY,
        ltg_as_published.STUDY,
        in_context_hops.STUDY,
        universal_transformer.STUDY,
        two_hops_in_english.STUDY,
    )
}


def get(name: str) -> Study:
    """The study of that name."""
    if name not in STUDIES:
        raise ConfigError(f"study = {name!r}: {unknown_name('study', name, STUDIES)}")
    return STUDIES[name]


@dataclass(frozen=True)
class _Work:
    """What a worker process needs to know beside an arm and a seed."""

    study: str
    corpora: Path
    quick: bool
    device: str


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
    kept = load(out / "results.json")
    machine = describe() | {"device": name}
    stored = kept or Stored(rule=rule_of(study, machine))
    require_resumable(out, stored, arms)
    _require_same_text(out, stored, machine, arms)
    done = {(run.arm, run.seed): run for run in stored.runs}
    tried = {(trial.arm, trial.rate): trial for trial in stored.trials}
    wanted = [
        (arm.name, seed)
        for seed in range(seeds)
        for arm in arms
        if seed < (arm.most_seeds or seeds)
    ]

    def keep(what: str) -> None:
        trials, runs = list(tried.values()), _in_order(done, arms)
        missing = sum(len(_next_rates(arm, trials)) for arm in arms)
        if what != "kept":
            save(out, study, replace(stored, hardware=machine, runs=runs, trials=trials))
        if on_progress is not None:
            total = len(tried) + missing + len({*done, *wanted})
            on_progress(len(tried) + len(done), total, what)

    keep("kept")
    with tempfile.TemporaryDirectory() as folder, worker_pool(processes) as pool:
        work = _Work(study.name, Path(folder), quick, name)
        for arm in arms:
            if isinstance(arm.run.data, TextData):
                corpus(arm.run, work.corpora)
        for trial in _trials(pool, work, arms, tried):
            tried[trial.arm, trial.rate] = trial
            keep(f"{trial.arm}, learning rate {trial.rate:g}")
        chosen = {arm.name: _tuned(arm, list(tried.values())) for arm in arms}
        _require_own(out, stored.runs, list(chosen.values()))
        todo = [(chosen[name], seed) for name, seed in wanted if (name, seed) not in done]
        for result in _finished(pool, run_arm, work, todo):
            done[result.arm, result.seed] = replace(result, commit=str(machine["commit"]))
            keep(f"{result.arm}, seed {result.seed}")
    stored = replace(
        stored, hardware=machine, runs=_in_order(done, arms), trials=list(tried.values())
    )
    finding = _concluded(out, study, stored)
    if on_progress is not None:
        on_progress(len(tried) + len(done), len(tried) + len(done), "judged")
    return finding


def judge_kept(study: Study, out: Path) -> Finding:
    """Judge the runs of out/results.json by the current rule; write report and figure again.

    Nothing is trained. Every run must have the settings of an arm, at any learning rate.
    """
    path = out / "results.json"
    stored = load(path)
    if stored is None:
        raise ConfigError(f"{path}: is not there: no runs to judge")
    arms = study.arms()
    _require_own(out, stored.runs, _at_rates_of(stored.runs, arms))
    missing = sorted({arm.name for arm in arms} - {run.arm for run in stored.runs})
    if missing:
        raise ConfigError(f"{path}: has no run of {', '.join(map(repr, missing))}")
    runs = _in_order({(run.arm, run.seed): run for run in stored.runs}, arms)
    return _concluded(out, study, replace(stored, runs=runs))


def _concluded(out: Path, study: Study, stored: Stored) -> Finding:
    """Judge, and write results.json, report.md and the figure."""
    finding = study.judge(stored.runs)
    stored = replace(stored, finding=finding)
    save(out, study, stored)
    write_atomically(out / "report.md", report_markdown(study, stored))
    figure, rows = study.draw(stored.runs)
    plots.save_figure(figure, out / "figure.png", rows)
    return finding


def run_arm(work: _Work, arm: Arm, seed: int, *, measured: bool = True) -> RunResult:
    """One arm with one seed, on one thread; its curve is empty unless `measured`."""
    torch.set_num_threads(1)
    keep_freed_memory()
    started = time.process_time()
    arm = arm.in_world(seed)
    run = replace(arm.run, train=replace(arm.run.train, seed=seed, device=work.device))
    on_text = isinstance(run.data, TextData)
    text = corpus(run, work.corpora) if on_text else {}
    trainer = text_trainer(run, text["train"]) if on_text else task_trainer(run)
    history: list[StepMetrics] = []
    by_step = {}
    study, steps = get(work.study), run.train.num_steps
    snapshots = study.snapshots if measured else 0

    def measure() -> dict[str, Any]:
        model = trainer.model
        trained = TextRun(model, tuple(history), text["held_out"]) if on_text else model
        return study.measure(trained, arm, work.quick)

    for metrics in trainer.steps():
        history.append(metrics)
        done = metrics.step + 1
        if done * snapshots // steps > metrics.step * snapshots // steps:
            by_step[str(done)] = measure()
    curve = measure() if measured else {}
    return RunResult(
        arm=arm.name,
        seed=seed,
        settings=to_dict(arm.run),
        curve=curve | ({"by_step": by_step} if by_step else {}),
        parameters=cost.parameters(arm.model).total,
        training_flops=sum(step.flops for step in history),
        validation=_validation(study, trainer, run, text),
        seconds=round(time.process_time() - started, 3),
        commit="",
        machine=device_name(trainer.model.device),
    )


def _validation(
    study: Study, trainer: Trainer, run: RunConfig, text: Mapping[str, Any]
) -> float | None:
    """Mean loss on text or problems that are never reported, at training's loops; None if nan."""
    loss = _loss(study, trainer, run, text)
    return loss if math.isfinite(loss) else None


def _loss(study: Study, trainer: Trainer, run: RunConfig, text: Mapping[str, Any]) -> float:
    model, data = trainer.model, run.data
    if study.score is not None:
        return study.score(model, run)
    if isinstance(data, TextData):
        loops, how = run.model.num_loops, run.train
        found = depth_sweep(model, text["validation"], [loops], seq_len=how.seq_len, batch_size=16)
        return found[loops].nats_per_token
    extra = run.train.loops.extra // 2 if isinstance(run.train.loops, TiedLoops) else None
    return task_loss(
        model,
        data.task,
        range(data.min_hops, data.max_hops + 1),
        lambda hops: run.model.num_loops if extra is None else hops + extra,
    )


def _trials(
    pool: Executor, work: _Work, arms: Sequence[Arm], tried: Mapping[tuple[str, float], Trial]
) -> Iterator[Trial]:
    """Trials of learning rates that are missing, each when all its seeds are done.

    The caller adds each to `tried`; an arm's grid grows while its best rate is at an edge.
    """
    one = functools.partial(run_arm, measured=False)
    while rates := [arm.at_rate(r) for arm in arms for r in _next_rates(arm, [*tried.values()])]:
        seeds = [(arm, TRIAL_SEED + n) for arm in rates for n in range(arm.trial_seeds)]
        wanted = {arm.name: arm.trial_seeds for arm in rates}
        found: dict[tuple[str, float], list[RunResult]] = {}
        for result in _finished(pool, one, work, seeds):
            same = found.setdefault((result.arm, result.rate), [])
            same.append(result)
            if len(same) == wanted[result.arm]:
                yield _trial(same)


def _next_rates(arm: Arm, trials: Sequence[Trial]) -> list[float]:
    """The rates to try next: those asked for, then one beyond an edge that is the best."""
    if not arm.rates:
        return []
    tried = sorted(trial.rate for trial in trials if trial.arm == arm.name)
    if missing := [rate for rate in arm.rates if rate not in tried]:
        return missing
    if len(tried) >= len(arm.rates) + MOST_GROWTH:
        return []
    best, ratio = _tuned(arm, trials).rate, arm.rates[-1] / arm.rates[-2]
    if best == tried[-1]:
        return [best * ratio]
    return [best / ratio] if best == tried[0] else []


def _trial(runs: Sequence[RunResult]) -> Trial:
    """Combine runs of one arm at one learning rate, with different seeds, into a trial."""
    losses = [_DIVERGED if run.validation is None else run.validation for run in runs]
    loss = statistics.mean(losses)
    seconds = round(sum(run.seconds for run in runs), 3)
    return Trial(runs[0].arm, runs[0].rate, runs[0].settings, -loss, seconds)


def _tuned(arm: Arm, trials: Sequence[Trial]) -> Arm:
    """The arm at the rate with the best fit; the lowest of equal ones."""
    name = arm.tuned_as or arm.name
    own = sorted((t for t in trials if t.arm == name), key=lambda trial: trial.rate)
    return arm.at_rate(max(own, key=lambda trial: trial.fit).rate) if own else arm


def _finished(
    pool: Executor,
    run: Callable[[_Work, Arm, int], RunResult],
    work: _Work,
    todo: Sequence[tuple[Arm, int]],
) -> Iterator[RunResult]:
    """Runs of (arm, seed), in the order in which they finish."""
    futures = [pool.submit(run, work, arm, seed) for arm, seed in todo]
    for future in as_completed(futures):
        yield future.result()


def require_resumable(out: Path, stored: Stored, arms: Sequence[Arm]) -> None:
    """Raise a ConfigError unless these arms can go on with what is stored."""
    for found in (stored.trials, stored.runs):
        _require_own(out, found, _at_rates_of(found, arms))


def _require_same_text(
    out: Path, stored: Stored, machine: Mapping[str, Any], arms: Sequence[Arm]
) -> None:
    """Raise a ConfigError if runs were made with the standard library of another Python."""
    data = [arm.run.data for arm in arms if isinstance(arm.run.data, TextData)]
    before, now = stored.hardware.get("python", machine["python"]), machine["python"]
    if before != now and any("stdlib" in one.paths for one in data):
        raise ConfigError(
            f"{out}/results.json: was made with Python {before}, whose source is the text to "
            f"learn; this is Python {now}: choose another --out"
        )


def _at_rates_of(found: Sequence[RunResult] | Sequence[Trial], arms: Sequence[Arm]) -> list[Arm]:
    """The arms at every learning rate that was stored of them."""
    rates = {(one.arm, one.rate) for one in found}
    return [arm.at_rate(rate) for arm in arms for name, rate in rates if name == arm.name]


def _require_own(
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
