"""Which problems training asks: a curriculum over hops, and loops that grow with the hops."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from openmythos.config import require, require_int, require_number


@dataclass(frozen=True, kw_only=True)
class TiedLoops:
    """As many loops as the problem has hops, and uniformly 0 ... extra more."""

    kind: Literal["tied"] = "tied"
    extra: int = 6
    per: ClassVar[Literal["batch"]] = "batch"

    def __post_init__(self) -> None:
        require_int("extra", self.extra, minimum=0)


@dataclass(frozen=True, kw_only=True)
class HopCurriculum:
    """Problems of min_hops ... max_hops hops, longer ones as the shorter ones are mastered.

    A step draws hops uniformly from `min_hops` to the curriculum's reach, which starts at
    `first_hops` and grows by two whenever the running accuracy at the answer of its longest quarter
    passes `mastery` (first_hops = max_hops: no curriculum).
    """

    min_hops: int = 1
    max_hops: int = 20
    first_hops: int = 2
    mastery: float = 0.8

    def __post_init__(self) -> None:
        for name in ("min_hops", "max_hops", "first_hops"):
            require_int(name, getattr(self, name), minimum=1)
        require_number("mastery", self.mastery, above=0, at_most=1)
        fits = self.min_hops <= self.first_hops <= self.max_hops
        allowed = f"must be from min_hops = {self.min_hops} to max_hops = {self.max_hops}"
        require(fits, "first_hops", self.first_hops, allowed)
