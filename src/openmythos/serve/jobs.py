"""What the HTTP process and a replica say to each other: plain data over a pipe.

A ticket is the number that the HTTP process gives to a piece of work.
"""

from dataclasses import dataclass

from openmythos.inference.request import EngineRequest, EngineStats, Event, RowInfo
from openmythos.recurrence.exit_rules import ExitRule


@dataclass(frozen=True)
class Generate:
    """Continue a prompt; answered by events, the last of which are `Finished`."""

    ticket: int
    request: EngineRequest


@dataclass(frozen=True)
class Cancel:
    """Give up on a ticket, or on one of its continuations."""

    ticket: int
    sample: int | None = None


@dataclass(frozen=True)
class Look:
    """Tell what the model says after every loop; answered by a `LoopTable`."""

    ticket: int
    prompt: tuple[int, ...]
    num_loops: int
    exit_rule: ExitRule
    top: int
    last_only: bool


@dataclass(frozen=True)
class Stop:
    """End the process."""


Ask = Generate | Cancel | Look | Stop


@dataclass(frozen=True)
class LoopRow:
    """A loop at a position: likely tokens with probabilities, and how much the loop changed.

    See `serve.answers.LoopView`.
    """

    top: tuple[tuple[int, float], ...]
    entropy: float
    change: float | None
    kl: float | None
    kl_last: float


@dataclass(frozen=True)
class LoopTable:
    """For every position asked: the loops it ran, and its loops one by one."""

    loops_used: tuple[int, ...]
    positions: tuple[tuple[LoopRow, ...], ...]


@dataclass(frozen=True)
class Refused:
    """A ticket that cannot be answered: the client's fault (`bad_request`) or the server's."""

    message: str
    bad_request: bool


@dataclass(frozen=True)
class Ready:
    """The model is loaded."""


@dataclass(frozen=True)
class CannotLoad:
    """The model cannot be loaded: a one-line error for the user. The replica ends."""

    message: str


@dataclass(frozen=True)
class Report:
    """What one engine step brought: events by ticket, and the state of the engine after it.

    `rows` has the ticket of each row; None: as before, they are sent a few times a second.
    """

    events: tuple[tuple[int, Event | LoopTable | Refused], ...]
    stats: EngineStats
    rows: tuple[tuple[int, RowInfo], ...] | None


Tell = Ready | CannotLoad | Report
