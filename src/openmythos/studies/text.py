"""Arms that learn text: Python's standard library and an English dictionary."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from openmythos.config import to_dict
from openmythos.data.loader import Loader
from openmythos.data.shards import TokenShards, write_shards
from openmythos.data.tokenizer import BPE
from openmythos.model.config import MythosConfig
from openmythos.model.mythos import OpenMythos
from openmythos.nn.feed_forward import SwiGLU
from openmythos.nn.grouped_query import GroupedQueryAttention
from openmythos.recurrence.initial_state import EncodedState, ZeroState
from openmythos.recurrence.injection import LTI
from openmythos.recurrence.injections import Injection, NoInjection
from openmythos.recurrence.loop_lora import NoLoopLoRA
from openmythos.recurrence.loop_sampling import LoopSampling, PoissonLoops
from openmythos.train.config import RunConfig, TextData, TrainConfig
from openmythos.train.optim import WSD, AdamW, Muon
from openmythos.train.run import open_data
from openmythos.train.trainer import StepMetrics, Trainer

VOCAB_SIZE = 1024
PARTS = ("train", "validation", "held_out")
MEAN_LOOPS = 6  # of the model that needs its loops


class TextRun(NamedTuple):
    """What `Study.measure` gets from a run on text; results report the loss on `held_out`."""

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
    """300 steps of 8 x 128 tokens."""
    return TrainConfig(
        num_steps=300,
        batch_size=8,
        seq_len=128,
        loops=loops,
        optimizer=AdamW(lr=2e-3),
        schedule=WSD(warmup=0.05, decay=0.3, final=0.1),
        precision="fp32",  # the same on every machine
    )


def needs_its_loops() -> MythosConfig:
    """0.25 M parameters without prelude and coda, so that nothing but the loops can do the work."""
    return replace(text_model(LTI()), prelude_layers=0, coda_layers=0, num_loops=MEAN_LOOPS)


def drawn_loops(
    mean: int = MEAN_LOOPS, per: Literal["sequence", "batch"] = "sequence"
) -> PoissonLoops:
    return PoissonLoops(mean_loops=mean, max_loops=16, per=per)


def long_training(num_steps: int = 1500) -> TrainConfig:
    """With Muon, and loops drawn per sequence from Poisson(6), at most 16."""
    muon = Muon(lr=6e-3, adamw_lr_scale=4.0)
    return replace(text_training(drawn_loops()), num_steps=num_steps, optimizer=muon)


def on_text(model: MythosConfig, training: TrainConfig) -> RunConfig:
    """A run on 4 MB of Python's standard library, with a BPE tokenizer trained on them."""
    data, tokenizer = TextData(limit_mb=4.0, held_out=0.06), BPE(vocab_size=VOCAB_SIZE)
    return RunConfig(model=model, tokenizer=tokenizer, data=data, train=training)


def on_two_corpora(model: MythosConfig, training: TrainConfig) -> RunConfig:
    """A run on Python's standard library and an English dictionary, 24 MB in all.

    Of them 1% is held out and reported, and another 0.5% is for validation.
    """
    data = TextData(paths=("stdlib", "gcide"), held_out=0.015)
    return RunConfig(model=model, tokenizer=BPE(vocab_size=VOCAB_SIZE), data=data, train=training)


def corpus(run: RunConfig, folder: Path) -> dict[str, TokenShards]:
    """The text of a run as tokens, by part; written to a folder of its own in `folder` once.

    Every third of the documents that training never sees is for validation.
    """
    assert isinstance(run.data, TextData)
    settings = json.dumps([to_dict(run.data), to_dict(run.tokenizer)])
    own = folder / hashlib.sha256(settings.encode()).hexdigest()[:16]
    if not own.exists():
        text = open_data(run.data)
        tokenizer = run.tokenizer.build(document.text for document in text.train())
        held_out = list(text.held_out())
        unseen = [document for n, document in enumerate(held_out) if n % 3] or held_out
        for part, documents in zip(PARTS, (text.train(), held_out[::3], unseen), strict=True):
            write_shards(documents, tokenizer, own / part)
    return {part: TokenShards.open(own / part, verify=False) for part in PARTS}


def text_trainer(run: RunConfig, text: TokenShards) -> Trainer:
    """A trainer on this text, without a run folder, ready for the first step."""
    with torch.device("meta"):
        model = OpenMythos(run.model)
    how = run.train
    source = Loader([text], seq_len=how.seq_len, batch_size=how.batch_size, seed=how.seed)
    return Trainer(model, source, how)
