"""What differs between loops: an embedding added to the state, low-rank deltas of linear maps."""

from torch import Tensor, nn

from openmythos.nn.linear import NO_DELTAS, Deltas
from openmythos.recurrence.loop_embedding import LoopEmbeddings
from openmythos.recurrence.loop_lora import LoopLoRAs
from openmythos.types import LoopCounts


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
