"""Training with thoughts: stages, the optimizer at their borders, resuming, and being asked."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from openmythos.eval.accuracy import accuracy_map, answers
from openmythos.model import presets
from openmythos.planning import cost
from openmythos.recipes import task_report
from openmythos.recurrence.loop_sampling import FixedLoops
from openmythos.studies.learning import TASK_TRAINING
from openmythos.tasks import Reachability
from openmythos.tasks.reasoning import (
    LatentThoughts,
    PauseThoughts,
    Thoughts,
    WrittenThoughts,
)
from openmythos.train.config import RunConfig, TaskData
from openmythos.train.run import Run, train
from openmythos.train.task_source import fitted, task_trainer

TASK = Reachability(num_nodes=8, num_names=10)
LATENTS = LatentThoughts(stage_share=0.25)  # of 8 steps, stages begin at 0, 2, 4 and 6


def config(thoughts: Thoughts, **changes: Any) -> RunConfig:
    data = TaskData(task=TASK, min_hops=2, first_hops=3, max_hops=3, thoughts=thoughts)
    usual = {"num_steps": 8, "batch_size": 4, "loops": FixedLoops(mean_loops=2)}
    how = replace(TASK_TRAINING, device="cpu", seq_len=1, **usual | changes)  # type: ignore[arg-type]
    return fitted(RunConfig(model=replace(presets.hops(), dim=32), data=data, train=how))


def test_the_loss_is_that_of_passes_with_latents() -> None:
    trainer = task_trainer(config(LATENTS))
    for _ in range(6):
        trainer.run_step()
        trainer.counters = replace(trainer.counters, step=trainer.step + 1)
    batch = trainer.source.batch(6)
    assert batch.latents is not None and int(batch.latents.sum()) == 4 * batch.latents[0].sum()
    with torch.no_grad():
        logits = trainer.model(batch.tokens, latents=batch.latents, num_loops=2).logits
    expected = F.cross_entropy(logits[:, -1], batch.targets[:, -1])
    step = trainer.run_step()
    assert step.loss == pytest.approx(float(expected), abs=1e-4)
    # One pass over all positions, and one up to each latent.
    seq, hops = batch.tokens.shape[1], int(batch.latents[0].sum())
    positions = seq + sum(seq - hops + n for n in range(hops))
    each = cost.Flops(trainer.model.config, trainer.source.seq_len)
    assert step.flops == pytest.approx(4 * positions * each.training(2))


def test_the_optimizer_starts_afresh_at_every_stage() -> None:
    for thoughts, borders in ((LATENTS, [2, 4, 6]), (WrittenThoughts(), [])):
        trainer, found = task_trainer(config(thoughts)), []
        seen = trainer.optimizers
        for metrics in trainer.steps():
            if trainer.optimizers is not seen:
                found.append(metrics.step)
            seen = trainer.optimizers
        assert found == borders


def test_a_run_resumed_within_or_before_a_stage_equals_the_whole(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", config(LATENTS))
    expected = [metrics.loss for metrics in task_trainer(run.config).steps()]
    found = []
    for more in (3, 1):
        steps = train(Run.open(run.folder), resume=bool(found))
        found += [next(steps).loss for _ in range(more)]
        steps.close()
    found += [metrics.loss for metrics in train(Run.open(run.folder), resume=True)]
    assert found == expected


@pytest.mark.parametrize("kind", [WrittenThoughts, PauseThoughts, LatentThoughts])
def test_a_model_answers_after_thoughts_of_its_own(tmp_path: Path, kind: Any) -> None:
    run = Run.create(tmp_path / "run", config(kind(), num_steps=1))
    list(train(run))
    model, hops = run.load_model("cpu"), 3
    question, steps = TASK.solved(5, hops, torch.Generator().manual_seed(10_000 + hops))
    given = answers(model, TASK, kind(), question.tokens, hops, num_loops=2)
    tokens = kind().written(question, steps, hops, TASK.vocab_size)
    with torch.no_grad():
        if kind is WrittenThoughts:
            for _ in range(hops + 1):
                last = model(question.tokens, num_loops=2).logits[:, -1:].argmax(dim=-1)
                question = question._replace(tokens=torch.cat((question.tokens, last), dim=1))
            expected = question.tokens[:, -1]
        else:
            out = model(tokens.tokens, latents=tokens.latents, num_loops=2)
            expected = out.logits[:, -1].argmax(dim=-1)
    assert torch.equal(given, expected)
    share = float((given == tokens.answers()).float().mean())
    asked = accuracy_map(model, TASK, (hops,), (2,), thoughts=kind(), examples=5)
    assert asked[hops][2] == pytest.approx(share)
    report = task_report.evaluate(run, (2,), device="cpu", examples=5)
    assert report.accuracy[hops][2] == pytest.approx(share)
