"""The models and runs of arms that learn a task of hops."""

from dataclasses import replace
from typing import Any

from openmythos.model import presets
from openmythos.model.config import MythosConfig
from openmythos.nn.feed_forward import SwiGLU
from openmythos.nn.grouped_query import GroupedQueryAttention
from openmythos.recurrence.initial_state import EncodedState
from openmythos.recurrence.injections import NoInjection
from openmythos.recurrence.loop_lora import NoLoopLoRA
from openmythos.tasks import Task
from openmythos.train.config import RunConfig, TaskData, TiedLoops, TrainConfig
from openmythos.train.optim import WSD, AdamW
from openmythos.train.task_source import longest

WINDOW = 8
TASK_TRAINING = TrainConfig(
    num_steps=1600,
    batch_size=32,
    loops=TiedLoops(),
    optimizer=AdamW(lr=3e-3, weight_decay=0.05, beta1=0.9, beta2=0.98),
    schedule=WSD(warmup=0.03, decay=0.3, final=0.05),
    precision="fp32",  # the same on every machine
)


def looped(window: int = WINDOW) -> MythosConfig:
    """The model of recipe hops; a window of 0 sees all tokens."""
    config = presets.hops()
    return replace(config, attention=replace(config.attention, window=window))


def stacked(layers: int, dim: int, window: int = WINDOW) -> MythosConfig:
    """A model without loops: `layers` unshared layers, run once; a window of 0 sees all tokens."""
    feed_forward = SwiGLU(hidden_dim=dim * 21 // 8 // 8 * 8)
    return replace(
        looped(window),
        dim=dim,
        prelude_layers=layers - 2,
        num_loops=1,
        feed_forward=feed_forward,
        recurrent_feed_forward=feed_forward,
        injection=NoInjection(),
        state_init=EncodedState(),
        prelude_norm=False,
    )


def looped_block(task: Task, layers: int, loops: int) -> MythosConfig:
    """A block of `layers` layers, run `loops` times: no prelude, coda or injection."""
    feed_forward = SwiGLU(hidden_dim=168)
    return MythosConfig(
        vocab_size=task.vocab_size,
        dim=64,
        context=128,
        prelude_layers=0,
        recurrent_layers=layers,
        coda_layers=0,
        num_loops=loops,
        attention=GroupedQueryAttention(num_heads=4, num_kv_heads=4),
        feed_forward=feed_forward,
        recurrent_feed_forward=feed_forward,
        injection=NoInjection(),
        loop_lora=NoLoopLoRA(),
        state_init=EncodedState(),
        prelude_norm=False,
        zero_init_outputs=False,
    )


def on_task(
    model: MythosConfig, task: Task, training: TrainConfig = TASK_TRAINING, **hops: Any
) -> RunConfig:
    """A run that learns a task; `hops` are fields of `TaskData`."""
    data = TaskData(task=task, **hops)
    training = replace(training, seq_len=longest(data))
    return RunConfig(model=model, data=data, train=training)
