"""Synthetic reasoning problems: seeded generators whose difficulty is a number of hops."""

from openmythos.tasks.batch import IGNORE, TaskBatch
from openmythos.tasks.chains import Composition, KHop, PHop, PointerChasing
from openmythos.tasks.counting import Addition, Parity
from openmythos.tasks.facts import FactsAndChains
from openmythos.tasks.graphs import Reachability
from openmythos.tasks.split import SystematicHops

Task = (
    KHop
    | PointerChasing
    | PHop
    | Composition
    | Addition
    | Parity
    | Reachability
    | SystematicHops
    | FactsAndChains
)

__all__ = [
    "IGNORE",
    "Addition",
    "Composition",
    "FactsAndChains",
    "KHop",
    "PHop",
    "Parity",
    "PointerChasing",
    "Reachability",
    "SystematicHops",
    "Task",
    "TaskBatch",
]
