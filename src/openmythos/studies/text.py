"""Arms that learn text: the library's own run folder and trainer, on Python's standard library."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from openmythos.data.shards import TokenShards
from openmythos.data.tokenizer import BPE
from openmythos.model.config import MythosConfig
from openmythos.model.mythos import OpenMythos
from openmythos.nn.feed_forward import SwiGLU
from openmythos.nn.grouped_query import GroupedQueryAttention
from openmythos.recurrence.initial_state import EncodedState, ZeroState
from openmythos.recurrence.injection import Injection, NoInjection
from openmythos.recurrence.loop_lora import NoLoopLoRA
from openmythos.recurrence.loop_sampling import LoopSampling
from openmythos.train.config import RunConfig, TextData, TrainConfig
from openmythos.train.optim import WSD, AdamW
from openmythos.train.run import Run, train
from openmythos.train.trainer import StepMetrics

RATES = (1e-3, 2e-3, 4e-3)
VOCAB_SIZE = 1024


class TextRun(NamedTuple):
    """What `Study.measure` gets of a run on text."""

    model: OpenMythos
    history: tuple[StepMetrics, ...]
    held_out: TokenShards


def text_model(injection: Injection) -> MythosConfig:
    """0.5 M parameters: small enough for dozens of runs."""
    feed_forward = SwiGLU(hidden_dim=256)
    return MythosConfig(
        vocab_size=VOCAB_SIZE,
        dim=96,
        context=128,
        num_loops=4,
        attention=GroupedQueryAttention(num_heads=4, num_kv_heads=4),
        feed_forward=feed_forward,
        recurrent_feed_forward=feed_forward,
        injection=injection,
        loop_lora=NoLoopLoRA(),
        state_init=EncodedState() if isinstance(injection, NoInjection) else ZeroState(),
        zero_init_outputs=False,
    )


def text_training(loops: LoopSampling) -> TrainConfig:
    """300 steps of 8 x 128 tokens; its learning rate is one of RATES."""
    return TrainConfig(
        num_steps=300,
        batch_size=8,
        seq_len=128,
        loops=loops,
        optimizer=AdamW(lr=2e-3),
        schedule=WSD(warmup=0.05, decay=0.3, final=0.1),
        precision="fp32",  # the same on every machine
    )


def on_text(model: MythosConfig, training: TrainConfig) -> RunConfig:
    """A run on 4 MB of Python's standard library, with a BPE tokenizer trained on them."""
    data, tokenizer = TextData(limit_mb=4.0, held_out=0.06), BPE(vocab_size=VOCAB_SIZE)
    return RunConfig(model=model, tokenizer=tokenizer, data=data, train=training)


@contextmanager
def trained_on_text(config: RunConfig) -> Iterator[TextRun]:
    """Train in a temporary run folder."""
    training = replace(config.train, save_every=config.train.num_steps, keep_checkpoints=1)
    with tempfile.TemporaryDirectory() as folder:
        run = Run.create(Path(folder) / "run", replace(config, train=training))
        history = tuple(train(run))
        yield TextRun(run.load_model(training.device), history, run.shards("held_out"))
