"""Batches of a task, with a curriculum on the number of hops."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openmythos.config import require
from openmythos.data.loader import Batch, BatchSource
from openmythos.distributed.ranks import mean_over_ranks, rank_and_world_size
from openmythos.model.mythos import OpenMythos
from openmythos.tasks import TaskBatch
from openmythos.train.config import RunConfig, TaskData, TiedLoops
from openmythos.train.trainer import Trainer
from openmythos.types import NextLogits, TokenIds

# The running accuracy at the start and after each growth of the curriculum.
_UNKNOWN = 0.5


class _Drawn(NamedTuple):
    """The problems and loops of one step."""

    step: int
    hops: int
    problems: TaskBatch  # this rank's
    loops: int | None


class TaskSource(BatchSource):
    """Problems of a task under a curriculum; those of one step have the same number of hops.

    A batch is a function of (seed, step, rank) and of the steps at which the curriculum grew, which
    are the saved state. All steps share one random stream, and the number of draws of a step
    depends on its hops. For an earlier step, or to resume, the draws are repeated from step 0 on.
    If rows differ in their number of targets (`FactPairs`), the loss weighs ranks and
    micro-batches equally, not targets.
    """

    def __init__(self, config: RunConfig, rank: int = 0, world_size: int = 1) -> None:
        """`config.data` is a TaskData; `train.batch_size` is that of all ranks."""
        assert isinstance(config.data, TaskData)
        size = config.train.batch_size
        allowed = f"must divide by world_size = {world_size}"
        require(size % world_size == 0, "batch_size", size, allowed)
        self._data, self._train = config.data, config.train
        self._rows = slice(rank * size // world_size, (rank + 1) * size // world_size)
        self.seq_len, self.vocab_size = longest(self._data), self._data.vocab_size
        self._reached = [(0, self._data.first_hops)]  # (first step, reach from there on)
        self._accuracy = _UNKNOWN
        self._rewind()

    @property
    def reach(self) -> int:
        """The current largest number of hops."""
        return self._reached[-1][1]

    def batch(self, step: int) -> Batch:
        """The problems of a step; each is a document of its own."""
        problems = self._draw(step).problems
        documents = torch.zeros_like(problems.tokens)
        return Batch(problems.tokens, problems.targets, documents, latents=problems.latents)

    def restarts(self, step: int) -> bool:
        """At every stage of thoughts that changes the problems."""
        stage = self._data.thoughts.stage
        before, now = (stage(n / self._train.num_steps) for n in (step - 1, step))
        return step > 0 and before < min(now, self._data.max_hops)

    def loops(self, step: int) -> int | None:
        return self._draw(step).loops

    def learned(self, step: int, last_logits: Callable[[TokenIds], NextLogits]) -> None:
        """Update the accuracy on the longest problems; increase `reach` if they are mastered."""
        drawn, reach = self._draw(step), self.reach
        if reach == self._data.max_hops or drawn.hops < 0.75 * reach:
            return
        right = accuracy(last_logits(drawn.problems.tokens), drawn.problems.answers())
        (right,) = mean_over_ranks([right])
        self._accuracy = 0.8 * self._accuracy + 0.2 * float(right)
        if self._accuracy > self._data.mastery:
            self._reached.append((step + 1, min(reach + 2, self._data.max_hops)))
            self._accuracy = _UNKNOWN

    def metrics(self) -> dict[str, float]:
        return {"hops": self.reach}

    def state(self) -> dict[str, Any]:
        return {"reached": [list(pair) for pair in self._reached], "accuracy": self._accuracy}

    def load(self, state: Mapping[str, Any]) -> None:
        self._reached = [(int(step), int(hops)) for step, hops in state["reached"]]
        self._accuracy = float(state["accuracy"])
        self._rewind()

    def _rewind(self) -> None:
        self._generator = torch.Generator().manual_seed(self._train.seed + 1)
        self._drawn: _Drawn | None = None

    def _draw(self, step: int) -> _Drawn:
        if self._drawn is not None and step < self._drawn.step:
            self._rewind()
        while self._drawn is None or self._drawn.step < step:
            self._drawn = self._next(0 if self._drawn is None else self._drawn.step + 1)
        return self._drawn

    def _next(self, step: int) -> _Drawn:
        generator = self._generator
        reach = next(hops for first, hops in reversed(self._reached) if first <= step)
        hops = int(torch.randint(self._data.min_hops, reach + 1, (), generator=generator))
        progress = step / self._train.num_steps
        problems = self._data.problems(self._train.batch_size, hops, generator, progress)
        how, loops = self._train.loops, None
        if isinstance(how, TiedLoops):
            loops = hops + int(torch.randint(how.extra + 1, (), generator=generator))
        return _Drawn(step, hops, problems.rows(self._rows), loops)


def longest(data: TaskData) -> int:
    """Sequence length of a problem with max_hops hops."""
    return data.problems(1, data.max_hops, torch.Generator()).tokens.shape[1]


def fitted(config: RunConfig) -> RunConfig:
    """Set the vocabulary and sequence length that the task needs; text: unchanged."""
    data, model = config.data, config.model
    if not isinstance(data, TaskData):
        return config
    vocab_size = max(model.vocab_size, data.vocab_size)
    return replace(
        config,
        model=replace(model, vocab_size=vocab_size),
        train=replace(config.train, seq_len=longest(data)),
    )


def task_trainer(config: RunConfig) -> Trainer:
    """A trainer for a task, without a run folder, ready for the first step."""
    with torch.device("meta"):
        model = OpenMythos(config.model)
    return Trainer(model, TaskSource(config, *rank_and_world_size()), config.train)


def accuracy(last_logits: NextLogits, answers: Tensor) -> Tensor:
    """The share of problems whose likeliest next token [batch] is the answer."""
    return (last_logits.argmax(dim=-1) == answers.to(last_logits.device)).float().mean()
