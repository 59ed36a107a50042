"""What differs between loops: an embedding added to the state, low-rank deltas of linear maps."""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from openmythos.nn.linear import NO_DELTAS, Deltas
from openmythos.recurrence.loop_embedding import LoopEmbeddings
from openmythos.recurrence.loop_lora import LoopLoRAs
from openmythos.types import LoopCounts


@runtime_checkable
class LoopVector(Protocol):
    """Interface of loop embeddings: a module whose output is added to u in every loop, or None."""

    def __call__(self, loop: int | LoopCounts) -> Tensor:
        """[dim], or [batch, 1, dim] for loop indices [batch]; from 0, without an upper limit."""


@runtime_checkable
class LoopDeltas(Protocol):
    """Interface of per-loop deltas of the layers' linear maps: a module, or None.

    It sets the `delta_key` of the maps that it adapts (`nn.linear.Linear`).
    """

    def __call__(self, loop: int | LoopCounts) -> Deltas:
        """The low-rank deltas by `delta_key`; with a batch dimension for loop indices [batch]."""

    def multiply_adds(self) -> int:
        """Multiply-adds per token and loop."""

    def parameters(self) -> Iterator[nn.Parameter]: ...


class Conditioning(nn.Module):
    """(embedding, low-rank deltas) of a loop; loop indices [batch] give each row its own."""

    decays = False

    def __init__(
        self, dim: int, layers: nn.ModuleList, embedding: LoopEmbeddings, lora: LoopLoRAs
    ) -> None:
        super().__init__()
        self.embedding: LoopVector | None = embedding.build(dim)
        self.lora: LoopDeltas | None = lora.build(layers)

    def forward(self, loop: int | LoopCounts) -> tuple[Tensor | None, Deltas]:
        embedding = None if self.embedding is None else self.embedding(loop)
        return embedding, NO_DELTAS if self.lora is None else self.lora(loop)
