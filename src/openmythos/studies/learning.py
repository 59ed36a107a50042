"""The runs of arms that learn a task of hops."""

from dataclasses import replace
from typing import Any

from openmythos.model.config import MythosConfig
from openmythos.tasks import Task
from openmythos.train.config import RunConfig, TaskData, TiedLoops, TrainConfig
from openmythos.train.optim import WSD, AdamW
from openmythos.train.task_source import longest

TASK_TRAINING = TrainConfig(
    num_steps=1600,
    batch_size=32,
    loops=TiedLoops(),
    optimizer=AdamW(lr=3e-3, weight_decay=0.05, beta1=0.9, beta2=0.98),
    schedule=WSD(warmup=0.03, decay=0.3, final=0.05),
    precision="fp32",  # the same on every machine
)


def on_task(
    model: MythosConfig, task: Task, training: TrainConfig = TASK_TRAINING, **hops: Any
) -> RunConfig:
    """A run that learns a task; `hops` are fields of `TaskData`."""
    data = TaskData(task=task, **hops)
    training = replace(training, seq_len=longest(data))
    return RunConfig(model=model, data=data, train=training)
