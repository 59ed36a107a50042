"""The recipes: functions that return the config of a whole run."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from openmythos.config import ConfigError, unknown_name
from openmythos.data.tokenizer import BPE, Bytes
from openmythos.model import presets
from openmythos.nn.moe import MoE
from openmythos.recurrence.loop_sampling import PoissonLoops
from openmythos.train.config import RunConfig, TrainConfig
from openmythos.train.optim import WSD, Muon


def tiny() -> RunConfig:
    """Seconds: 20 steps of a model of bytes, to see that everything works."""
    return RunConfig(
        model=presets.tiny(),
        tokenizer=Bytes(),
        train=TrainConfig(num_steps=20, batch_size=4, seq_len=64, optimizer=Muon()),
    )


def demo() -> RunConfig:
    """About three minutes on two cores: the whole architecture at 5 M parameters.

    So few steps need a faster router bias than the default, and an untied head: both learn early.
    """
    model = presets.small()
    assert isinstance(model.recurrent_feed_forward, MoE)
    experts = replace(model.recurrent_feed_forward, bias_rate=5e-3)
    return RunConfig(
        model=replace(model, tie_embeddings=False, recurrent_feed_forward=experts),
        tokenizer=BPE(vocab_size=4096),
        train=TrainConfig(
            num_steps=260,
            batch_size=8,
            seq_len=256,
            loops=PoissonLoops(mean_loops=2.0, max_loops=8),
            optimizer=Muon(lr=3e-3, adamw_lr_scale=4.0),
            schedule=WSD(warmup=0.02, decay=0.6),
            precision="bf16",
        ),
    )


def small() -> RunConfig:
    """An hour or two on two cores: the demo's model with more loops and twenty times the steps."""
    base = demo()
    return replace(
        base,
        train=replace(
            base.train,
            num_steps=4000,
            batch_size=16,
            loops=PoissonLoops(mean_loops=4.0, max_loops=16),
            backprop_loops=4,
        ),
    )


RECIPES: Mapping[str, Callable[[], RunConfig]] = MappingProxyType(
    {"tiny": tiny, "demo": demo, "small": small}
)


def get(name: str) -> RunConfig:
    """The recipe of that name."""
    if name not in RECIPES:
        raise ConfigError(f"recipe = {name!r}: {unknown_name('recipe', name, RECIPES)}")
    return RECIPES[name]()
