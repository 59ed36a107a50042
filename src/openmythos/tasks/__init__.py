"""Synthetic reasoning problems: seeded generators whose difficulty is a number of hops."""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from openmythos.tasks.batch import IGNORE, TaskBatch
from openmythos.tasks.chains import Composition, KHop, PHop, PointerChasing
from openmythos.tasks.counting import Addition, Parity
from openmythos.tasks.english import EnglishPairs
from openmythos.tasks.facts import FactsAndChains
from openmythos.tasks.graphs import Reachability
from openmythos.tasks.pairs import FactPairs
from openmythos.tasks.thought import WrittenHops

Task = (
    KHop
    | PointerChasing
    | PHop
    | Composition
    | Addition
    | Parity
    | Reachability
    | FactPairs
    | EnglishPairs
    | FactsAndChains
    | WrittenHops
)

# Tasks whose answers rest on facts drawn from their facts_seed.
TaskWithFacts = KHop | FactPairs | EnglishPairs | FactsAndChains | WrittenHops


@runtime_checkable
class Solvable(Protocol):
    """A task that knows the steps to its answers."""

    @property
    def vocab_size(self) -> int: ...
    def solved(self, batch: int, hops: int, generator: torch.Generator) -> tuple[TaskBatch, Tensor]:
        """(problems, the steps [batch, hops] that lead to their answers, the last of them)."""


__all__ = [
    "IGNORE",
    "Addition",
    "Composition",
    "EnglishPairs",
    "FactPairs",
    "FactsAndChains",
    "KHop",
    "PHop",
    "Parity",
    "PointerChasing",
    "Reachability",
    "Solvable",
    "Task",
    "TaskBatch",
    "TaskWithFacts",
    "WrittenHops",
]
