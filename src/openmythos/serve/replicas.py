"""Replicas: processes of one thread each that compute; routing, restarts, cancellation."""

import asyncio
import contextlib
import itertools
import logging
import math
import multiprocessing
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Literal, Protocol

from openmythos.inference.engine import Engine
from openmythos.inference.request import (
    EngineRequest,
    EngineStats,
    Event,
    Finished,
    PromptScored,
    RowInfo,
)
from openmythos.recurrence.exit_rules import ExitRule
from openmythos.serve import worker
from openmythos.serve.errors import ApiError
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
    Stop,
    Tell,
)
from openmythos.serve.limits import ServerLimits

LOG = logging.getLogger(__name__)
_RESTART_AFTER = 1.0  # seconds between two starts of a replica
Answer = Event | LoopTable | Refused
State = Literal["starting", "ready", "dead"]


class Body(Protocol):
    """What a replica runs in: a process, or a thread in tests."""

    def join(self, timeout: float | None = None) -> None: ...
    def is_alive(self) -> bool: ...


Launch = Callable[[Connection], Body]


def in_process(loader: worker.Loader) -> Launch:
    """A launcher of spawned processes."""

    def launch(pipe: Connection) -> Body:
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=worker.process_main, args=(loader, pipe), daemon=True)
        process.start()
        pipe.close()  # so that the end of the process closes the pipe
        return process

    return launch


def in_thread(load: Callable[[], Engine]) -> Launch:
    """A launcher of threads of this process."""

    def launch(pipe: Connection) -> Body:
        thread = threading.Thread(target=worker.run, args=(load, pipe), daemon=True)
        thread.start()
        return thread

    return launch


class Inbox:
    """What arrives for one HTTP request, in order; answers that wait are taken together."""

    def __init__(self) -> None:
        self._answers: list[tuple[int, Answer]] = []
        self._arrived = asyncio.Event()

    def put(self, ticket: int, answer: Answer) -> None:
        self._answers.append((ticket, answer))
        self._arrived.set()

    async def arrived(self) -> None:
        """Wait until something can be taken."""
        await self._arrived.wait()

    @property
    def refusal(self) -> Refused | None:
        """A refusal that waits to be taken."""
        waiting = (answer for _, answer in self._answers)
        return next((answer for answer in waiting if isinstance(answer, Refused)), None)

    async def take(self) -> list[tuple[int, Answer]]:
        """All answers since the last call; waits for one."""
        await self._arrived.wait()
        self._arrived.clear()
        taken, self._answers = self._answers, []
        return taken


@dataclass
class _Work:
    """A ticket in a replica: where its answers go, and what is left of it."""

    inbox: Inbox
    samples: int  # continuations that have not finished
    token_loops: int  # of everything asked, for routing
    prompt_token_loops: int


