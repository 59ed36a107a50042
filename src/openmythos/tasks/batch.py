"""Batches of problems, and helpers that all tasks use."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from openmythos.kernels.cross_entropy import IGNORE
from openmythos.types import Mask, TokenIds


class TaskBatch(NamedTuple):
    """Problems as token sequences; a target of IGNORE does not count.

    The answer of a problem is the target at `answer_at`, one column per row.
    """

    tokens: TokenIds
    targets: TokenIds
    answer_at: Tensor  # [batch]
    latents: Mask | None = None  # positions without a token; see `tasks.reasoning`

    def to(self, device: torch.device) -> "TaskBatch":
        """The same problems on a device."""
        return self._map(lambda x: x.to(device))

    def rows(self, rows: slice) -> "TaskBatch":
        """Some of the problems."""
        return self._map(lambda x: x[rows])

    def and_shorter(self, short: "TaskBatch", padding: int) -> "TaskBatch":
        """These problems, then shorter ones without latents, padded at the end."""
        more = (0, self.tokens.shape[1] - short.tokens.shape[1])
        return TaskBatch(
            torch.cat((self.tokens, F.pad(short.tokens, more, value=padding))),
            torch.cat((self.targets, F.pad(short.targets, more, value=IGNORE))),
            torch.cat((self.answer_at, short.answer_at)),
        )

    def _map(self, change: Callable[[Tensor], Tensor]) -> "TaskBatch":
        tokens, targets, answer_at, latents = self
        latents = None if latents is None else change(latents)
        return TaskBatch(change(tokens), change(targets), change(answer_at), latents)

    def answers(self) -> Tensor:
        """The right answers, [batch]."""
        return self.targets.gather(1, self.answer_at[:, None])[:, 0]


def answer_only(batch: TaskBatch) -> TaskBatch:
    """The same problems with the answer as the only target."""
    elsewhere = torch.arange(batch.targets.shape[1]) != batch.answer_at[:, None]
    return batch._replace(targets=batch.targets.masked_fill(elsewhere, IGNORE))


def permutations(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Independent uniform permutations of 0 ... size - 1, [count, size]."""
    return torch.rand(count, size, generator=generator).argsort(dim=1)


__all__ = ["IGNORE", "TaskBatch", "answer_only", "permutations"]
