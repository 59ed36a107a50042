"""The scheduler, driven by a mock in place of a model: no torch."""

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from openmythos.config import ConfigError
from openmythos.inference.request import EngineLimits
from openmythos.inference.scheduler import MOST_PASSED, PageLedger, Row, Scheduler


class Mock:
    """Steps a scheduler as the engine does; a row ends when it has all its tokens."""

    def __init__(self, limits: EngineLimits) -> None:
        self.scheduler: Scheduler[Row] = Scheduler(limits)
        self.ready: set[Row] = set()  # rows at the boundary whose loops are done
        self.ended: list[Row] = []
        self.served: Counter[Row] = Counter()  # loops run, also those that were lost
        self.seed = random.Random(0)

    def end(self, row: Row) -> None:
        self.scheduler.remove(row)
        row.phase = "ended"
        self.ready.discard(row)
        self.ended.append(row)

    def token(self, row: Row) -> None:
        row.tokens += 1
        if row.tokens == row.most_tokens:
            self.end(row)

    def step(self) -> None:
        job = self.scheduler.next_prefill()
        if job is not None:
            chunk = (job.stop - job.start) * len(job.rows) * job.rows[0].num_loops
            alone = len(job.rows) == 1 and (job.stop == job.start + 1 or not job.rows[0].chunkable)
            assert alone or chunk <= self.scheduler.limits.prefill_budget
            assert len({row.group for row in job.rows}) == 1
            if self.scheduler.prefilled(job):
                for read in job.rows:
                    forked = self.scheduler.fork(read)
                    assert not forked or {x.tokens for x in (read, *forked)} == {read.prompt}
                    for row in (read, *forked):
                        self.token(row)
        rows = self.scheduler.boundary()
        if rows:
            done = [row for row in rows if row in self.ready]
            self.ready.clear()
            self.scheduler.read_out(done)
            for row in done:
                self.token(row)
            _, preempted = self.scheduler.grow([row for row in rows if row.phase == "boundary"])
            self.ready -= set(preempted)
        looping = self.scheduler.looping()
        for row in looping:
            assert row.cached == row.tokens - 1, "the newest token is being computed"
            assert row.cached < len(row.blocks) * self.scheduler.limits.page_tokens
            self.served[row] += 1
        done = [r for r in looping if r.loop + 1 == r.num_loops or self.seed.random() < 0.1]
        self.ready |= set(done)
        if looping:
            self.scheduler.looped(done)

    def check(self) -> None:
        """Pages, rows and waits are in order."""
        scheduler, ledger = self.scheduler, self.scheduler.ledger
        held: Counter[int] = Counter()
        for row in scheduler.running:
            size = scheduler.limits.page_tokens
            assert all(len(block) == row.planes for block in row.blocks)
            assert row.cached <= len(row.blocks) * size
            held.update(page for block in row.blocks for page in block)
            shared = [page for block in row.blocks[row.cached // size :] for page in block]
            assert all(ledger._holders[page] == 1 for page in shared), "written by several rows"
            if row.phase == "boundary":
                assert row.waited <= scheduler.longest_wait(row)
        assert 0 not in held
        assert all(ledger._holders[page] == held[page] for page in range(ledger.pages + 1))
        assert sorted(ledger._free) == [p for p in range(1, ledger.pages + 1) if not held[p]]
        assert len(scheduler.running) <= scheduler.limits.max_rows
        assert all(not row.blocks for row in scheduler.waiting)
        assert scheduler.waiting == sorted(scheduler.waiting, key=lambda row: row.age)

    def idle(self) -> bool:
        return not self.scheduler.running and not self.scheduler.waiting


def new_row(number: int, sample: int = 0, **changes: Any) -> Row:
    usual = {"num_loops": 4, "tokens": 5, "most_tokens": 12, "planes": 6}
    usual |= changes
    return Row(request=number, sample=sample, prompt=usual["tokens"], **usual)


class Serving(RuleBasedStateMachine):
    """Requests come and go in any order; at the end everything is served and every page free."""

    @initialize(
        max_rows=st.integers(1, 6),
        pages=st.integers(20, 90),
        page_tokens=st.sampled_from([1, 2, 4]),
        prefill_budget=st.sampled_from([1, 8, 40]),
        boundary_share=st.sampled_from([0.0, 0.5, 1.0]),
    )
    def start(self, **limits: Any) -> None:
        self.mock = Mock(EngineLimits(**limits))
        self.number = 0

    @rule(
        num_loops=st.integers(1, 8),
        tokens=st.integers(1, 9),
        new=st.integers(1, 12),
        samples=st.sampled_from([1, 1, 1, 3]),
        kind=st.sampled_from(["any", "any", "one chunk", "no restart"]),
    )
    def add(self, num_loops: int, tokens: int, new: int, samples: int, kind: str) -> None:
        for sample in range(samples):
            row = new_row(
                self.number,
                sample,
                num_loops=num_loops,
                planes=num_loops + 2,
                tokens=tokens,
                most_tokens=tokens + new,
                group=(num_loops, kind),
                chunkable=kind == "any",
                restartable=kind == "any",
            )
            try:
                self.mock.scheduler.check(row)
            except ConfigError:
                return
            self.mock.scheduler.add(row)
        self.number += 1

    @precondition(lambda self: self.number)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        scheduler = self.mock.scheduler
        rows = [*scheduler.running, *scheduler.waiting]
        if rows:
            self.mock.end(data.draw(st.sampled_from(rows)))

    @rule(steps=st.integers(1, 9))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.mock.step()
            self.mock.check()

    @invariant()
    def in_order(self) -> None:
        if hasattr(self, "mock"):
            self.mock.check()

    def teardown(self) -> None:
        if not hasattr(self, "mock"):
            return
        for _ in range(20_000):
            if self.mock.idle():
                break
            self.step(1)
        assert self.mock.idle()
        assert self.mock.scheduler.ledger.free == self.mock.scheduler.ledger.pages


TestServing = Serving.TestCase
TestServing.settings = settings(max_examples=25, stateful_step_count=15)


def test_pages_are_taken_all_or_none() -> None:
    ledger = PageLedger(4)
    first = ledger.take(3)
    assert first is not None and ledger.take(2) is None and ledger.free == 1
    ledger.share(first[:2])
    ledger.give(first)
    assert ledger.free == 2
    ledger.give(first[:2])
    assert ledger.free == 4
    with pytest.raises(AssertionError, match="given back twice"):
        ledger.give(first)


def test_the_youngest_row_makes_room_and_comes_back_first() -> None:
    mock = Mock(EngineLimits(pages=15, page_tokens=4, prefill_budget=512))
    old, young, later = (
        new_row(number, planes=3, tokens=4, most_tokens=20 - number) for number in range(3)
    )
    for row in (old, young, later):
        mock.scheduler.check(row)
        mock.scheduler.add(row)
    while mock.scheduler.preemptions == 0:
        mock.step()
        mock.check()
    assert mock.scheduler.waiting == [young, later] and young.tokens > 4
    while not mock.idle():
        mock.step()
        mock.check()
    assert mock.ended == [old, young, later]


def test_a_large_request_is_passed_only_so_often() -> None:
    scheduler: Scheduler[Row] = Scheduler(EngineLimits(pages=12, page_tokens=4, max_rows=64))
    holder = new_row(0, planes=4, tokens=4, most_tokens=5, restartable=False)
    large = new_row(1, planes=3, tokens=13, most_tokens=14)
    small = [new_row(n, planes=1, tokens=1, most_tokens=2) for n in range(2, 20)]
    for row in (holder, large, *small):
        scheduler.add(row)
    admitted = []
    for _ in range(40):
        job = scheduler.next_prefill()
        if job is not None:
            scheduler.prefilled(job)
            for row in job.rows:
                if row is not holder:
                    scheduler.remove(row)
                admitted.append(row)
    assert admitted[0] is holder and large not in admitted
    assert len(admitted) == 1 + MOST_PASSED  # small ones no longer pass the large one
    scheduler.remove(holder)
    job = scheduler.next_prefill()
    assert job is not None and job.rows == [large]


def test_prompts_of_a_kind_are_read_together_but_not_before_older_ones() -> None:
    scheduler: Scheduler[Row] = Scheduler(EngineLimits(max_rows=4, prefill_budget=512))
    rows = [new_row(n, group=n % 2, num_loops=2 + n % 2) for n in range(10)]
    for row in rows:
        scheduler.add(row)
    read = []
    for _ in range(2):
        job = scheduler.next_prefill()
        assert job is not None and scheduler.prefilled(job)
        read.append(job.rows)
    assert read == [[rows[0], rows[2]], [rows[1], rows[3]]]
    assert scheduler.next_prefill() is None


@given(waiting=st.integers(1, 8), looping=st.integers(0, 8), waited=st.integers(0, 6))
def test_when_the_boundary_runs(waiting: int, looping: int, waited: int) -> None:
    scheduler: Scheduler[Row] = Scheduler(EngineLimits())
    rows = [new_row(n, phase="boundary", waited=waited) for n in range(waiting)]
    rows += [new_row(n, phase="loop") for n in range(waiting, waiting + looping)]
    scheduler.running = rows
    due = waiting > looping or waited >= 4  # more than half of them, or as long as their own loops
    assert scheduler.boundary() == (rows[:waiting] if due else [])