@dataclass
class Replica:
    """One replica as the server sees it; all methods are called in the event loop."""

    index: int
    launch: Launch
    state: State = "dead"
    load_error: str = ""  # why it could not load the model, when last it tried
    restarts: int = -1
    stats: EngineStats = field(default_factory=EngineStats)
    rows: tuple[tuple[int, RowInfo], ...] = ()
    work: dict[int, _Work] = field(default_factory=dict)
    rate: float = 0.0  # token-loops per second while there is work
    started: float = -math.inf
    _heard: float = 0.0
    _life: int = 0
    _outbox: "queue.SimpleQueue[Ask | None]" = field(default_factory=queue.SimpleQueue)
    _body: Body | None = None

    @property
    def load(self) -> int:
        """Token-loops of all its unfinished work."""
        return sum(work.token_loops for work in self.work.values())

    @property
    def prompt_load(self) -> int:
        return sum(work.prompt_token_loops for work in self.work.values())

    def hangs(self, seconds: float) -> bool:
        """Whether it has work and has been silent for so long."""
        return bool(self.work) and time.monotonic() - self._heard > seconds

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Launch it; it takes work once it has loaded the model."""
        ours, theirs = multiprocessing.Pipe()
        self._life += 1
        self.state, self.started, self.restarts = "starting", time.monotonic(), self.restarts + 1
        self._outbox = queue.SimpleQueue()
        self._body = self.launch(theirs)
        life = self._life
        for target, args in ((self._read, (loop, ours, life)), (_write, (self._outbox, ours))):
            threading.Thread(target=target, args=args, daemon=True).start()

    def _read(self, loop: asyncio.AbstractEventLoop, pipe: Connection, life: int) -> None:
        """Body of the thread that reads the pipe."""
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            try:
                while True:
                    loop.call_soon_threadsafe(self._hear, life, pipe.recv())
            except (EOFError, OSError):
                loop.call_soon_threadsafe(self._died, life)

    def _hear(self, life: int, tell: Tell) -> None:
        if life != self._life:
            return
        now = time.monotonic()
        if isinstance(tell, Ready):
            self.state, self.load_error = "ready", ""
        elif isinstance(tell, CannotLoad):
            # Its next start is so long after this one's end: the server may end before.
            self.load_error, self.started = tell.message, now
        elif isinstance(tell, Report):
            # Slow changes of the rate: it is for an estimate of waiting times.
            gained, spent = tell.stats.token_loops - self.stats.token_loops, now - self._heard
            if gained > 0 and 0 < spent < 5:
                fresh = gained / spent
                self.rate = fresh if not self.rate else 0.9 * self.rate + 0.1 * fresh
            self.stats = tell.stats
            self.rows = self.rows if tell.rows is None else tell.rows
            for ticket, answer in tell.events:
                self._answer(ticket, answer)
        self._heard = now

    def _answer(self, ticket: int, answer: Answer) -> None:
        work = self.work.get(ticket)
        if work is None:
            return
        if isinstance(answer, Finished):
            work.samples -= 1
        elif isinstance(answer, PromptScored):
            work.prompt_token_loops = 0
        if isinstance(answer, LoopTable | Refused) or work.samples == 0:
            del self.work[ticket]
        work.inbox.put(ticket, answer)

    def _died(self, life: int) -> None:
        if life != self._life:
            return
        self.state, self.rows, self.stats, self.rate = "dead", (), EngineStats(), 0.0
        lost, self.work = self.work, {}
        self._outbox.put(None)
        for ticket, work in lost.items():
            work.inbox.put(ticket, Refused("the replica that computed this died", False))

    def ask(self, ask: Ask, work: _Work | None = None) -> None:
        """Send a message; it never blocks."""
        if work is not None and not isinstance(ask, Cancel | Stop):
            if not self.work:
                self._heard = time.monotonic()
            self.work[ask.ticket] = work
        self._outbox.put(ask)

    def stop(self) -> None:
        """Tell it to end; what it still answers is ignored."""
        self._life += 1
        self._outbox.put(Stop())
        self._outbox.put(None)

    def join(self, seconds: float) -> None:
        """Wait for its end. A process is killed: it has nothing to save, and ends slowly."""
        if isinstance(self._body, multiprocessing.process.BaseProcess):
            self._body.kill()
        if self._body is not None:
            self._body.join(seconds)


def _write(outbox: "queue.SimpleQueue[Ask | None]", pipe: Connection) -> None:
    """Body of the thread that writes to the pipe: a full pipe must not block the server."""
    with contextlib.suppress(OSError):
        while (ask := outbox.get()) is not None:
            pipe.send(ask)


class Replicas:
    """All replicas: starts them, routes work to them, restarts those that died."""

    def __init__(self, count: int, launch: Launch, limits: ServerLimits) -> None:
        self._limits = limits
        self._tickets = itertools.count(1)
        self.all = [Replica(index, launch) for index in range(count)]
        self.draining = False
        self._monitor: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Launch all replicas and watch over them."""
        self._monitor = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            for replica in self.all:
                waited = time.monotonic() - replica.started
                if replica.state == "dead" and waited >= _RESTART_AFTER:
                    if replica.restarts >= 0:
                        why = replica.load_error or "died"
                        LOG.warning("replica %d is started again: %s", replica.index, why)
                    replica.start(loop)
            await asyncio.sleep(0.1)

    async def close(self) -> None:
        """End all replicas."""
        if self._monitor is not None:
            self._monitor.cancel()
        for replica in self.all:
            replica.stop()
        await asyncio.to_thread(self._join)

    def _join(self) -> None:
        for replica in self.all:
            replica.join(2.0)

    @property
    def busy(self) -> bool:
        return any(replica.work for replica in self.all)

    @property
    def ready(self) -> bool:
        """Whether some replica takes work."""
        return not self.draining and any(replica.state == "ready" for replica in self.all)

    def generate(self, requests: list[EngineRequest], inbox: Inbox) -> "list[Ticket]":
        """Send all requests to replicas, or none; an ApiError says when to try again."""
        costs = [(_prompt_cost(x), _prompt_cost(x) + _new_cost(x)) for x in requests]
        chosen = self._choose(costs)
        tickets = []
        for request, replica, (prompt, whole) in zip(requests, chosen, costs, strict=True):
            number = next(self._tickets)
            replica.ask(Generate(number, request), _Work(inbox, request.n, whole, prompt))
            tickets.append(Ticket(number, replica))
        return tickets

    def look(
        self,
        prompt: tuple[int, ...],
        num_loops: int,
        rule: ExitRule,
        inbox: Inbox,
        *,
        top: int,
        last_only: bool,
    ) -> "Ticket":
        """Ask a replica for the loops of a prompt."""
        cost = len(prompt) * num_loops
        (replica,) = self._choose([(cost, cost)])
        number = next(self._tickets)
        asked = Look(number, prompt, num_loops, rule, top, last_only)
        replica.ask(asked, _Work(inbox, 1, cost, cost))
        return Ticket(number, replica)

    def _choose(self, costs: list[tuple[int, int]]) -> list[Replica]:
        """A replica for each piece of work: that with the least work left of those with room."""
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        alive = [replica for replica in self.all if replica.state == "ready"]
        if not alive:
            raise ApiError(503, "no replica has loaded the model yet", retry_after=1)
        held = {x.index: [len(x.work), x.prompt_load, x.load] for x in alive}
        chosen = []
        for prompt, whole in costs:
            room = [replica for replica in alive if self._fits(held[replica.index], prompt)]
            if not room:
                raise self._full(alive)
            best = min(room, key=lambda replica: held[replica.index][2])
            added = zip(held[best.index], (1, prompt, whole), strict=True)
            held[best.index] = [a + b for a, b in added]
            chosen.append(best)
        return chosen

    def _fits(self, held: list[int], prompt: int) -> bool:
        limits = self._limits
        # A prompt over the limit on its own is still answered, by an idle replica.
        room = held[1] == 0 or held[1] + prompt <= limits.max_prompt_token_loops
        return held[0] < limits.max_requests and room

    def _full(self, alive: list[Replica]) -> ApiError:
        # The time until an average request of the least busy replica will have ended.
        waits = [x.load / x.rate / max(len(x.work), 1) for x in alive if x.rate > 0]
        seconds = min(max(math.ceil(min(waits, default=1.0)), 1), 60)
        text = "the server is full (limits.max_requests or max_prompt_token_loops); try again later"
        return ApiError(429, text, code="rate_limit_exceeded", retry_after=seconds)

    def fail_all(self, message: str) -> None:
        """End all work with an error."""
        for replica in self.all:
            for ticket in list(replica.work):
                replica.ask(Cancel(ticket))
                replica._answer(ticket, Refused(message, False))

    def rows(self) -> Iterator[tuple[int, int, RowInfo]]:
        """(replica, ticket, row) of all sequences in the engines."""
        for replica in self.all:
            for ticket, row in replica.rows:
                yield replica.index, ticket, row


@dataclass(frozen=True)
class Ticket:
    """Work in a replica."""

    number: int
    replica: Replica

    def cancel(self, sample: int | None = None) -> None:
        """Give up on it, or on one of its continuations; its pages are free after a step."""
        if self.number in self.replica.work:
            self.replica.ask(Cancel(self.number, sample))


def _prompt_cost(request: EngineRequest) -> int:
    return len(request.prompt) * request.options.num_loops


def _new_cost(request: EngineRequest) -> int:
    return request.n * request.options.max_new_tokens * request.options.num_loops
