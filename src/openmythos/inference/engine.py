"""Many sequences at a time: add requests, step, read events. Token ids only, no text.

    step:   prefill   one chunk of one prompt, or several short ones
            boundary  coda, head and sampling of rows whose loops are done; their next tokens start
            loop      every row in its loops runs one more, each its own

(loop-level continuous batching: rows at different tokens and in different loops share a batch,
since every loop has the same weights). `scheduler` decides, `runner` computes.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from openmythos.config import require
from openmythos.inference.reading import Reader
from openmythos.inference.request import (
    EngineLimits,
    EngineRequest,
    EngineStats,
    Event,
    Finished,
    FinishReason,
    NewToken,
    PromptScored,
    RowInfo,
)
from openmythos.inference.runner import Continuation, EngineModel, Runner, row_exit
from openmythos.inference.sampling import logprobs, sample_rows
from openmythos.inference.scheduler import Scheduler
from openmythos.inference.speculate import draft_and_verify
from openmythos.nn.few_rows import unchanged
from openmythos.types import NextLogits

T = TypeVar("T")


class Engine:
    """Continues many prompts at once; each gets the tokens that `generation.stream` gives it alone.

    `add` queues a request, `step` computes a little of all of them and returns what is new. An
    engine belongs to one thread.
    """

    def __init__(self, model: EngineModel, limits: EngineLimits | None = None) -> None:
        self.model = model
        self.limits = EngineLimits() if limits is None else limits
        self._runner = Runner(model, self.limits)
        self._reader = Reader(self._runner)
        self._scheduler: Scheduler[Continuation] = Scheduler(self.limits)
        self._numbers = itertools.count()
        self._events: list[Event] = []
        self._stats = EngineStats(pages_total=self.limits.pages)

    def check(self, request: EngineRequest) -> None:
        """Raise a ValueError for a request that this engine can never answer."""
        request.check(self.model.vocab_size, self.model.context)
        self._scheduler.check(self._row(request, 0, 0))
        allowed = request.draft is None or not self._runner.stages.halts
        require(allowed, "draft", request.draft, "needs a model that does not end the loops itself")

    def add(self, request: EngineRequest) -> int:
        """Queue a request; returns its number. Raises a ValueError as `check` does."""
        self.check(request)
        number = next(self._numbers)
        for sample in range(request.n):
            self._scheduler.add(self._row(request, number, sample))
        return number

    def _row(self, asked: EngineRequest, number: int, sample: int) -> Continuation:
        o, plane_map = asked.options, self._runner.plane_map(asked)
        seed = (o.sampling.seed + sample) % 2**63
        return Continuation(
            request=number,
            sample=sample,
            num_loops=o.num_loops,
            planes=plane_map.total,
            prompt=len(asked.prompt),
            tokens=len(asked.prompt),
            most_tokens=len(asked.prompt) + o.max_new_tokens,
            group=(o.num_loops, o.exit_rule, o.prefill, o.decode),
            chunkable=asked.chunkable,
            restartable=asked.restartable,
            asked=asked,
            ids=list(asked.prompt),
            generator=torch.Generator("cpu").manual_seed(seed),
            plane_map=plane_map,
            exit=row_exit(o.exit_rule),
        )

    def cancel(self, request: int, sample: int | None = None) -> None:
        """End a request, or one continuation of it; one that has ended already is ignored.

        The next step returns a `Finished` event with the reason "cancelled", and no token of it.
        """
        for row in [*self._scheduler.running, *self._scheduler.waiting]:
            if row.request == request and sample in (None, row.sample):
                self._finish(row, "cancelled")

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing."""
        return not (self._events or self._scheduler.running or self._scheduler.waiting)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Compute a little of every sequence in flight; returns the events, in order."""
        self._stats.steps += 1
        with unchanged():
            self._prefill()
            self._boundary()
            self._loop()
        events, self._events = self._events, []
        return events

    def run(self, requests: Iterable[EngineRequest]) -> list[Event]:
        """Add the requests and step until the engine is idle; returns all events."""
        for request in requests:
            self.add(request)
        events: list[Event] = []
        while not self.idle:
            events += self.step()
        return events

    def rows(self) -> list[RowInfo]:
        """The sequences in the engine, those in flight first."""
        return [
            RowInfo(
                request=row.request,
                sample=row.sample,
                phase=row.phase,
                loop=row.loop if row.phase in ("loop", "boundary") else 0,
                num_loops=row.num_loops,
                prompt_tokens=len(row.asked.prompt),
                new_tokens=row.new_tokens,
            )
            for row in (*self._scheduler.running, *self._scheduler.waiting)
        ]

    def stats(self) -> EngineStats:
        """A copy of the counters."""
        scheduler = self._scheduler
        return replace(
            self._stats,
            rows_waiting=len(scheduler.waiting),
            rows_running=len(scheduler.running),
            pages_used=scheduler.ledger.pages - scheduler.ledger.free,
            preemptions=scheduler.preemptions,
        )

    # The parts of a step

    def _prefill(self) -> None:
        job = self._scheduler.next_prefill()
        if job is None:
            return
        read = self._guarded(job.rows, lambda: self._reader.prefill(job))
        if read is None or not self._scheduler.prefilled(job):
            return
        forks = [self._scheduler.fork(row) for row in job.rows]
        families = [[row, *others] for row, others in zip(job.rows, forks, strict=True)]
        everyone = [row for family in families for row in family]
        if self._guarded(everyone, lambda: self._reader.settle(forks)) is None:
            return
        logits, loops = read
        for row in job.rows:
            self._stats.prompt_tokens += row.tokens
            if row.scored:
                scores, used = (None, *row.scores), tuple(row.prompt_loops)
                scored = PromptScored(request=row.request, logprobs=scores, loops=used)
                self._events.append(scored)
        index = [place for place, family in enumerate(families) for _ in family]
        self._emit(everyone, logits[index], [loops[place] for place in index])

    def _boundary(self) -> None:
        rows = self._scheduler.boundary()
        if not rows:
            return
        self._stats.boundaries += 1
        self._stats.boundary_rows += len(rows)
        done = [row for row in rows if row.output is not None]
        if done:
            logits = self._guarded(done, lambda: self._runner.read_out(done))
            if logits is not None:
                self._scheduler.read_out(done)
                self._emit(done, logits, [row.loop for row in done])
        going_on = [row for row in rows if row.phase == "boundary"]
        ready, preempted = self._scheduler.grow(going_on)
        for row in preempted:
            self._drop(row)
        if len(self._scheduler.running) <= self.limits.draft_rows:
            ready = self._drafted(ready)
        if ready:
            self._guarded(ready, lambda: self._runner.encode(ready))

    def _drafted(self, rows: Sequence[Continuation]) -> list[Continuation]:
        """Draft and verify tokens of rows that ask for it; returns the other ones."""
        groups: dict[Any, list[Continuation]] = {}
        others = []
        for row in rows:
            draft = row.asked.draft
            tokens = 0 if draft is None else self._scheduler.ahead(row, draft.tokens)
            if draft is None or not tokens:
                others.append(row)
            else:
                groups.setdefault((draft.loops, row.num_loops, tokens), []).append(row)
        for (_, _, tokens), group in groups.items():
            self._draft(group, tokens)
        return others

    def _draft(self, rows: Sequence[Continuation], tokens: int) -> None:
        """Draft and verify `tokens` tokens of each row; they stay at the boundary."""
        found = self._guarded(rows, lambda: draft_and_verify(self._runner, rows, tokens))
        if found is None:
            return
        self._stats.drafted += tokens * len(rows)
        logits, drafts = found
        for index, row in enumerate(rows):
            row.phase, row.waited, row.exit_loop = "boundary", 0, row.num_loops
            for place in range(tokens + 1):
                row.token_loops += row.num_loops
                self._scheduler.read_out([row])
                self._emit([row], logits[place, index : index + 1], [row.num_loops])
                agrees = place < tokens and row.ids[-1] == drafts[index][place]
                if not agrees or row not in self._scheduler.running:
                    break
                self._stats.accepted += 1

    def _loop(self) -> None:
        rows = self._runner.rows
        if not rows:
            return
        self._stats.loop_steps += 1
        self._stats.loop_rows += len(rows)
        done = self._guarded(rows, self._runner.loop)
        self._scheduler.looped(done or [])

    def _emit(self, rows: Sequence[Continuation], logits: NextLogits, loops: Sequence[int]) -> None:
        """Draw the next token of each row from its logits [rows, vocab]."""
        drawn = sample_rows(logits, [(row.asked.options.sampling, row.generator) for row in rows])
        for index, (row, token) in enumerate(zip(rows, drawn, strict=True)):
            asked, o = row.asked, row.asked.options
            if o.max_new_tokens == 0:
                self._finish(row, "length")
                continue
            if token is None:
                self._finish(row, "error", "logits: are not finite; the weights are damaged")
                continue
            row.ids.append(token)
            row.tokens += 1
            row.new_tokens += 1
            self._stats.new_tokens += 1
            about = None
            if asked.logprobs is not None:
                about = logprobs(logits[index : index + 1], [token], asked.logprobs)[0]
            self._events.append(
                NewToken(
                    request=row.request,
                    sample=row.sample,
                    token=token,
                    loops=loops[index],
                    logprobs=about,
                )
            )
            if token in o.stop_ids:
                self._finish(row, "stop")
            elif row.new_tokens == o.max_new_tokens:
                self._finish(row, "length")

    def _finish(self, row: Continuation, reason: FinishReason, message: str = "") -> None:
        self._scheduler.remove(row)
        self._drop(row)
        row.phase = "ended"
        self._stats.token_loops += row.token_loops
        self._events.append(
            Finished(
                request=row.request,
                sample=row.sample,
                reason=reason,
                new_tokens=row.new_tokens,
                token_loops=row.token_loops,
                message=message,
            )
        )

    def _drop(self, row: Continuation) -> None:
        """Forget what has been computed of a row that has ended or waits again."""
        self._reader.forget(row)
        self._runner.drop(row)

    def _guarded(self, rows: Sequence[Continuation], compute: Callable[[], T]) -> T | None:
        """The result; None after an error, which ends these rows and leaves the others."""
        try:
            return compute()
        except Exception as error:  # whatever it is, other rows must not suffer from it
            for row in list(rows):
                self._finish(row, "error", f"{type(error).__name__}: {error}")
            return None
