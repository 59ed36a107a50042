"""Chains of lookups: facts in the weights, facts in the context, induction, group products."""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import permutations as all_orders
from typing import Literal

import torch
from torch import Tensor

from openmythos.config import require_int
from openmythos.tasks.batch import IGNORE, TaskBatch, answer_only, permutations

Supervision = Literal["prefix", "answer"]


@dataclass(frozen=True, kw_only=True)
class KHop:
    """k-hop over parametric facts: e_0 r_1 ... r_k -> r_k(... r_1(e_0)).

    Relations are random permutations of the entities, drawn once from facts_seed: all answers are
    equally likely, and the facts are not in the input (Loop, Think & Generalize). With supervision
    "prefix" every prefix is a query, with "answer" only the whole chain. readout "padded" pads to
    max_hops columns and puts the answer at a read-out token behind them.
    """

    kind: Literal["k_hop"] = "k_hop"
    num_entities: int = 20
    num_relations: int = 4
    facts_seed: int = 0
    supervision: Supervision = "prefix"
    readout: Literal["last", "padded"] = "last"
    max_hops: int = 60

    def __post_init__(self) -> None:
        require_int("num_entities", self.num_entities, minimum=2)
        require_int("num_relations", self.num_relations, minimum=1)
        require_int("max_hops", self.max_hops, minimum=1)

    @property
    def vocab_size(self) -> int:
        """Entities, relations, padding, read-out."""
        return self.num_entities + self.num_relations + 2

    @property
    def padding(self) -> int:
        """The padding token."""
        return self.num_entities + self.num_relations

    def facts(self) -> Tensor:
        """facts[r, e] = r(e), [num_relations, num_entities]."""
        generator = torch.Generator().manual_seed(self.facts_seed)
        return permutations(self.num_relations, self.num_entities, generator)

    def sample(self, batch: int, hops: int, generator: torch.Generator) -> TaskBatch:
        """`batch` problems of exactly `hops` hops."""
        start = torch.randint(self.num_entities, (batch,), generator=generator)
        relations = torch.randint(self.num_relations, (batch, hops), generator=generator)
        return self.chain(start, relations)

    def solved(self, batch: int, hops: int, generator: torch.Generator) -> tuple[TaskBatch, Tensor]:
        """Problems with the answer as the only target, and the entities on the way to it."""
        start = torch.randint(self.num_entities, (batch,), generator=generator)
        relations = torch.randint(self.num_relations, (batch, hops), generator=generator)
        plain = replace(self, supervision="prefix", readout="last")
        steps = plain.chain(start, relations).targets[:, 1:]
        return answer_only(self.chain(start, relations)), steps

    def chain(self, start: Tensor, relations: Tensor) -> TaskBatch:
        """The problems of given first entities [batch] and relations [batch, hops]."""
        batch, hops = relations.shape
        facts, entity, targets = self.facts(), start, [torch.full_like(start, IGNORE)]
        for hop in range(hops):
            entity = facts[relations[:, hop], entity]
            targets.append(entity)
        tokens = torch.cat((start[:, None], self.num_entities + relations), dim=1)
        if self.readout == "padded":
            require_int("hops", hops, maximum=self.max_hops)
            fill = tokens.new_full((batch, self.max_hops - hops), self.padding)
            ask = tokens.new_full((batch, 1), self.padding + 1)
            tokens = torch.cat((tokens, fill, ask), dim=1)
            last = self.max_hops + 1
            none = torch.full((batch, self.max_hops - hops), IGNORE)
            made = TaskBatch(
                tokens,
                torch.cat((torch.stack(targets, dim=1), none, entity[:, None]), dim=1),
                torch.full((batch,), last),
            )
        else:
            made = TaskBatch(tokens, torch.stack(targets, dim=1), torch.full((batch,), hops))
        return made if self.supervision == "prefix" else answer_only(made)


@dataclass(frozen=True, kw_only=True)
class PointerChasing:
    """k-hop in context: a_1 b_1 ... a_E b_E s > > ... >, k times: where k steps from s lead.

    The pairs are those of one random cycle through all entities, in random order, so that no walk
    returns before num_entities steps; every problem has facts of its own. `marks` puts a ";" after
    each pair: without, which tokens are a pair depends on the parity of their places.
    """

    kind: Literal["pointer_chasing"] = "pointer_chasing"
    num_entities: int = 12
    marks: bool = False
    supervision: Supervision = "prefix"

    def __post_init__(self) -> None:
        require_int("num_entities", self.num_entities, minimum=2)

    @property
    def vocab_size(self) -> int:
        """Entities, the step token, and the mark of a pair."""
        return self.num_entities + 1 + self.marks

    def sample(self, batch: int, hops: int, generator: torch.Generator) -> TaskBatch:
        """`batch` problems of exactly `hops` hops."""
        size = self.num_entities
        cycle = permutations(batch, size, generator)
        order = permutations(batch, size, generator)
        first, second = cycle.gather(1, order), cycle.roll(-1, dims=1).gather(1, order)
        columns = [first, second] + [torch.full_like(first, size + 1)] * self.marks
        pairs = torch.stack(columns, dim=2).flatten(1)
        place = torch.randint(size, (batch, 1), generator=generator)
        walk = cycle.gather(1, (place + torch.arange(hops + 1)) % size)
        steps = torch.full((batch, hops), size)
        tokens = torch.cat((pairs, walk[:, :1], steps), dim=1)
        given = pairs.shape[1] + 1
        targets = torch.cat((torch.full((batch, given), IGNORE), walk[:, 1:]), dim=1)
        made = TaskBatch(tokens, targets, torch.full((batch,), given - 1 + hops))
        return made if self.supervision == "prefix" else answer_only(made)


