"""Run a study: seeds in parallel processes, results kept as they come, then report and figure."""

import json
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from openmythos.analysis import plots
from openmythos.config import (
    ConfigError,
    apply_overrides,
    read_json,
    unknown_name,
    write_atomically,
    write_json,
)
from openmythos.machine import describe, keep_freed_memory
from openmythos.model import cost
from openmythos.model.mythos import OpenMythos
from openmythos.studies import depth_extrapolation
from openmythos.studies.learning import learn
from openmythos.studies.study import Arm, Finding, RunResult, Study, report_markdown

STUDIES: dict[str, Study] = {study.name: study for study in (depth_extrapolation.STUDY,)}


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
    told: Callable[[int, int, str], None] | None = None,
) -> Finding:
    """All runs that results.json lacks, then results.json, report.md, figure.png in `out`.

    Runs found there are kept, those of further seeds too; where they are not of these arms and
    settings, nothing is touched. `told` hears (runs done, runs in all, what was done last).
    """
    arms = [apply_overrides(arm.quick() if quick else arm, overrides) for arm in study.arms()]
    out.mkdir(parents=True, exist_ok=True)
    wanted = [(arm, seed) for seed in range(seeds) for arm in arms]
    settings = {arm.name: arm.settings() for arm in arms}
    done = {(r.arm, r.seed): r for r in _load(out / "results.json")}
    for name, seed in done:
        if not _same(done[name, seed].settings, settings.get(name)):
            raise ConfigError(
                f"{out}/results.json: holds a run of {name!r}, seed {seed}, with other settings; "
                "choose another --out"
            )
    todo = [(arm, seed) for arm, seed in wanted if (arm.name, seed) not in done]
    total = len(done) + len(todo)
    if told is not None:
        told(len(done), total, "kept")
    machine = describe()
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context)
    try:
        futures = [pool.submit(run_arm, study.name, arm, seed, quick) for arm, seed in todo]
        for future in as_completed(futures):
            result = future.result()
            result = replace(result, commit=str(machine["commit"]))
            done[result.arm, result.seed] = result
            _save(out, study, machine, _in_order(done, arms))
            if told is not None:
                told(len(done), total, f"{result.arm}, seed {result.seed}")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    results = _in_order(done, arms)
    finding = study.judge(results)
    _save(out, study, machine, results, finding)
    write_atomically(out / "report.md", report_markdown(study, results, finding))
    figure, rows = study.draw(results)
    plots.save_figure(figure, out / "figure.png", rows)
    return finding


def run_arm(study: str, arm: Arm, seed: int, quick: bool) -> RunResult:
    """One arm with one seed, on one thread."""
    torch.set_num_threads(1)
    keep_freed_memory()
    started = time.perf_counter()
    model = OpenMythos(arm.model, seed=seed)
    flops = sum(progress.flops for progress in learn(model, arm.task, arm.learning, seed))
    curve = get(study).measure(model, arm, quick)
    return RunResult(
        arm=arm.name,
        seed=seed,
        settings=arm.settings(),
        curve=curve,
        parameters=cost.parameters(arm.model).total,
        training_flops=flops,
        seconds=round(time.perf_counter() - started, 1),
        commit="",
    )


def _in_order(done: Mapping[tuple[str, int], RunResult], arms: Sequence[Arm]) -> list[RunResult]:
    """By arm as the study lists them, then by seed."""
    places = {arm.name: place for place, arm in enumerate(arms)}
    return [done[key] for key in sorted(done, key=lambda key: (places[key[0]], key[1]))]


def _same(one: Any, other: Any) -> bool:
    """Equal as they are written: JSON turns tuples into lists and keys into text."""
    return bool(json.loads(json.dumps(one)) == json.loads(json.dumps(other)))


def _load(path: Path) -> list[RunResult]:
    if not path.exists():
        return []
    data = read_json(path)
    return [RunResult(**run) for run in data["runs"]]


def _save(
    out: Path,
    study: Study,
    machine: Mapping[str, Any],
    results: Sequence[RunResult],
    finding: Finding | None = None,
) -> None:
    write_json(
        {
            "study": study.name,
            "claim": study.claim,
            "hardware": machine,
            "finding": None if finding is None else asdict(finding),
            "runs": [asdict(result) for result in results],
        },
        out / "results.json",
    )
