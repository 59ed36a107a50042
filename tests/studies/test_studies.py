"""The machinery of studies: arms, runs that are kept, verdicts by the rule, reports."""

import copy
import json
import math
import shutil
from concurrent.futures import Executor, Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from studies.made_up import chain_runs, run_of, two_runs

from openmythos import OpenMythos
from openmythos.analysis import plots
from openmythos.config import ConfigError, to_dict
from openmythos.files import read_json, write_json
from openmythos.model.inputs import token_layout
from openmythos.nn.layout import attention_context
from openmythos.nn.view import LayerView
from openmythos.studies import depth_extrapolation as chains
from openmythos.studies import learning, loop_use, runner
from openmythos.studies import test_time_depth as depth_of_text
from openmythos.studies.report import report_markdown
from openmythos.studies.statistics import (
    clopper_pearson,
    differs,
    mean_and_half_width,
    paired,
    percent,
    succeeded,
)
from openmythos.studies.storage import Stored, load, rule_of
from openmythos.studies.study import (
    Arm,
    Column,
    Finding,
    RunResult,
)

ARMS = {arm.name: arm for arm in chains.arms()}
RESULTS = Path(__file__).parents[2] / "results"


@pytest.mark.parametrize("name", runner.STUDIES)
def test_every_study_has_results(name: str) -> None:
    assert (RESULTS / name / "results.json").exists()


def test_a_stack_is_a_plain_transformer() -> None:
    """No loop, no injection: the state is the residual stream of a pre-norm transformer."""
    model = OpenMythos(learning.stacked(4, 32), seed=0).eval()
    tokens = torch.randint(20, (2, 9))
    out = model(tokens, num_loops=1)
    x = model.embed(tokens)
    layout = token_layout(model.config, tokens, None, None, None)
    assert model.config.attention.window == learning.WINDOW
    context = attention_context(layout, model.config.attention, 32)
    for layer in (*model.prelude, *model.recurrent.layers, *model.coda):
        x, _ = layer(x, LayerView(context))
    torch.testing.assert_close(out.logits, model.norm(x) @ model.head_weight.T)


def test_a_report_says_claim_verdict_and_what_is_not_shown(tmp_path: Path) -> None:
    results = chain_runs()
    machine = {"commit": "0" * 40, "dirty": True, "cpu": "a processor", "capability": "AVX2"}
    hops = Column("5 hops", lambda run: chains.right(run, 5), percent, ".2f")
    study = replace(
        chains.STUDY, columns=(hops,), setups=(("size", "30 M", "148 k"),), caption="Dots: seeds."
    )
    rule = rule_of(study, machine)
    stored = Stored(rule=rule, hardware=machine, runs=results, finding=chains.judge(results))
    text = report_markdown(study, stored)
    assert chains.STUDY.claim in text and "**Verdict: holds.**" in text
    assert all(point in text for point in chains.STUDY.not_shown)
    assert text.count("\n| ") == 3 + 2 * (1 + len(ARMS))
    paper, here = chains.STUDY.paper, chains.judge(results).brief
    assert f"| result | {paper} | {here.rstrip('.')} |" in text
    assert (
        "| size | 30 M | 148 k |" in text and "| looped, to 20 hops | 1.00, 1.00 | 1,000 |" in text
    )
    assert "with uncommitted changes" in text and "*Dots: seeds.*" in text
    assert str(rule["words"]) in text and "changed after the first run" not in text
    assert "each on one thread of a processor (AVX2), at commit" in text
    two = [replace(results[0], machine="a GPU"), *results[1:]]
    several = report_markdown(study, replace(stored, runs=two))
    assert (
        f"a GPU (1 of {len(two)} runs), a processor (AVX2) ({len(two) - 1} of {len(two)} runs), at"
        in several
    )
    moved = replace(stored, rule=rule | {"sha256": "another"})
    assert "The verdict rule or its bars changed after the first run" in report_markdown(
        study, moved
    )
    figure, rows = chains.draw(results)
    runner.plots.save_figure(figure, tmp_path / "figure.png", rows)
    assert imread(tmp_path / "figure.png").std() > 0.01
    assert len(rows) == sum(len(shares) for r in results for shares in r.curve.values())


