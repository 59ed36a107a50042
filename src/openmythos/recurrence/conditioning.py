"""What differs between loops: an embedding added to the state, low-rank deltas of linear maps."""

from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from openmythos.nn.linear import NO_DELTAS, Deltas
from openmythos.recurrence.loop_embedding import LoopEmbeddings
from openmythos.recurrence.loop_lora import LoopLoRAs
from openmythos.types import LoopCounts


@runtime_checkable
class LoopVector(Protocol):
    """Interface of what is added to u in every loop: a module, or None for nothing."""

    def __call__(self, loop: int | LoopCounts) -> Tensor:
        """[dim], or [batch, 1, dim] for [batch] loop numbers, counted from 0; any number works."""


@runtime_checkable
class LoopDeltas(Protocol):
    """Interface of what changes the layers' linear maps in every loop: a module, or None.

    It sets the `delta_key` of the maps that it changes (`nn.linear.Linear`).
    """

    def __call__(self, loop: int | LoopCounts) -> Deltas:
        """The low-rank changes by `delta_key`; for [batch] loop numbers with a batch dimension."""

    def multiply_adds(self) -> int:
        """Per token and loop."""


class Conditioning(nn.Module):
    """Embedding and low-rank deltas of one loop; [batch] numbers give every row its own."""

    decays = False

    def __init__(
        self, dim: int, layers: nn.ModuleList, embedding: LoopEmbeddings, lora: LoopLoRAs
    ) -> None:
        super().__init__()
        self.embedding = embedding.build(dim)
        self.lora = lora.build(layers)

    def forward(self, loop: int | LoopCounts) -> tuple[Tensor | None, Deltas]:
        embedding = None if self.embedding is None else self.embedding(loop)
        return embedding, NO_DELTAS if self.lora is None else self.lora(loop)