@dataclass(frozen=True, kw_only=True)
class PHop:
    """p-hop induction (Sanford et al. 2024): p jumps, each to the token after the previous match.

    find(v, i) = max{j <= i : v_{j-1} = v_i};  the answer at i is v at the p-th iterate of find,
    or the symbol for "nothing" where some step finds no j. p is the difficulty.
    """

    kind: Literal["p_hop"] = "p_hop"
    alphabet: int = 4
    length: int = 64
    supervision: Supervision = "prefix"

    def __post_init__(self) -> None:
        require_int("alphabet", self.alphabet, minimum=2)
        require_int("length", self.length, minimum=2)

    @property
    def vocab_size(self) -> int:
        """Symbols and "nothing"."""
        return self.alphabet + 1

    def sample(self, batch: int, hops: int, generator: torch.Generator) -> TaskBatch:
        """`batch` sequences; the last position's answer exists in most of them."""
        symbols = torch.randint(self.alphabet, (batch, self.length), generator=generator)
        return self.solve(symbols, hops)

    def solve(self, symbols: Tensor, hops: int) -> TaskBatch:
        """The problems of given symbols [batch, length]."""
        batch, length = symbols.shape
        rows = torch.arange(batch)
        # Column `length` means "nothing": it maps to itself and reads as the extra symbol.
        found = torch.full((batch, length + 1), length)
        after = torch.full((batch, self.alphabet), length)
        for i in range(length):
            if i:
                after[rows, symbols[:, i - 1]] = i
            found[:, i] = after[rows, symbols[:, i]]
        place = torch.arange(length).expand(batch, length)
        for _ in range(hops):
            place = found.gather(1, place)
        padded = torch.cat((symbols, torch.full((batch, 1), self.alphabet)), dim=1)
        made = TaskBatch(symbols, padded.gather(1, place), torch.full((batch,), length - 1))
        return made if self.supervision == "prefix" else answer_only(made)


@dataclass(frozen=True, kw_only=True)
class Composition:
    """Products in the symmetric group: g_1 ... g_k -> g_1 then g_2 ... then g_k.

    For size = 5 the word problem is complete for NC^1 (Barrington 1989): no shortcut is known.
    `factors` "adjacent": words of the size - 1 swaps of neighbours, which generate the group, so
    that few products must be known by heart.
    """

    kind: Literal["composition"] = "composition"
    size: int = 5
    factors: Literal["all", "adjacent"] = "all"
    supervision: Supervision = "prefix"

    def __post_init__(self) -> None:
        require_int("size", self.size, minimum=2, maximum=6)

    @property
    def vocab_size(self) -> int:
        """One token per permutation."""
        return len(_products(self.size))

    def sample(self, batch: int, hops: int, generator: torch.Generator) -> TaskBatch:
        """`batch` words of exactly `hops` factors."""
        products = _products(self.size)
        letters = torch.arange(len(products)) if self.factors == "all" else _swaps(self.size)
        word = letters[torch.randint(len(letters), (batch, hops), generator=generator)]
        targets, value = [], None
        for factor in word.unbind(dim=1):
            value = factor if value is None else products[value, factor]
            targets.append(value)
        made = TaskBatch(word, torch.stack(targets, dim=1), torch.full((batch,), hops - 1))
        return made if self.supervision == "prefix" else answer_only(made)


@lru_cache
def _products(size: int) -> Tensor:
    """products[g, h] = the number of "g, then h", permutations in lexicographic order."""
    orders = torch.tensor(list(all_orders(range(size))))
    later = orders[None].expand(len(orders), -1, -1)
    both = later.gather(2, orders[:, None].expand(-1, len(orders), -1))  # i -> h(g(i))
    weights = size ** torch.arange(size - 1, -1, -1)
    number = (orders * weights).sum(dim=1)
    return torch.searchsorted(number, (both * weights).sum(dim=2))


def _swaps(size: int) -> Tensor:
    """The numbers of the permutations that swap two neighbours, [size - 1]."""
    orders = list(all_orders(range(size)))
    swaps = []
    for place in range(size - 1):
        order = list(range(size))
        order[place], order[place + 1] = order[place + 1], order[place]
        swaps.append(orders.index(tuple(order)))
    return torch.tensor(swaps)