def test_intervals() -> None:
    mean, half = mean_and_half_width([0.9, 1.0, 0.8])
    assert mean == pytest.approx(0.9) and half == pytest.approx(4.302653 * 0.1 / 3**0.5)
    assert percent([0.5]) == "50.0" and percent([0.5, 0.5]) == "50.0 ± 0.0"
    assert percent([1.0, 1.0]) == "100.0 ± 0.0" and percent([0.4, 0.41]) == "40.5 ± 6.4"
    # No share is above 100% or below 0: then the extremes, not the interval.
    assert percent([1.0, 1.0, 1.0, 1.0, 0.1]) == "82.0 (10.0 to 100.0)"
    assert percent([0.0, 0.02, 0.0]) == "0.7 (0.0 to 2.0)"
    assert differs([0.1, 0.11, 0.12]) and not differs([0.1, -0.11, 0.12])
    assert not differs([0.1])
    assert paired({0: 2.0, 1: 3.0, 2: 9.0}, {1: 1.0, 0: 1.5}) == [0.5, 2.0]
    # The exact intervals of the tables: 4 of 5 and 5 of 5.
    assert clopper_pearson(4, 5) == pytest.approx((0.2836, 0.9949), abs=1e-4)
    assert clopper_pearson(5, 5) == pytest.approx((0.4782, 1.0), abs=1e-4)
    assert clopper_pearson(0, 5) == pytest.approx((0.0, 0.5218), abs=1e-4)
    assert succeeded([1.0, 0.99, 0.1], 0.99) == "2 of 3 (9 to 99%)"


