"""An embedding of the loop, added to the state at the start of every loop.

Beyond the last trained loop the last embedding is used again, so any number of loops is defined.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from openmythos.config import require_int
from openmythos.recurrence.loop_sampling import MOST_LOOPS
from openmythos.types import LoopCounts


@dataclass(frozen=True, kw_only=True)
class NoLoopEmbedding:
    """Every loop sees the same input."""

    kind: Literal["none"] = "none"

    def build(self, dim: int) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class LoopEmbedding:
    """A learned vector per loop, added to u (the timestep embedding of Universal Transformers)."""

    kind: Literal["learned"] = "learned"
    num_loops: int = 16

    def __post_init__(self) -> None:
        require_int("num_loops", self.num_loops, minimum=1, maximum=MOST_LOOPS)

    def build(self, dim: int) -> "LoopEmbeddingLayer":
        return LoopEmbeddingLayer(self.num_loops, dim)


class LoopEmbeddingLayer(nn.Module):
    """u = u + table[min(loop, num_loops - 1)]."""

    def __init__(self, num_loops: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(num_loops, dim))

    def forward(self, loop: int | LoopCounts) -> Tensor:
        """[dim], or [batch, 1, dim] for loop indices [batch]."""
        last = len(self.table) - 1
        if isinstance(loop, Tensor):
            return self.table[loop.clamp_max(last)][:, None]
        return self.table[min(loop, last)]


LoopEmbeddings = NoLoopEmbedding | LoopEmbedding
