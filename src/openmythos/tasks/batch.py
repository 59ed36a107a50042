"""What every task makes, and what they share."""

from typing import NamedTuple

import torch
from torch import Tensor

from openmythos.types import TokenIds

IGNORE = -100


class TaskBatch(NamedTuple):
    """Problems as token sequences; a target of IGNORE does not count.

    The answer of a problem is the target at `answer_at`, one column per row.
    """

    tokens: TokenIds
    targets: TokenIds
    answer_at: Tensor  # [batch]

    def answers(self) -> Tensor:
        """The right answers, [batch]."""
        return self.targets.gather(1, self.answer_at[:, None])[:, 0]


def answer_only(batch: TaskBatch) -> TaskBatch:
    """The same problems with the answer as the only target."""
    column = columns_of(batch.targets)
    targets = batch.targets.masked_fill(column != batch.answer_at[:, None], IGNORE)
    return batch._replace(targets=targets)


def columns_of(x: Tensor) -> Tensor:
    """The column of every entry of x [batch, seq]."""
    return torch.arange(x.shape[1]).expand_as(x)


def permutations(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Independent uniform permutations of 0 ... size - 1, [count, size]."""
    return torch.rand(count, size, generator=generator).argsort(dim=1)
