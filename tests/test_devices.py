"""Tasks, evaluation and decoding live where the model does: on a second device, and on a GPU."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from second_device import moved, second_device

from openmythos import OpenMythos, presets
from openmythos.data.shards import TokenShards, write_shards
from openmythos.data.sources import Document
from openmythos.data.tokenizer import ByteTokenizer
from openmythos.eval.accuracy import accuracy_map
from openmythos.eval.likelihood import decoded_loss, depth_sweep
from openmythos.inference.generation import Request
from openmythos.inference.sampling import Sampling
from openmythos.inference.text import Engine
from openmythos.nn.cache import ExactCache
from openmythos.recurrence.exit_rules import StateChangeExit
from openmythos.recurrence.initial_state import NormalState, ZeroState
from openmythos.studies.learning import TASK_TRAINING, on_task
from openmythos.tasks import KHop
from openmythos.train.config import TiedLoops
from openmythos.train.task_source import task_trainer

TASK = KHop(num_entities=5, num_relations=2)
TRAINING = replace(TASK_TRAINING, num_steps=3, batch_size=4, loops=TiedLoops(extra=1), device="cpu")


def small(**changes: Any) -> OpenMythos:
    config = replace(presets.tiny(), vocab_size=257, **changes)
    return OpenMythos(config, seed=0)


@pytest.fixture
def shards(tmp_path: Path) -> TokenShards:
    documents = [Document(name="one", text="def f(x):\n    return x + 1\n" * 12)]
    return write_shards(documents, ByteTokenizer(), tmp_path)


def learned(model: OpenMythos) -> list[float]:
    config = on_task(model.config, TASK, TRAINING, max_hops=3, first_hops=2)
    trainer = task_trainer(config)
    # To a trainer the meta device, which the second one says it is, means weights to be made.
    trainer.model, trainer.device = model, model.device
    trainer.optimizers = TRAINING.optimizer.build(model)
    trainer._peak, trainer.logs = 1.0, lambda _step: False  # type: ignore[method-assign]
    losses = [metrics.loss for metrics in trainer.steps()]
    shares = accuracy_map(model, TASK, (2, 3), (1, 2), examples=4)
    return [*losses, *(share for row in shares.values() for share in row.values())]


def scored(model: OpenMythos, shards: TokenShards) -> list[float]:
    found = depth_sweep(model, shards, (1, 3), seq_len=32, batch_size=2)
    decoded = decoded_loss(model, shards, ExactCache(), num_loops=2, window=8, windows=2)
    return [*(one.nats_per_token for one in found.values()), decoded]


def generated(model: OpenMythos) -> list[str]:
    """Sampled, with an exit rule, in chunks."""
    request = Request(
        max_new_tokens=5,
        num_loops=3,
        sampling=Sampling(temperature=0.9, top_k=20, top_p=0.9, min_p=0.01, seed=1),
        exit_rule=StateChangeExit(threshold=0.1),
        prefill_chunk=4,
        stop_ids=(256,),
    )
    return [Engine(model, ByteTokenizer()).generate(prompt, request) for prompt in ("def f", "")]


def test_tasks_are_learned_and_asked_on_the_device_of_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = learned(small())
    with second_device(monkeypatch):
        assert learned(moved(small())) == pytest.approx(expected, rel=1e-4)  # type: ignore[arg-type]


def test_text_is_scored_on_the_device_of_the_model(
    monkeypatch: pytest.MonkeyPatch, shards: TokenShards
) -> None:
    expected = scored(small(), shards)
    with second_device(monkeypatch):
        assert scored(moved(small()), shards) == pytest.approx(expected, rel=1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("state_init", [ZeroState(), NormalState()])
def test_text_is_generated_on_the_device_of_the_model(
    monkeypatch: pytest.MonkeyPatch, state_init: Any
) -> None:
    expected = generated(small(state_init=state_init))
    with second_device(monkeypatch):
        assert generated(moved(small(state_init=state_init))) == expected  # type: ignore[arg-type]


@pytest.mark.gpu
def test_a_gpu_learns_scores_and_generates_as_the_cpu_does(shards: TokenShards) -> None:
    for what in (learned, lambda model: scored(model, shards)):
        expected = what(small())
        assert what(small().to("cuda")) == pytest.approx(expected, rel=1e-2, abs=1e-2)
    assert all(isinstance(text, str) for text in generated(small().to("cuda")))


@pytest.mark.gpu
def test_a_saved_model_is_loaded_onto_a_gpu(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    model = OpenMythos.from_pretrained(tmp_path, device="auto")
    assert model.device.type == "cuda"
    tokens = torch.arange(8)[None]
    near = OpenMythos.from_pretrained(tmp_path)(tokens).logits
    torch.testing.assert_close(model(tokens.to("cuda")).logits.cpu(), near, rtol=1e-3, atol=1e-3)