def test_quick_runs_everything_once_and_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = [ARMS[chains.TO_20], replace(ARMS[chains.STACK_10], rates=(), most_seeds=1)]
    finding = Finding("holds", "", [{"arm": "one"}], "")
    study = replace(chains.STUDY, arms=lambda: two, judge=lambda _runs: finding)
    # What the processes of the pool import has its name only.
    monkeypatch.setattr(runner, "rule_of", lambda study, machine: {"words": "", "commit": "0"})
    monkeypatch.setattr(runner, "report_markdown", lambda study, stored: stored.rule["commit"])
    news: list[tuple[int, int, str]] = []

    def run(**changes: Any) -> None:
        news.clear()
        runner.run_study(
            study,
            tmp_path,
            **({"seeds": 1, "quick": True} | changes),
            on_progress=lambda *event: news.append(event),
        )

    run(processes=1)
    assert [(done, total) for done, total, _ in news] == [(0, 2), (1, 2), (2, 2), (2, 2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("figure.csv", "figure.png", "report.md", "results.json")
    ]
    first = read_json(tmp_path / "results.json")
    assert {r["arm"] for r in first["runs"]} == {chains.TO_20, chains.STACK_10}
    assert all(r["training_flops"] > 0 and r["seconds"] > 0 for r in first["runs"])
    assert all(1.0 < r["validation"] < 10.0 for r in first["runs"])
    monkeypatch.setattr(runner, "worker_pool", Here)
    monkeypatch.setattr(runner, "rule_of", lambda study, machine: {"commit": "later"})
    run()
    assert [done for done, _, _ in news] == [2, 2]  # nothing is run again
    assert read_json(tmp_path / "results.json")["runs"] == first["runs"]
    assert (tmp_path / "report.md").read_text() == "0"  # the rule as it was before the first run
    run(seeds=2)
    assert [(done, total) for done, total, _ in news] == [(2, 3), (3, 3), (3, 3)]
    run()  # fewer seeds lose nothing
    more = read_json(tmp_path / "results.json")
    assert [(r["arm"], r["seed"]) for r in more["runs"]] == [
        *((chains.TO_20, 0), (chains.TO_20, 1), (chains.STACK_10, 0)),
    ]
    # Each seed has facts of its own.
    worlds = [r["settings"]["data"]["task"]["facts_seed"] for r in more["runs"]]
    assert worlds == [0, 1, 0]
    for others in ({"overrides": ["train.num_steps=2"]}, {"quick": False}):
        with pytest.raises(ConfigError, match="with other settings; choose another --out"):
            run(**others)
    assert read_json(tmp_path / "results.json") == more


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of results/ of what --report-only reads."""
    folder = tmp_path_factory.mktemp("results")
    for name in runner.STUDIES:
        (folder / name).mkdir()
        shutil.copy(RESULTS / name / "results.json", folder / name)
    return folder


@pytest.mark.parametrize("name", runner.STUDIES)
def test_what_is_committed_is_what_the_rules_say_of_the_kept_runs(
    name: str, committed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "save_figure", lambda *_: None)
    study = runner.get(name)
    monkeypatch.setattr(runner, "run_arm", None)  # nothing is trained
    runner.judge_kept(replace(study, draw=lambda _: (None, [])), committed / name)
    for file in ("results.json", "report.md"):
        stored = (RESULTS / name / file).read_text(encoding="utf-8")
        assert (committed / name / file).read_text(encoding="utf-8") == stored, (
            f"openmythos study {name} --report-only"
        )


@pytest.mark.parametrize("name", runner.STUDIES)
def test_stored_runs_can_be_extended(name: str) -> None:
    stored = load(RESULTS / name / "results.json")
    assert stored is not None
    runner.require_resumable(Path(), stored, runner.get(name).arms())


def test_runs_of_unfinished_studies_can_be_extended() -> None:
    for path in (RESULTS / "unfinished").glob("*/results.json"):
        assert path.parent.name in runner.STUDIES
        stored = load(path)
        assert stored is not None and stored.runs
        runner.require_resumable(Path(), stored, runner.get(path.parent.name).arms())


def test_runs_on_the_source_of_another_python_are_not_extended(tmp_path: Path) -> None:
    study = runner.get("test-time-depth")
    shutil.copy(RESULTS / study.name / "results.json", tmp_path)
    data = read_json(tmp_path / "results.json")
    data["hardware"]["python"] = "3.9.0"
    write_json(data, tmp_path / "results.json")
    with pytest.raises(ConfigError, match=r"made with Python 3\.9\.0, whose source is the text"):
        runner.run_study(study, tmp_path, seeds=6, quick=False)


def test_runs_of_another_study_are_refused(committed: Path, tmp_path: Path) -> None:
    data = read_json(committed / "test-time-depth" / "results.json")
    changed = tmp_path / "results.json"
    study = runner.get("test-time-depth")
    for damage, message in (
        (
            lambda runs: runs[0]["settings"]["model"].update(dim=48),
            "a run of 'per sequence' with",
        ),
        (
            lambda runs: runs[0].update(arm="another"),
            "holds a run of 'another' with other settings",
        ),
        (lambda runs: runs.clear(), "has no run of 'per batch', 'per sequence'"),
    ):
        other = copy.deepcopy(data)
        damage(other["runs"])
        changed.write_text(json.dumps(other), encoding="utf-8")
        with pytest.raises(ConfigError, match=message):
            runner.judge_kept(study, tmp_path)
        assert json.loads(changed.read_text(encoding="utf-8")) == other
    changed.unlink()
    with pytest.raises(ConfigError, match="is not there: no runs to judge"):
        runner.judge_kept(study, tmp_path)


def test_unknown_studies_are_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'depth-extrapolation'"):
        runner.get("depth-extrapolatio")


class Here(Executor):
    """A pool that works in this process: starting others takes longer than a quick run."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def submit(self, work: Any, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(work(*arguments))
        return future


def test_rates_are_chosen_inside_a_grid_that_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean of three seeds is least at 4, beyond the grid of 1 and 2; at 8 a seed diverges."""
    arm = replace(ARMS[chains.STACK_10], rates=(1.0, 2.0), trial_seeds=3)
    losses: dict[float, tuple[float | None, ...]] = {
        1.0: (0.7, 0.7, 0.7),
        2.0: (0.5, 0.1, 0.8),
        4.0: (0.1, 0.1, 0.9),
        8.0: (0.1, 0.1, None),
    }

    def made_up(work: Any, arm: Arm, seed: int, *, measured: bool = True) -> RunResult:
        loss = losses[arm.rate][seed - runner.TRIAL_SEED] if not measured else 0.0
        assert measured == (seed < runner.TRIAL_SEED)
        return RunResult(arm.name, seed, to_dict(arm.run), {}, 1, 1.0, 2.0, "", loss)

    study = replace(
        chains.STUDY,
        arms=lambda: [arm],
        judge=lambda _runs: Finding("holds", "", [{"arm": "one"}], ""),
        draw=lambda _runs: (plots.new_figure(), [{"arm": "one"}]),
        columns=(),
    )
    monkeypatch.setattr(runner, "run_arm", made_up)
    monkeypatch.setattr(runner, "worker_pool", Here)
    monkeypatch.setattr(runner, "rule_of", lambda *_: {})
    monkeypatch.setattr(runner, "report_markdown", lambda *_: "")
    monkeypatch.setattr(runner, "get", lambda _: study)
    monkeypatch.setattr(Arm, "quick", lambda arm: arm)
    totals: list[int] = []
    runner.run_study(
        study, tmp_path, seeds=1, quick=True, on_progress=lambda _, total, __: totals.append(total)
    )
    data = read_json(tmp_path / "results.json")
    assert sorted(t["rate"] for t in data["trials"]) == [1.0, 2.0, 4.0, 8.0]
    assert all(trial["seconds"] == 6.0 for trial in data["trials"])
    assert data["runs"][0]["settings"]["train"]["optimizer"]["lr"] == 4.0
    assert totals[0] == 3 and totals[-1] == 5


# Beside depth-extrapolation above; the others, those of text too, are alike.
QUICK = {"unseen-compositions"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name not in QUICK else [])
        for name in runner.STUDIES
        if name != chains.STUDY.name
    ],
)
def test_every_study_runs_quick_with_figure_and_report(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "worker_pool", Here)
    study = runner.get(name)
    finding = runner.run_study(study, tmp_path, seeds=1, quick=True)
    assert finding.sentence and len({tuple(row) for row in finding.table}) == 1
    assert imread(tmp_path / "figure.png").std() > 0.01
    assert study.claim in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("name", runner.STUDIES)
def test_arms_have_names_of_their_own_and_the_same_factors(name: str) -> None:
    arms = list(runner.get(name).arms())
    assert len({arm.name for arm in arms}) == len(arms)
    assert all(arm.factors.keys() == arms[-1].factors.keys() for arm in arms if arm.factors)


def depth_runs(gain: float, **changes: float) -> list[RunResult]:
    """Loss falls by `gain` from 1 loop to many, exponentially; `changes` to what is measured."""
    costs = {"exact": 4.0, "groups of 2": 4.01, "last loop": 4.01, "first loop": 4.1}

    def run(arm: Arm, seed: int) -> RunResult:
        later = changes.get("drift", 0.0)
        curve = {n: 4.0 + gain * math.exp(1 - n) + later * (n > 40) for n in depth_of_text.LOOPS}
        if arm.name == depth_of_text.PER_BATCH:
            curve[1] += changes.get("apart", 0.1)
        policies = costs | {"last loop": 4.0 + changes.get("last", 0.01)}
        found = {"nats_by_loops": {str(n): x for n, x in curve.items()}, "nats_by_policy": policies}
        return run_of(arm.name, found, seed)

    return [run(arm, seed) for arm in depth_of_text.arms() for seed in (0, 1)]


def test_a_model_that_does_not_use_its_loops_tests_no_law_of_loops() -> None:
    used = depth_of_text.judge(depth_runs(0.2))
    assert used.verdict == "holds" and "at least 0.1): met." in used.sentence
    idle = depth_of_text.judge(depth_runs(0.05))
    assert idle.verdict == "premise not met" and "not met." in idle.sentence
    for change in ({"apart": 0.01}, {"last": 0.05}):
        assert depth_of_text.judge(depth_runs(0.2, **change)).verdict == "holds in part"
    # A loss that rises beyond training is not what either law says.
    assert depth_of_text.judge(depth_runs(0.2, drift=0.1)).verdict == "does not hold here"
    assert "groups of 2" in str(used.table[0].keys())


def test_loops_are_used_where_nothing_else_does_their_work() -> None:
    def judged(changes: dict[str, float], base: float = 0.4) -> Finding:
        gains = {arm.name: base for arm in loop_use.arms()}
        gains |= dict.fromkeys(loop_use.TAKES, 0.1 * base) | changes
        curves = {name: {"1": 4.0, "4": 4.0 - gain} for name, gain in gains.items()}
        return loop_use.judge(
            [run for name, curve in curves.items() for run in two_runs(name, curve)]
        )

    assert judged({}).verdict == "holds"
    assert judged({"experts": 0.2}).verdict == "holds in part"
    assert judged({"untied head": 0.3}).verdict == "holds in part"
    assert judged({"prelude and coda": 0.3}).verdict == "does not hold here"
    assert judged({}, base=0.05).verdict == "premise not met"
    assert "at a lower loss" not in judged({}).brief


def test_a_law_is_recognised_beyond_what_it_was_fitted_on() -> None:
    exponential = {n: 2 + math.exp(-0.5 * n) for n in depth_of_text.LOOPS}
    power = {n: 2 + 0.5 * n**-0.7 for n in depth_of_text.LOOPS}
    for curve, law, other in (
        (exponential, "exponential", "power law"),
        (power, "power law", "exponential"),
    ):
        within, beyond = depth_of_text.law_error(curve, law)
        assert within < 1e-3 and beyond < 2e-3
        assert depth_of_text.law_error(curve, other)[1] > 5 * beyond
