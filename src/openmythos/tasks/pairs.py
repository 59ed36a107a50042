"""Pairs of facts, of which training composes a fixed few and never composes some (grokking)."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from openmythos.config import require_int, require_number
from openmythos.tasks.batch import TaskBatch, permutations
from openmythos.tasks.chains import KHop

Part = Literal["train", "held_out", "ood"]
PARTS: tuple[Part, ...] = ("train", "held_out", "ood")


@dataclass(frozen=True, kw_only=True)
class FactPairs:
    """e r -> r(e) and e r s -> s(r(e)), the latter from a fixed list (arXiv 2405.15071).

    A fact is (relation, entity), a pair two facts of which the second is asked of what the first
    leads to. A share `alone` of the facts occurs in training by itself only; "ood" pairs consist of
    two such facts. Of the pairs of other facts a share is "held_out", and of the rest `per_fact`
    times as many as there are such facts are the pairs that training asks, again and again. No row
    of training has more than two hops, so that no pair that is not asked occurs inside another row.
    A row of two hops has a target after the first, too. In batches of pairs, a share `one_hop` of
    the rows is a single fact, any one.
    """

    kind: Literal["fact_pairs"] = "fact_pairs"
    num_entities: int = 25
    num_relations: int = 28
    facts_seed: int = 0
    alone: float = 0.105
    held_out: float = 0.3
    per_fact: float = 7.2
    one_hop: float = 0.4

    def __post_init__(self) -> None:
        require_int("num_entities", self.num_entities, minimum=2)
        require_int("num_relations", self.num_relations, minimum=2)
        for name in ("alone", "held_out"):
            require_number(name, getattr(self, name), above=0, below=1)
        require_number("per_fact", self.per_fact, above=0, at_most=1e6)
        require_number("one_hop", self.one_hop, at_least=0, below=1)

    @property
    def chains(self) -> KHop:
        """The same facts without a split."""
        return KHop(
            num_entities=self.num_entities,
            num_relations=self.num_relations,
            facts_seed=self.facts_seed,
        )

    @property
    def vocab_size(self) -> int:
        return self.chains.vocab_size

    def is_alone(self) -> Tensor:
        """[num_relations, num_entities], True for facts that training never composes."""
        count = self.num_relations * self.num_entities
        chosen = torch.zeros(count, dtype=torch.bool)
        chosen[self._shuffled(1, count)[: round(self.alone * count)]] = True
        return chosen.view(self.num_relations, self.num_entities)

    def pairs(self, part: Part) -> Tensor:
        """All pairs of a part as rows (entity, first relation, second relation), [pairs, 3]."""
        return _pairs(self)[part]

    def sample(
        self, batch: int, hops: int, generator: torch.Generator, part: Part = "train"
    ) -> TaskBatch:
        """`batch` rows of a part; "train" with two hops includes rows of one fact."""
        require_int("hops", hops, minimum=1, maximum=2)
        if hops == 1:
            return self._single(batch, generator)
        singles = round(self.one_hop * batch) if part == "train" else 0
        rows = self.pairs(part)
        chosen = rows[torch.randint(len(rows), (batch - singles,), generator=generator)]
        made = self.asked(chosen)
        if not singles:
            return made
        return made.and_shorter(self._single(singles, generator), self.chains.padding)

    def asked(self, rows: Tensor) -> TaskBatch:
        """The problems of given pairs [pairs, 3]."""
        return self.chains.chain(rows[:, 0], rows[:, 1:])

    def _single(self, batch: int, generator: torch.Generator) -> TaskBatch:
        return self.chains.sample(batch, 1, generator)

    def _shuffled(self, salt: int, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(1_000_003 * self.facts_seed + salt)
        return permutations(1, count, generator)[0]


@lru_cache(maxsize=8)
def _pairs(task: FactPairs) -> dict[Part, Tensor]:
    entities, relations = task.num_entities, task.num_relations
    alone, facts = task.is_alone(), task.chains.facts()
    rows = torch.cartesian_prod(
        torch.arange(entities), torch.arange(relations), torch.arange(relations)
    )
    start, first, second = rows.unbind(dim=1)
    by_itself = torch.stack((alone[first, start], alone[second, facts[first, start]]), dim=1)
    others = rows[~by_itself.any(dim=1)]
    others = others[task._shuffled(2, len(others))]
    unseen = round(task.held_out * len(others))
    asked = round(task.per_fact * int((~alone).sum()))
    require_int("per_fact times the facts", asked, maximum=len(others) - unseen)
    return {
        "train": others[unseen : unseen + asked],
        "held_out": others[:unseen],
        "ood": rows[by_itself.all(dim=1)],
    }
