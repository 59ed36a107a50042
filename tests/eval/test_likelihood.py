"""Held-out likelihood against sums done by hand."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from variants import members, tiny_config, tiny_model

from openmythos.config import ConfigError
from openmythos.data.shards import TokenShards, write_shards
from openmythos.data.sources import Document
from openmythos.data.tokenizer import ByteTokenizer
from openmythos.eval.likelihood import Likelihood, depth_sweep
from openmythos.model.config import MythosConfig
from openmythos.model.mythos import OpenMythos
from openmythos.recurrence.halting import ACT, Halting
from openmythos.recurrence.initial_state import NormalState, ZeroState

SEQ = 16
CONFIG = tiny_config(vocab_size=257, context=SEQ)
LOOPS = (1, 2, 5)
TEXTS = ["a first text, of some length", "zweiter: äöü", "x", "and a last one \N{SNOWMAN}"]


@pytest.fixture
def shards(tmp_path: Path) -> TokenShards:
    documents = [Document(name=str(i), text=text) for i, text in enumerate(TEXTS)]
    return write_shards(documents, ByteTokenizer(), tmp_path / "shards")


def nats_by_hand(model: OpenMythos, shards: TokenShards, num_loops: int) -> float:
    """Window by window, one row at a time."""
    total = 0.0
    last = len(shards) - 1
    for start in range(0, last, SEQ):
        stop = min(start + SEQ, last)
        ids = torch.from_numpy(shards.read(start, stop + 1))
        with torch.no_grad():
            logits = model(ids[None, :-1], num_loops=num_loops).logits[0]
        total += float(F.cross_entropy(logits, ids[1:], reduction="sum"))
    return total


def check(found: dict[int, Likelihood], model: OpenMythos, shards: TokenShards) -> None:
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    tokens = num_bytes + len(TEXTS) - 1  # one bos per document, the first one is no target
    for num_loops, result in found.items():
        nats = nats_by_hand(model, shards, num_loops)
        assert (result.tokens, result.num_bytes) == (tokens, num_bytes)
        assert result.nats_per_token == pytest.approx(nats / tokens, rel=1e-5)
        bits = result.nats_per_token / math.log(2) * tokens / num_bytes
        assert result.bits_per_byte == pytest.approx(bits, rel=1e-9)
        assert result.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-4)


@pytest.mark.parametrize("halting", members(Halting), ids=lambda halting: halting.kind)
@pytest.mark.parametrize("state_init", [ZeroState(), NormalState()])
def test_one_sweep_equals_each_number_of_loops(
    shards: TokenShards, halting: Any, state_init: Any
) -> None:
    model = tiny_model(replace(CONFIG, halting=halting, state_init=state_init))
    found = depth_sweep(model, shards, LOOPS, seq_len=SEQ, batch_size=2)
    assert list(found) == [1, 2, 5]
    check(found, model, shards)


def test_act_that_halts_at_once(shards: TokenShards) -> None:
    model = tiny_model(replace(CONFIG, halting=ACT(threshold=0.5, bias_init=9.0)))
    found = depth_sweep(model, shards, LOOPS, seq_len=SEQ)
    assert found[1] == found[2] == found[5]
    check(found, model, shards)


def test_order_of_loops_and_batch_size_do_not_matter(shards: TokenShards) -> None:
    model = tiny_model(CONFIG)
    found = depth_sweep(model, shards, (5, 1, 2), seq_len=SEQ, batch_size=3)
    again = depth_sweep(model, shards, LOOPS, seq_len=SEQ, batch_size=8)
    assert list(found) == list(again) == [1, 2, 5]
    for num_loops in LOOPS:
        wanted = again[num_loops].nats_per_token
        assert found[num_loops].nats_per_token == pytest.approx(wanted, rel=1e-5)


def test_uniform_model_has_the_bits_of_its_vocabulary(shards: TokenShards) -> None:
    model = OpenMythos(replace(CONFIG, tie_embeddings=False), seed=0)
    assert model.head is not None
    torch.nn.init.zeros_(model.head.weight)
    (result,) = depth_sweep(model, shards, (3,), seq_len=SEQ).values()
    wanted = math.log2(257) * result.tokens / result.num_bytes
    assert result.bits_per_byte == pytest.approx(wanted, rel=1e-6)
    assert result.perplexity == pytest.approx(257, rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_model_is_left_in_its_mode(shards: TokenShards, training: bool) -> None:
    model = tiny_model(CONFIG).train(training)
    depth_sweep(model, shards, (1,), seq_len=SEQ)
    assert model.training is training
    with pytest.raises(ValueError, match="longer than the context"):
        depth_sweep(model, shards, (1,), seq_len=SEQ + 1)
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_progress_ends_at_all_tokens(shards: TokenShards) -> None:
    calls: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        calls.append((done, total))

    depth_sweep(tiny_model(CONFIG), shards, (1,), seq_len=SEQ, batch_size=1, progress=progress)
    assert calls == sorted(calls)
    assert calls[-1] == (len(shards) - 1, len(shards) - 1)


def test_bf16_is_close(shards: TokenShards) -> None:
    config: MythosConfig = CONFIG
    model = tiny_model(config)
    exact = depth_sweep(model, shards, (2,), seq_len=SEQ)[2]
    rounded = depth_sweep(model, shards, (2,), seq_len=SEQ, precision="bf16")[2]
    assert rounded.bits_per_byte == pytest.approx(exact.bits_per_byte, rel=0.02)
    assert rounded.bits_per_byte != exact.bits_per_byte


def test_hopeless_models_have_a_finite_perplexity(shards: TokenShards) -> None:
    model = OpenMythos(replace(CONFIG, tie_embeddings=False), seed=0)
    assert model.head is not None
    torch.nn.init.normal_(model.head.weight, std=1e4)
    result = depth_sweep(model, shards, (1,), seq_len=SEQ)[1]
    assert math.isfinite(result.perplexity) and result.nats_per_token > 700


def test_one_token_is_too_few(tmp_path: Path) -> None:
    class Silent(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            return []

    one = write_shards([Document(name="one", text="x")], Silent(), tmp_path)
    with pytest.raises(ConfigError, match="has 1 tokens, evaluation needs 2"):
        depth_sweep(tiny_model(CONFIG), one, (1,), seq_len=SEQ)
