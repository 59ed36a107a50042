"""Many facts that are asked one by one, and chains over few: memory and composition apart."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from openmythos.config import require_int
from openmythos.tasks.batch import IGNORE, TaskBatch
from openmythos.tasks.chains import KHop


@dataclass(frozen=True, kw_only=True)
class FactsAndChains:
    """s_1 a_1 ... s_m a_m e_0 r_1 ... r_k: m single facts, then a chain of k hops.

    The value of attribute a of subject s is the target at a: a subject drawn once from facts_seed,
    so that a fact holds log2(num_subjects) bits, and no fact follows from another. The chain is one
    of `KHop` with entities and relations of its own, and has a target at every prefix.
    """

    kind: Literal["facts_and_chains"] = "facts_and_chains"
    num_subjects: int = 96
    num_attributes: int = 96
    facts_per_row: int = 8
    num_entities: int = 20
    num_relations: int = 4
    facts_seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_subjects", "num_entities"):
            require_int(name, getattr(self, name), minimum=2)
        for name in ("num_attributes", "num_relations", "facts_per_row"):
            require_int(name, getattr(self, name), minimum=1)

    @property
    def chains(self) -> KHop:
        """The chains alone; their tokens come first in the vocabulary."""
        return KHop(
            num_entities=self.num_entities,
            num_relations=self.num_relations,
            facts_seed=self.facts_seed,
        )

    @property
    def vocab_size(self) -> int:
        """The tokens of chains, subjects, attributes."""
        return self.chains.vocab_size + self.num_subjects + self.num_attributes

    @property
    def num_facts(self) -> int:
        """The number of single facts."""
        return self.num_subjects * self.num_attributes

    def values(self) -> Tensor:
        """values[a, s], a subject's number, [num_attributes, num_subjects]."""
        generator = torch.Generator().manual_seed(1_000_003 * self.facts_seed + 1)
        shape = (self.num_attributes, self.num_subjects)
        return torch.randint(self.num_subjects, shape, generator=generator)

    def sample(self, batch: int, hops: int, generator: torch.Generator) -> TaskBatch:
        """`batch` rows, each with facts_per_row facts and a chain of exactly `hops` hops."""
        shape = (batch, self.facts_per_row)
        subject = torch.randint(self.num_subjects, shape, generator=generator)
        attribute = torch.randint(self.num_attributes, shape, generator=generator)
        value = self.values()[attribute, subject]
        first = self.chains.vocab_size
        asked = torch.stack((first + subject, first + self.num_subjects + attribute), dim=2)
        wanted = torch.stack((torch.full(shape, IGNORE), first + value), dim=2)
        chain = self.chains.sample(batch, hops, generator)
        return TaskBatch(
            torch.cat((asked.flatten(1), chain.tokens), dim=1),
            torch.cat((wanted.flatten(1), chain.targets), dim=1),
            chain.answer_at + 2 * self.facts_per_row,
        )

    def fact_columns(self) -> Tensor:
        """The columns whose targets are single facts, [facts_per_row]."""
        return torch.arange(1, 2 * self.facts_per_row, 2)
