"""Batches of tasks under a curriculum, and what the trainer makes of them."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from openmythos import OpenMythos
from openmythos.config import ConfigError, from_dict, to_dict
from openmythos.eval.accuracy import accuracy_map
from openmythos.model import presets
from openmythos.model.config import MythosConfig
from openmythos.nn.moe import MoE
from openmythos.planning import cost
from openmythos.recipes import catalogue, report, task_report
from openmythos.recurrence.halting import ACT
from openmythos.recurrence.loop_sampling import (
    FixedLoops,
    LinearCurriculum,
    PoissonLoops,
    UniformLoops,
)
from openmythos.studies import depth_extrapolation
from openmythos.studies.learning import TASK_TRAINING, on_task
from openmythos.tasks import FactPairs, KHop, Parity, Reachability, Task
from openmythos.train.checkpoint import list_checkpoints
from openmythos.train.config import RunConfig, TaskData, TextData, TiedLoops, TrainConfig
from openmythos.train.metrics import read_metrics
from openmythos.train.optim import AdamW
from openmythos.train.overview import find_runs, summarize
from openmythos.train.run import Run, train
from openmythos.train.task_source import TaskSource, task_trainer
from openmythos.train.trainer import StepMetrics, Trainer

PINNED = json.loads(Path(__file__).with_name("pinned_tasks.json").read_text())
BASE = replace(presets.hops(), dim=32)
EASY = TaskData(max_hops=6, mastery=1e-3)
SMALL = replace(
    TASK_TRAINING, num_steps=12, batch_size=8, loops=TiedLoops(extra=2), seed=3, device="cpu"
)
SPLIT = FactPairs(num_entities=12, num_relations=6, per_fact=3.0)
EXPERTS = MoE(num_experts=4, top_k=2, expert_dim=16, num_shared_experts=1)
DRAWN = PoissonLoops(mean_loops=4.0, max_loops=8)
# As they were when the studies had a training loop of their own.
ARMS: dict[str, tuple[MythosConfig, Task, TrainConfig, dict[str, Any]]] = {
    "tied": (BASE, KHop(), SMALL, {}),
    "never": (BASE, KHop(), SMALL, {"mastery": 1.0}),
    "sequence": (
        BASE,
        KHop(supervision="answer"),
        replace(SMALL, loops=DRAWN, backprop_loops=2),
        {},
    ),
    "batch": (
        replace(BASE, recurrent_feed_forward=EXPERTS),
        KHop(),
        replace(SMALL, loops=UniformLoops(max_loops=6, per="batch")),
        {},
    ),
    "act": (replace(BASE, halting=ACT(ponder_weight=1e-3)), KHop(), SMALL, {}),
    "pairs": (
        replace(BASE, vocab_size=SPLIT.vocab_size),
        SPLIT,
        replace(SMALL, loops=TiedLoops(extra=3)),
        {"min_hops": 1, "first_hops": 2, "max_hops": 2},
    ),
}


def hash_of(*tensors: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for x in tensors:
        digest.update(x.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@pytest.mark.parametrize("name", ARMS)
def test_runs_are_those_of_the_stored_studies(name: str) -> None:
    """Batches to the bit, losses as near as processors agree."""
    model, task, training, hops = ARMS[name]
    usual = {"max_hops": 6, "first_hops": 2, "mastery": 1e-3}
    trainer = task_trainer(on_task(model, task, training, **usual | hops))
    source = trainer.source
    assert isinstance(source, TaskSource)
    found: list[StepMetrics] = []
    batches, loops = [], []
    for metrics in trainer.steps():
        drawn = source._draw(metrics.step)
        batches.append(hash_of(*drawn.problems[:3]))
        loops.append(drawn.loops)
        found.append(metrics)
    pinned = PINNED[name]
    assert batches == pinned["batches"]
    assert loops == pinned["loops"]
    assert [metrics.data["hops"] for metrics in found] == pinned["reach"]
    assert [metrics.loss for metrics in found] == pytest.approx(pinned["losses"], rel=1e-4)


def source_of(data: TaskData = EASY, seed: int = 1, **ranks: int) -> TaskSource:
    training = replace(SMALL, batch_size=6, seed=seed, seq_len=7)
    return TaskSource(RunConfig(model=BASE, data=data, train=training), **ranks)


def right(source: TaskSource, step: int) -> None:
    """The step is learned, and every answer right."""
    answers = source._draw(step).problems.answers()
    source.learned(step, lambda _tokens: torch.nn.functional.one_hot(answers, 26).float())


def drawn(source: TaskSource, step: int) -> tuple[Any, ...]:
    batch = source.batch(step)
    return hash_of(batch.tokens, batch.targets), source.loops(step), source.reach


def test_a_batch_is_a_function_of_seed_step_and_state() -> None:
    source, states, found = source_of(), [], []
    for step in range(8):
        found.append(drawn(source, step))
        right(source, step)
        states.append(source.state())
    assert source.reach == 6 and found[0][2] == 2
    for step in (7, 3, 5):  # at any step, and backwards
        other = source_of()
        other.load(json.loads(json.dumps(states[step - 1])))
        assert drawn(other, step) == found[step]
        assert source.batch(step).tokens.equal(other.batch(step).tokens)
    assert drawn(source_of(seed=2), 0) != found[0]


def test_ranks_share_what_one_would_read() -> None:
    whole = source_of()
    for step in range(3):
        parts = [source_of(rank=rank, world_size=3).batch(step) for rank in range(3)]
        assert torch.cat([part.tokens for part in parts]).equal(whole.batch(step).tokens)
    with pytest.raises(ConfigError, match="batch_size = 6: must divide by world_size = 4"):
        source_of(world_size=4)


def test_the_curriculum_grows_with_mastery_alone() -> None:
    def reached(data: TaskData) -> list[int]:
        source = source_of(data)
        found = []
        for step in range(40):
            source.batch(step)
            right(source, step)
            found.append(source.reach)
        return found

    assert set(reached(replace(EASY, mastery=1.0))) == {2}
    grown = reached(replace(EASY, mastery=0.8))
    assert grown == sorted(grown) and set(grown) == {2, 4, 6}


def test_learning_learns() -> None:
    task = KHop(num_entities=5, num_relations=2)
    changes = {"num_steps": 60, "loops": TiedLoops(extra=1), "optimizer": AdamW(lr=1e-2)}
    training, model = replace(TASK_TRAINING, **changes), replace(BASE, vocab_size=task.vocab_size)
    trainer = task_trainer(on_task(model, task, training, max_hops=2, first_hops=1))
    losses = [metrics.loss for metrics in trainer.steps()]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    found = accuracy_map(trainer.model, task, (1, 2), (1, 4))
    assert set(found) == {1, 2} and set(found[1]) == {1, 4}
    alone = accuracy_map(trainer.model, task, (1,), (4,))
    assert alone[1][4] == found[1][4]


def test_loops_without_gradient_cost_a_forward_pass_alone() -> None:
    fixed = FixedLoops(mean_loops=10)
    some = replace(TASK_TRAINING, num_steps=2, batch_size=4, loops=fixed, backprop_loops=2)
    once = cost.Flops(BASE, 4).forward(0)
    per_loop = cost.Flops(BASE, 4).forward(1) - once
    tokens = 4 * (3 + 1)
    for training, passes in ((some, 10 + 2 * 2), (replace(some, backprop_loops=0), 30)):
        config = on_task(BASE, KHop(), training, min_hops=3, first_hops=3, max_hops=3)
        step = next(task_trainer(config).steps())
        assert step.tokens == tokens
        assert step.flops == pytest.approx(tokens * (3 * once + passes * per_loop), rel=1e-3)


def small_run(folder: Path, **changes: Any) -> Run:
    """Three steps of recipe hops, small; it grows at once."""
    config = catalogue.get("hops")
    data = replace(config.data, max_hops=6, mastery=1e-3)
    given = {"num_steps": 6, "batch_size": 4, "save_every": 2, "log_every": 1, "device": "cpu"}
    how = replace(config.train, **(given | changes))
    return Run.create(folder, replace(config, model=BASE, data=data, train=how))


def weights_of(run: Run) -> Iterator[torch.Tensor]:
    return iter(run.load_model().state_dict().values())


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = small_run(tmp_path / "whole")
    expected = [metrics.loss for metrics in train(whole)]
    halves = small_run(tmp_path / "halves")
    steps = train(halves)
    found = [next(steps).loss for _ in range(3)]
    steps.close()
    found += [metrics.loss for metrics in train(Run.open(halves.folder), resume=True)]
    assert found == expected
    assert all(map(torch.equal, weights_of(halves), weights_of(whole)))
    metrics = read_metrics(halves.folder)
    assert [entry["hops"] for entry in metrics] == [m["hops"] for m in read_metrics(whole.folder)]
    assert metrics[-1]["hops"] == 6 and all(entry["mfu"] > 0 for entry in metrics)
    assert len(list_checkpoints(whole.folder)) == 2


def test_a_run_on_a_task_has_no_text(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", num_steps=1)
    assert run.config.train.seq_len == 7
    list(train(run))
    assert sorted(path.name for path in run.folder.iterdir() if path.name != ".lock") == [
        *("checkpoints", "config.toml", "machine.json", "metrics.jsonl", "state.json")
    ]
    for what in ("tokenizer", "text"):
        with pytest.raises(ConfigError, match="was trained on a task, not on text"):
            getattr(Run.open(run.folder), what)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.toml").write_text("[tool]\n")
    assert list(find_runs(tmp_path)) == [run.folder]
    found = task_report.evaluate(run, (1, 3), device="cpu", examples=10)
    task_report.write_report(found, report.report_folder(run, (), None))
    summary = summarize(run.folder)
    assert (summary.state, summary.error, summary.bits_per_byte) == ("finished", "", None)


def test_a_run_is_asked_by_hops_and_loops(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", num_steps=1)
    list(train(run))
    progress: list[tuple[int, int]] = []
    found = task_report.evaluate(
        run, device="cpu", examples=10, progress=lambda *news: progress.append(news)
    )
    assert list(found.accuracy) == [2, 3, 4, 6, 8, 9, 12, 15, 18] and progress[-1] == (9, 9)
    assert list(found.accuracy[2]) == [2, 3, 4, 6, 8, 9, 12, 15, 18, 24, 30]
    expected = accuracy_map(run.load_model(), KHop(), (4,), (6,), examples=10)
    assert found.accuracy[4][6] == expected[4][6]
    task_report.write_report(found, tmp_path / "report")
    written = json.loads((tmp_path / "report" / "eval.json").read_text())
    assert written["task"]["task"]["kind"] == "k_hop" and len(written["accuracy"]) == 9 * 11
    assert (tmp_path / "report" / "hops.png").read_bytes().startswith(b"\x89PNG")


def test_only_hops_that_the_task_and_the_context_have_are_asked(tmp_path: Path) -> None:
    config = catalogue.get("hops")
    for task, context, most in ((Reachability(), 128, 11), (Parity(), 20, 20)):
        model = replace(BASE, context=context)
        data = replace(config.data, task=task, max_hops=10)
        how = replace(config.train, num_steps=1, batch_size=2, loops=FixedLoops(), seq_len=8)
        run = Run.create(tmp_path / task.kind, replace(config, model=model, data=data, train=how))
        list(train(run))
        found = task_report.evaluate(run, (1,), device="cpu", examples=2)
        assert 10 <= max(found.accuracy) <= most


def test_the_recipe_is_the_main_arm_of_its_study() -> None:
    (arm,) = (a for a in depth_extrapolation.arms() if a.name == depth_extrapolation.TO_20)
    recipe = catalogue.get("hops")
    own = {name: getattr(recipe.train, name) for name in ("log_every", "save_every")}
    assert replace(arm.run, train=replace(arm.run.train, **own)) == recipe


def test_configs_say_task_or_text_and_older_ones_mean_text() -> None:
    assert from_dict(RunConfig, {"data": {"paths": ["a"]}}).data == TextData(paths=("a",))
    recipe = catalogue.get("hops")
    assert from_dict(RunConfig, to_dict(recipe)) == recipe
    assert isinstance(recipe.data, TaskData)
    with pytest.raises(ConfigError, match=r"train\.loops\.kind = 'tied': follows the hops"):
        replace(recipe, data=TextData())
    with pytest.raises(ConfigError, match=r"train\.curriculum\.kind = 'linear': must be none"):
        replace(recipe, train=replace(recipe.train, curriculum=LinearCurriculum()))
    with pytest.raises(ConfigError, match="first_hops = 9: must be from min_hops = 1 to max_hops"):
        replace(recipe.data, first_hops=9, max_hops=8)


def test_a_problem_longer_than_the_context_is_refused_before_training(tmp_path: Path) -> None:
    config = catalogue.get("hops")
    config = replace(config, data=replace(config.data, max_hops=200))
    with pytest.raises(ConfigError, match=r"seq_len = 201: must be at most model\.context = 128"):
        Run.create(tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


def test_a_curriculum_is_not_asked_about_while_a_step_can_be_abandoned(tmp_path: Path) -> None:
    """Stopping in the pass that follows the weights' change would count a step as not done."""
    config = small_run(tmp_path / "run").config
    asked = []

    def stopping() -> bool:
        asked.append(trainer._changing)
        return False

    source = TaskSource(config)
    model = OpenMythos(config.model, seed=0)
    trainer = Trainer(model, source, config.train, stopping)
    assert len(list(trainer.steps())) == 6 and source.reach == 6
    assert asked and not any(asked)


def test_a_model_without_the_tokens_of_the_data_is_refused() -> None:
    config = catalogue.get("hops")
    with pytest.raises(ConfigError, match=r"model\.vocab_size = 20: the data need 26"):
        task_trainer(replace(config, model=replace(config.model, vocab_size=20)))
