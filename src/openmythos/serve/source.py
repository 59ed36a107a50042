"""What is served: a model with its tokenizer, or with the words of the task it was trained on."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from openmythos.config import ConfigError, from_dict, to_dict
from openmythos.data.tokenizer import Vocabulary
from openmythos.files import read_json
from openmythos.hub.load import Source, open_source
from openmythos.model.mythos import OpenMythos
from openmythos.tasks import KHop, Task
from openmythos.tasks.words import Words
from openmythos.train.config import TaskData

SHIPPED = Path(__file__).parent / "hops"
TASK_FILE = "task.json"


class TaskWords(Vocabulary):
    """The words of a task, separated by spaces. There is no start token, and no text ends."""

    bos_id = -1

    def __init__(self, task: Task) -> None:
        self._words = Words(task)
        self.token_bytes = tuple(
            f"{self._words.decode([token])} ".encode() for token in range(task.vocab_size)
        )

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return ()

    def encode(self, text: str) -> list[int]:
        return self._words.encode(text)

    def prompt_ids(self, text: str) -> list[int]:
        ids = self.encode(text)
        if not ids:
            raise ConfigError("prompt: is empty; a task has no start token")
        return ids


@dataclass(frozen=True)
class Trained:
    """The task of a model and the longest problems it was trained on; the file task.json."""

    task: Task
    max_hops: int


@dataclass(frozen=True)
class Served:
    """An opened model; its weights are loaded by the replicas."""

    source: Source
    trained: Trained | None
    name: str  # the folder's, or the Hub id

    @classmethod
    def open(cls, source: str | Path) -> "Served":
        """Find a model; "" is the one that the package ships."""
        path = Path(source) if str(source) else SHIPPED
        found = open_source(path if path.exists() else source)
        name = path.resolve().name if path.exists() else str(source)
        trained = None
        if found.run is not None and isinstance(found.run.config.data, TaskData):
            trained = Trained(found.run.config.data.task, found.run.config.data.max_hops)
        elif (found.path / TASK_FILE).is_file():
            data = read_json(found.path / TASK_FILE)
            trained = Trained(from_dict(Task, data["task"], "task"), int(data["max_hops"]))
        return cls(found, trained, name)

    @functools.cached_property
    def tokenizer(self) -> Vocabulary:
        """Raises a ConfigError if the model has none."""
        return self.source.tokenizer if self.trained is None else TaskWords(self.trained.task)

    def load(self, device: str, precision: str, step: int | None) -> OpenMythos:
        """The model in eval mode; precision "auto": what the device computes fast."""
        model = self.source.load(device, step=step)
        narrow = self.source.precision(precision, model.device) == "bf16"
        return model.to(dtype=torch.bfloat16 if narrow else torch.float32)

    def task_facts(self) -> dict[str, Any] | None:
        """What a page can ask of a model that was trained on a task."""
        if self.trained is None:
            return None
        task = self.trained.task
        facts = {"max_hops": self.trained.max_hops, "config": to_dict(task)}
        if isinstance(task, KHop) and task.readout == "last":
            facts["facts"] = task.facts().tolist()
        return facts
