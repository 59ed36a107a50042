"""Composition of facts that training never composes (systematic generalisation)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from openmythos.config import require_int, require_number
from openmythos.tasks.batch import TaskBatch, permutations
from openmythos.tasks.chains import KHop

Part = Literal["train", "held_out", "ood"]


@dataclass(frozen=True, kw_only=True)
class SystematicHops:
    """Chains over parametric facts, some of which training never composes (arXiv 2405.15071).

    A fact is (relation, entity). A share `alone` of the facts occurs in training only as single
    hops; "ood" chains consist of these. A pair of other facts is (entity, first relation, second
    relation). A share `held_out` of the pairs occurs in no two-hop chain of training; "held_out"
    chains consist of these. In training batches of longer chains, a share `one_hop` of the rows is
    a single hop with any fact. With `echo`, the first entity is also a target, at its own position.
    """

    kind: Literal["systematic_hops"] = "systematic_hops"
    num_entities: int = 50
    num_relations: int = 8
    facts_seed: int = 0
    alone: float = 0.1
    held_out: float = 0.3
    one_hop: float = 0.4
    echo: bool = True

    def __post_init__(self) -> None:
        require_int("num_entities", self.num_entities, minimum=2)
        require_int("num_relations", self.num_relations, minimum=2)
        for name in ("alone", "held_out"):
            require_number(name, getattr(self, name), above=0, below=1)
        require_number("one_hop", self.one_hop, at_least=0, below=1)

    @property
    def hops(self) -> KHop:
        """The same facts without a split."""
        return KHop(
            num_entities=self.num_entities,
            num_relations=self.num_relations,
            facts_seed=self.facts_seed,
        )

    @property
    def vocab_size(self) -> int:
        return self.hops.vocab_size

    def is_alone(self) -> Tensor:
        """[num_relations, num_entities], True for facts that training asks only as single hops."""
        count = round(self.alone * self.num_relations * self.num_entities)
        return self._draw(1, count, (self.num_relations, self.num_entities))

    def is_held_out(self) -> Tensor:
        """[num_entities, num_relations, num_relations], True for pairs kept from two-hop chains."""
        shape = (self.num_entities, self.num_relations, self.num_relations)
        return self._draw(2, round(self.held_out * torch.Size(shape).numel()), shape)

    def _draw(self, salt: int, count: int, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(1_000_003 * self.facts_seed + salt)
        flat = torch.zeros(torch.Size(shape).numel(), dtype=torch.bool)
        flat[permutations(1, len(flat), generator)[0, :count]] = True
        return flat.view(shape)

    def sample(
        self, batch: int, hops: int, generator: torch.Generator, part: Part = "train"
    ) -> TaskBatch:
        """`batch` chains of `hops` hops of a part; "train" includes rows with a single hop."""
        singles = round(self.one_hop * batch) if part == "train" and hops > 1 else 0
        made = self._chains(batch - singles, hops, generator, part)
        if singles:
            short = self._chains(singles, 1, generator, part)
            made = made.and_shorter(short, self.hops.padding)
        if self.echo:
            made.targets[:, 0] = made.tokens[:, 0]
        return made

    def _chains(self, batch: int, hops: int, generator: torch.Generator, part: Part) -> TaskBatch:
        """Chains of one part only; a single hop of "train" may be any fact."""
        chosen = []
        missing = batch
        while missing:
            start = torch.randint(self.num_entities, (4 * batch,), generator=generator)
            relations = torch.randint(self.num_relations, (4 * batch, hops), generator=generator)
            fits = self._belongs(start, relations, part)
            chosen.append(torch.cat((start[:, None], relations), dim=1)[fits][:missing])
            missing -= len(chosen[-1])
        rows = torch.cat(chosen)
        return self.hops.chain(rows[:, 0], rows[:, 1:])

    def _belongs(self, start: Tensor, relations: Tensor, part: Part) -> Tensor:
        alone, facts, entity = self.is_alone(), self.hops.facts(), start
        hops = relations.shape[1]
        if part == "train" and hops == 1:
            return torch.ones(len(start), dtype=torch.bool)
        met = []
        for hop in range(hops):
            met.append(alone[relations[:, hop], entity])
            entity = facts[relations[:, hop], entity]
        alones = torch.stack(met, dim=1)
        if part == "ood":
            return alones.all(dim=1)
        fits = ~alones.any(dim=1)
        if hops == 2:
            held_out = self.is_held_out()[start, relations[:, 0], relations[:, 1]]
            fits &= held_out if part == "held_out" else ~held_out
        return fits
