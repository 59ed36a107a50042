"""Arms that learn text: the library's own run folder and trainer, on Python's standard library."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

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


@dataclass(frozen=True, kw_only=True)
class Text:
    """What is read: its first `data.limit_mb` megabytes, in tokens of a BPE made from them."""

    kind: Literal["text"] = "text"
    data: TextData = field(default_factory=lambda: TextData(limit_mb=4.0, held_out=0.06))
    tokenizer: BPE = field(default_factory=lambda: BPE(vocab_size=1024))

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def quick(self) -> "Text":
        return replace(self, data=replace(self.data, limit_mb=0.05), tokenizer=BPE(vocab_size=300))


@dataclass(frozen=True, kw_only=True)
class TextLearning:
    """How text is learned: by the trainer."""

    kind: Literal["text"] = "text"
    train: TrainConfig = field(default_factory=TrainConfig)


class TextRun(NamedTuple):
    """What training on text leaves for a measure."""

    model: OpenMythos
    history: tuple[StepMetrics, ...]
    held_out: TokenShards


def text_model(injection: Injection) -> MythosConfig:
    """0.5 M parameters: small enough for dozens of runs."""
    feed_forward = SwiGLU(hidden_dim=256)
    return MythosConfig(
        vocab_size=Text().vocab_size,
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


@contextmanager
def trained_on_text(
    model: MythosConfig, text: Text, training: TrainConfig, seed: int, device: str = "auto"
) -> Iterator[TextRun]:
    """Train in a run folder that is gone afterwards."""
    training = replace(
        training, seed=seed, save_every=training.num_steps, keep_checkpoints=1, device=device
    )
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig(model=model, tokenizer=text.tokenizer, data=text.data, train=training)
        run = Run.create(Path(folder) / "run", config)
        history = tuple(train(run))
        yield TextRun(run.load_model(device), history, run.shards("held_out"))
