"""Arms that learn text: the library's own run folder and trainer, on Python's standard library."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

from openmythos.data.shards import TokenShards
from openmythos.data.tokenizer import BPE
from openmythos.model import cost
from openmythos.model.config import MythosConfig
from openmythos.model.mythos import OpenMythos
from openmythos.train.config import DataConfig, RunConfig, TrainConfig
from openmythos.train.run import Run, train
from openmythos.train.trainer import StepMetrics


@dataclass(frozen=True, kw_only=True)
class Text:
    """What is read: its first `data.limit_mb` megabytes, in tokens of a BPE made from them."""

    kind: Literal["text"] = "text"
    data: DataConfig = field(default_factory=lambda: DataConfig(limit_mb=4.0, held_out=0.06))
    tokenizer: BPE = field(default_factory=lambda: BPE(vocab_size=1024))

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def quick(self) -> "Text":
        return replace(self, data=replace(self.data, limit_mb=0.15), tokenizer=BPE(vocab_size=300))


@dataclass(frozen=True, kw_only=True)
class TextLearning:
    """How text is learned: by the trainer."""

    kind: Literal["text"] = "text"
    train: TrainConfig = field(default_factory=TrainConfig)


class TextRun(NamedTuple):
    """What training on text leaves for a measure."""

    model: OpenMythos
    flops: int | float  # of training
    history: tuple[StepMetrics, ...]
    held_out: TokenShards


@contextmanager
def trained_on_text(
    model: MythosConfig, text: Text, training: TrainConfig, seed: int
) -> Iterator[TextRun]:
    """Train in a run folder that is gone afterwards."""
    training = replace(training, seed=seed, save_every=training.num_steps, keep_checkpoints=1)
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig(model=model, tokenizer=text.tokenizer, data=text.data, train=training)
        run = Run.create(Path(folder) / "run", config)
        history = tuple(train(run))
        per_token = [
            cost.training_flops_per_token(
                model,
                num_loops=n,
                backprop_loops=training.backprop_loops,
                context=training.seq_len,
            )
            for n in (1, 2)
        ]
        flops = sum(
            step.tokens * (per_token[0] + (step.mean_loops - 1) * (per_token[1] - per_token[0]))
            for step in history
        )
        yield TextRun(run.load_model(), flops, history, run.shards("held_out"))
