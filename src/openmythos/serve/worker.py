"""A replica: one thread that owns a model and its engine, and answers over a pipe."""

import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from openmythos.config import ConfigError
from openmythos.inference.engine import Engine
from openmythos.inference.request import EngineLimits, Event, Finished
from openmythos.model.mythos import OpenMythos
from openmythos.serve.jobs import (
    Ask,
    Cancel,
    CannotLoad,
    Generate,
    Look,
    LoopTable,
    Ready,
    Refused,
    Report,
)
from openmythos.serve.loops import look

LOG = logging.getLogger(__name__)
# Rows are for a display, which redraws ten times a second at most.
_ROWS_EVERY = 0.05
_Answers = list[tuple[int, Event | LoopTable | Refused]]


@dataclass(frozen=True)
class Loader:
    """What a replica process needs to load the model; picklable."""

    source: str
    device: str
    precision: str
    step: int | None
    limits: EngineLimits

    def engine(self) -> Engine:
        """The engine over the loaded model."""
        from openmythos.serve.source import Served

        served = Served.open(self.source)
        return Engine(served.load(self.device, self.precision, self.step), self.limits)


class Worker:
    """Moves work from a pipe into an engine and its events back, one message per step."""

    def __init__(self, engine: Engine, pipe: Connection) -> None:
        self._engine, self._pipe = engine, pipe
        self._tickets: dict[int, int] = {}  # of the engine's numbers
        self._numbers: dict[int, int] = {}
        self._running: dict[int, int] = {}  # continuations that have not finished, by ticket
        self._looks: list[Look] = []
        self._shown = 0.0

    def serve(self) -> None:
        """Work until a `Stop`, or until the other end of the pipe is closed."""
        self._pipe.send(Ready())
        while True:
            idle = self._engine.idle and not self._looks
            answers: _Answers = []
            while idle or self._pipe.poll():
                try:
                    asked = self._pipe.recv()
                except EOFError:
                    return
                if not self._take(asked, answers):
                    return
                idle = False
            if self._looks:
                answers += self._look(self._looks.pop(0))
            if not self._engine.idle:
                answers += self._step()
            self._report(answers)

    def _take(self, asked: Ask, answers: _Answers) -> bool:
        """Take a message; False if it is the last."""
        match asked:
            case Generate():
                try:
                    number = self._engine.add(asked.request)
                except ValueError as error:
                    answers.append((asked.ticket, Refused(str(error), True)))
                    return True
                self._tickets[number], self._numbers[asked.ticket] = asked.ticket, number
                self._running[asked.ticket] = asked.request.n
            case Cancel():
                if asked.ticket in self._numbers:
                    self._engine.cancel(self._numbers[asked.ticket], asked.sample)
                given_up = [x for x in self._looks if x.ticket == asked.ticket]
                self._looks = [x for x in self._looks if x.ticket != asked.ticket]
                answers += [(x.ticket, Refused("cancelled", True)) for x in given_up]
            case Look():
                self._looks.append(asked)
            case _:
                return False
        return True

    def _look(self, asked: Look) -> _Answers:
        assert isinstance(self._engine.model, OpenMythos)
        try:
            return [(asked.ticket, look(self._engine.model, asked))]
        except ValueError as error:
            return [(asked.ticket, Refused(str(error), True))]
        except Exception as error:  # of one request: the others go on
            LOG.exception("looking at the loops failed")
            return [(asked.ticket, Refused(f"{type(error).__name__}: {error}", False))]

    def _step(self) -> _Answers:
        answers: _Answers = []
        for event in self._engine.step():
            ticket = self._tickets[event.request]
            answers.append((ticket, event))
            if isinstance(event, Finished):
                self._running[ticket] -= 1
                if not self._running[ticket]:
                    del self._running[ticket], self._numbers[ticket], self._tickets[event.request]
        return answers

    def _report(self, answers: _Answers) -> None:
        now = time.monotonic()
        due = self._engine.idle or now - self._shown >= _ROWS_EVERY
        if not answers and not due:
            return
        rows = None
        if due:
            self._shown = now
            rows = tuple((self._tickets.get(row.request, -1), row) for row in self._engine.rows())
        self._pipe.send(Report(tuple(answers), self._engine.stats(), rows))


def run(load: Callable[[], Engine], pipe: Connection) -> None:
    """The body of a replica, in a process or a thread."""
    with pipe:
        try:
            try:
                engine = load()
            except ConfigError as error:
                pipe.send(CannotLoad(str(error)))
                return
            Worker(engine, pipe).serve()
        except (BrokenPipeError, ConnectionResetError):
            return  # the server is gone


def process_main(loader: Loader, pipe: Connection) -> None:
    """The main function of a replica process: it ends with the server."""
    # Signals may go to every process of a terminal or a service; the server ends its replicas.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from openmythos.machine import bound_product_caches, keep_freed_memory

    keep_freed_memory()
    bound_product_caches()
    run(loader.engine, pipe)
