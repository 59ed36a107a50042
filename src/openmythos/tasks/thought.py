"""k-hop with a chain of thought: the entities between first and last are written out."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from openmythos.config import require_int
from openmythos.tasks.batch import IGNORE, TaskBatch
from openmythos.tasks.chains import KHop


@dataclass(frozen=True, kw_only=True)
class WrittenHops:
    """e_0 r_1 ... r_k pad ... pad e_0 e_1 ... e_{k-1}: the target at each e_i behind is e_{i+1}.

    The problems of `KHop` with the same facts, padded to max_hops relations, so that relation i + 1
    stands max_hops columns before e_i whatever k is. The last column's target is the answer.
    """

    kind: Literal["written_hops"] = "written_hops"
    num_entities: int = 20
    num_relations: int = 4
    facts_seed: int = 0
    max_hops: int = 20

    def __post_init__(self) -> None:
        require_int("max_hops", self.max_hops, minimum=1)
        KHop(num_entities=self.num_entities, num_relations=self.num_relations)

    @property
    def chains(self) -> KHop:
        """The same problems without anything written out."""
        return KHop(
            num_entities=self.num_entities,
            num_relations=self.num_relations,
            facts_seed=self.facts_seed,
        )

    @property
    def vocab_size(self) -> int:
        return self.chains.vocab_size

    def sample(self, batch: int, hops: int, generator: torch.Generator) -> TaskBatch:
        """`batch` problems of exactly `hops` hops, at most max_hops."""
        require_int("hops", hops, minimum=1, maximum=self.max_hops)
        asked, reached, *_ = self.chains.sample(batch, hops, generator)
        padding = torch.full((batch, self.max_hops - hops), self.chains.padding)
        question = torch.cat((asked, padding), dim=1)
        tokens = torch.cat((question, asked[:, :1], reached[:, 1:-1]), dim=1)
        targets = torch.cat((torch.full_like(question, IGNORE), reached[:, 1:]), dim=1)
        return TaskBatch(tokens, targets, torch.full((batch,), self.max_hops + hops))

    def prompts(self, batch: TaskBatch) -> Tensor:
        """The questions and the first entity, from which a model writes on."""
        return batch.tokens[:, : self.max_hops + 2]
