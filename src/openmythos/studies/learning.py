"""How an arm of a study learns a task of hops."""

from dataclasses import dataclass, field
from typing import Literal

from openmythos.config import require_int, require_number
from openmythos.model.config import MythosConfig
from openmythos.recurrence.loop_sampling import LoopSampling
from openmythos.tasks import Task
from openmythos.tasks.curriculum import HopCurriculum, TiedLoops
from openmythos.train.config import RunConfig, TaskData, TrainConfig
from openmythos.train.optim import WSD, AdamW, Optimizer, Schedule
from openmythos.train.task_source import fitted


@dataclass(frozen=True, kw_only=True)
class Learning(HopCurriculum):
    """A run on a task, less its model, task, seed and device.

    Of the loops of a step the last `backprop_loops` carry gradient (0: all).
    """

    kind: Literal["task"] = "task"
    num_steps: int = 1600
    batch_size: int = 32
    loops: TiedLoops | LoopSampling = field(default_factory=TiedLoops)
    backprop_loops: int = 0
    optimizer: Optimizer = field(
        default_factory=lambda: AdamW(lr=3e-3, weight_decay=0.05, beta1=0.9, beta2=0.98)
    )
    schedule: Schedule = field(default_factory=lambda: WSD(warmup=0.03, decay=0.3, final=0.05))
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_steps", "batch_size"):
            require_int(name, getattr(self, name), minimum=1)
        require_int("backprop_loops", self.backprop_loops, minimum=0)
        require_number("clip_norm", self.clip_norm, above=0)

    def config(
        self, model: MythosConfig, task: Task, seed: int = 0, device: str = "auto"
    ) -> RunConfig:
        """The whole run, in fp32: the same on every machine, and as fast for models so small."""
        train = TrainConfig(
            num_steps=self.num_steps,
            batch_size=self.batch_size,
            seq_len=model.context,
            seed=seed,
            loops=self.loops,
            backprop_loops=self.backprop_loops,
            optimizer=self.optimizer,
            schedule=self.schedule,
            clip_norm=self.clip_norm,
            precision="fp32",
            device=device,
        )
        data = TaskData(
            task=task,
            min_hops=self.min_hops,
            max_hops=self.max_hops,
            first_hops=self.first_hops,
            mastery=self.mastery,
        )
        return fitted(RunConfig(model=model, data=data, train=train))
