"""Which sequences are read, looped and read out in a step of the engine: plain Python, no torch.

    waiting -> prefill -> boundary <-> loop -> ended

A row waits for pages, is prefilled (in chunks), then alternates between the loops of a token and
the boundary between two tokens: coda, head and sampling of one, embedding and prelude of the next.
Rows at the boundary wait for each other, since coda, head and prelude of few rows cost almost what
those of many do. A row that finds no page for its next token takes those of the youngest one, which
then waits again and is computed anew.
"""

import bisect
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from openmythos.config import require
from openmythos.inference.request import EngineLimits, Phase

MOST_PASSED = 8  # how often later rows may be admitted before one that finds no pages


class PageLedger:
    """Which pages are free, and how many rows hold each of the others. Page 0 is nobody's."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._free = list(range(pages, 0, -1))
        self._holders = [0] * (pages + 1)

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> tuple[int, ...] | None:
        """`count` free pages; None, and nothing taken, if there are fewer."""
        if count > len(self._free):
            return None
        taken = tuple(self._free.pop() for _ in range(count))
        self.share(taken)
        return taken

    def share(self, pages: Sequence[int]) -> None:
        """One more row holds these pages."""
        for page in pages:
            self._holders[page] += 1

    def give(self, pages: Sequence[int]) -> None:
        """A row no longer holds these pages."""
        for page in pages:
            self._holders[page] -= 1
            assert self._holders[page] >= 0, f"page {page} was given back twice"
            if self._holders[page] == 0:
                self._free.append(page)


@dataclass(eq=False, kw_only=True)
class Row:
    """A sequence, as the scheduler sees it.

    `planes`: pages per block of `page_tokens` tokens. `tokens` are known, `prompt` of them given,
    and `cached` of them have keys and values; it gets at most `most_tokens`. Rows of the same
    `group` may be prefilled together. `chunkable`: a prompt may be read in pieces; `restartable`:
    the row can be computed anew with the same result.
    """

    request: int
    sample: int
    num_loops: int
    planes: int
    prompt: int
    tokens: int
    most_tokens: int
    group: Hashable = None
    chunkable: bool = True
    restartable: bool = True
    phase: Phase = "waiting"
    cached: int = 0
    loop: int = 0
    waited: int = 0
    passed: int = 0
    blocks: list[tuple[int, ...]] = field(default_factory=list)

    @property
    def age(self) -> tuple[int, int]:
        """Sorts rows by arrival."""
        return self.request, self.sample


R = TypeVar("R", bound=Row)


class Prefill(NamedTuple, Generic[R]):
    """Read tokens [start, stop) of a row; of several rows, all that each has."""

    rows: list[R]
    start: int
    stop: int


class Scheduler(Generic[R]):
    """The phases of all rows, and who holds which pages."""

    def __init__(self, limits: EngineLimits) -> None:
        self.limits = limits
        self.ledger = PageLedger(limits.pages)
        self.waiting: list[R] = []  # by arrival
        self.running: list[R] = []  # in flight: prefill, boundary, loop
        self.preemptions = 0
        self._reading: list[R] = []

    def check(self, row: R) -> None:
        """Raise a ConfigError for a row that can never have the pages that it may need."""
        need = self._blocks(max(row.tokens, row.most_tokens - 1)) * row.planes
        text = f"are fewer than the {need} of a request with {row.most_tokens} tokens"
        require(need <= self.ledger.pages, "pages", self.ledger.pages, text)

    def add(self, row: R) -> None:
        bisect.insort(self.waiting, row, key=lambda waiting: waiting.age)

    def remove(self, row: R) -> None:
        """The row has ended: its pages are free."""
        if row.phase == "waiting":
            self.waiting.remove(row)
        else:
            self._leave(row)

    def _leave(self, row: R) -> None:
        self.running.remove(row)
        if row in self._reading:
            self._reading.remove(row)
        for pages in row.blocks:
            self.ledger.give(pages)
        row.blocks = []

    # Prefill

    def next_prefill(self) -> Prefill[R] | None:
        """What to read now, or None. Admits waiting rows if none is being read."""
        if not self._reading:
            self._reading = self._admitted()
        if not self._reading:
            return None
        first = self._reading[0]
        stop = max(row.tokens for row in self._reading)
        if first.chunkable and len(self._reading) == 1:
            stop = min(stop, first.cached + self._chunk(first))
        return Prefill(list(self._reading), first.cached, stop)

    def prefilled(self, job: Prefill[R]) -> bool:
        """The job is done; returns whether its rows have been read to the end."""
        for row in job.rows:
            row.cached = min(job.stop, row.tokens)
        if job.stop < max(row.tokens for row in job.rows):
            return False
        for row in job.rows:
            row.phase, row.waited = "boundary", 0
        self._reading = []
        return True

    def fork(self, row: R) -> list[R]:
        """Admit the waiting samples of the same prompt, which has just been read.

        They share the full pages of the prompt, and have own ones for the rest.
        """
        full, forked = row.cached // self.limits.page_tokens, []
        alike = [x for x in self.waiting if x.request == row.request and x.tokens == x.prompt]
        for other in alike if row.tokens == row.prompt else []:
            if len(self.running) == self.limits.max_rows or not self._fits(other, full):
                continue
            self._take(other, self._first_blocks(other) - full)
            for pages in row.blocks[:full]:
                self.ledger.share(pages)
            other.blocks = row.blocks[:full] + other.blocks
            other.phase, other.waited, other.cached = "boundary", 0, row.cached
            forked.append(other)
        return forked

    def _chunk(self, row: R) -> int:
        return max(1, self.limits.prefill_budget // row.num_loops)

    def _admitted(self) -> list[R]:
        """The next row to read, and others of its group that fit into the same chunk.

        Only rows for which there is a place now: the group does not go before older requests.
        """
        places = self.limits.max_rows - len(self.running)
        group: list[R] = []
        blocked: list[R] = []  # they find no pages; later ones may pass them
        for row in list(self.waiting):
            if places == 0:
                break
            if group and not self._joins(row, group):
                places -= 1
                continue
            if self._fits(row):
                places -= 1
                self._take(row, self._first_blocks(row))
                row.phase = "prefill"
                group.append(row)
                for passed in blocked:
                    passed.passed += 1
            else:
                blocked.append(row)
            if any(row.passed >= MOST_PASSED for row in blocked):
                break
        return group

    def _joins(self, row: R, group: Sequence[R]) -> bool:
        """Whether a row can be read together with these; samples of one prompt fork instead."""
        alike = row.group == group[0].group and all(row.request != x.request for x in group)
        longest = max(row.tokens, *(x.tokens for x in group))
        return alike and longest * (len(group) + 1) <= self._chunk(row)

    def _fits(self, row: R, shared: int = 0) -> bool:
        """Whether there are pages for the row and for the next block of every other one."""
        growth = sum(x.planes for x in self.running if x.restartable)
        blocks = self._first_blocks(row) - shared
        return blocks * row.planes + growth <= self.ledger.free

    def _take(self, row: R, blocks: int) -> None:
        for _ in range(blocks):
            pages = self.ledger.take(row.planes)
            assert pages is not None
            row.blocks.append(pages)
        self.waiting.remove(row)
        self.running.append(row)

    def _first_blocks(self, row: R) -> int:
        """Blocks at admission: for one token more than are known; for all, if it cannot restart."""
        most = max(row.tokens, row.most_tokens - 1)
        return self._blocks(min(row.tokens + 1, most) if row.restartable else most)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.limits.page_tokens)

    # Boundary

    def boundary(self) -> list[R]:
        """The rows at the boundary, if it is to run now; else none."""
        rows = [row for row in self.running if row.phase == "boundary"]
        looping = sum(row.phase == "loop" for row in self.running)
        if not rows:
            return []
        due = len(rows) > self.limits.boundary_share * (len(rows) + looping)
        due = due or any(row.waited >= self.longest_wait(row) for row in rows)
        return rows if due or not looping else []

    def longest_wait(self, row: R) -> int:
        """How many loops a row waits at the boundary at most."""
        return max(self.limits.boundary_wait, row.num_loops)

    def read_out(self, rows: Sequence[R]) -> None:
        """The keys and values of the rows' present tokens are complete."""
        for row in rows:
            row.cached += 1

    def grow(self, rows: Sequence[R]) -> tuple[list[R], list[R]]:
        """Pages for the next token of each row: (rows that go on, rows that wait again)."""
        preempted: list[R] = []
        for row in sorted(rows, key=lambda row: row.age):
            while row not in preempted and row.cached >= len(row.blocks) * self.limits.page_tokens:
                pages = self.ledger.take(row.planes)
                if pages is None:
                    preempted.append(self._preempt())
                else:
                    row.blocks.append(pages)
        ready = [row for row in rows if row not in preempted]
        for row in ready:
            row.phase, row.loop = "loop", 0
        return ready, preempted

    def ahead(self, row: R, tokens: int) -> int:
        """Pages for up to `tokens` more tokens than the next; returns for how many there are.

        It takes no other row's pages, and none that another row's next token may need.
        """
        tokens = min(tokens, row.most_tokens - 1 - row.tokens)
        size, growth = self.limits.page_tokens, sum(x.planes for x in self.running)
        while row.cached + 1 + tokens > len(row.blocks) * size:
            if self.ledger.free - row.planes < growth:
                return max(0, len(row.blocks) * size - row.cached - 1)
            pages = self.ledger.take(row.planes)
            assert pages is not None
            row.blocks.append(pages)
        return max(0, tokens)

    def _preempt(self) -> R:
        """Take the pages of the youngest row that can be computed anew."""
        victim = max((row for row in self.running if row.restartable), key=lambda row: row.age)
        self._leave(victim)
        victim.phase, victim.cached = "waiting", 0
        self.add(victim)
        self.preemptions += 1
        return victim

    # Loops

    def looping(self) -> list[R]:
        """The rows that run a loop now."""
        return [row for row in self.running if row.phase == "loop"]

    def looped(self, done: Sequence[R]) -> None:
        """The looping rows ran a loop; the `done` ones ran the last of their token."""
        for row in self.running:
            if row.phase == "loop":
                row.loop += 1
            elif row.phase == "boundary":
                row.waited += 1
        for row in done:
            row.phase, row.waited = "boundary", 0
