"""Many sequences at a time: add requests, step, read events. Token ids only, no text."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from openmythos.inference.generation import DecodableModel, decode_one_token, prefill
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
    TokenLogprobs,
)
from openmythos.inference.sampling import sample
from openmythos.nn.cache import KVCache


@dataclass
class _Row:
    """A sequence, with a cache of its own."""

    request: int
    asked: EngineRequest
    sample: int
    generator: torch.Generator
    cache: KVCache | None = None
    token: int = -1
    new_tokens: int = 0
    token_loops: int = 0

    def finished(self, reason: FinishReason, message: str = "") -> Finished:
        return Finished(
            request=self.request,
            sample=self.sample,
            reason=reason,
            new_tokens=self.new_tokens,
            token_loops=self.token_loops,
            message=message,
        )


class Engine:
    """Continues many prompts at once; every one gets the tokens that it would get alone.

    `add` queues a request, `step` computes a little of all of them and returns what is new. An
    engine belongs to one thread.
    """

    def __init__(self, model: DecodableModel, limits: EngineLimits | None = None) -> None:
        self.model = model
        self.limits = EngineLimits() if limits is None else limits
        self._numbers = itertools.count()
        self._rows: list[_Row] = []
        self._events: list[Event] = []
        self._stats = EngineStats(pages_total=self.limits.pages)

    def check(self, request: EngineRequest) -> None:
        """Raise a ValueError for a request that this engine can never answer."""
        request.check(self.model.vocab_size, self.model.context)

    def add(self, request: EngineRequest) -> int:
        """Queue a request; returns its number. Raises a ValueError as `check` does."""
        self.check(request)
        number = next(self._numbers)
        for index in range(request.n):
            seed = (request.options.sampling.seed + index) % 2**63
            generator = torch.Generator("cpu").manual_seed(seed)
            self._rows.append(_Row(number, request, index, generator))
        return number

    def cancel(self, request: int, sample: int | None = None) -> None:
        """End a request, or one continuation of it; one that has ended already is ignored.

        The next step returns a `Finished` event with the reason "cancelled", and no token of it.
        """
        for row in list(self._rows):
            if row.request == request and sample in (None, row.sample):
                self._rows.remove(row)
                self._events.append(row.finished("cancelled"))

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing."""
        return not self._rows and not self._events

    def step(self) -> list[Event]:
        """Compute a little of every sequence in flight; returns the events, in order."""
        self._stats.steps += 1
        for row in self._rows[: self.limits.max_rows]:
            self._advance(row)
        events, self._events = self._events, []
        ended = {(e.request, e.sample) for e in events if isinstance(e, Finished)}
        self._rows = [row for row in self._rows if (row.request, row.sample) not in ended]
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
                phase="waiting" if row.cache is None else "boundary",
                loop=0,
                num_loops=row.asked.options.num_loops,
                prompt_tokens=len(row.asked.prompt),
                new_tokens=row.new_tokens,
            )
            for row in self._rows
        ]

    def stats(self) -> EngineStats:
        """A copy of the counters."""
        running = sum(row.cache is not None for row in self._rows)
        waiting = len(self._rows) - running
        return replace(self._stats, rows_running=running, rows_waiting=waiting)

    @torch.no_grad()
    def _advance(self, row: _Row) -> None:
        """One token of a row."""
        asked, o = row.asked, row.asked.options
        if row.cache is None:
            if asked.prompt_logprobs is not None and row.sample == 0:
                self._events.append(self._scored(row, asked.prompt_logprobs))
            if o.max_new_tokens == 0:
                self._events.append(row.finished("length"))
                return
            row.cache = self._new_cache(row)
            prompt = torch.tensor([asked.prompt], device=self.model.device)
            logits, loops = prefill(self.model, prompt, o, row.cache)
            row.token_loops += len(asked.prompt) * int(loops[0])
        else:
            token = torch.tensor([row.token], device=self.model.device)
            logits, loops = decode_one_token(self.model, token, o, row.cache)
            row.token_loops += int(loops[0])
        try:
            row.token = int(sample(logits, o.sampling, row.generator)[0])
        except ValueError as error:
            self._events.append(row.finished("error", str(error)))
            return
        row.new_tokens += 1
        about = None if asked.logprobs is None else logprobs(logits, [row.token], asked.logprobs)[0]
        self._events.append(
            NewToken(
                request=row.request,
                sample=row.sample,
                token=row.token,
                loops=int(loops[0]),
                logprobs=about,
            )
        )
        if row.token in o.stop_ids:
            self._events.append(row.finished("stop"))
        elif row.new_tokens == o.max_new_tokens:
            self._events.append(row.finished("length"))

    def _new_cache(self, row: _Row) -> KVCache:
        o = row.asked.options
        room = len(row.asked.prompt) + o.max_new_tokens
        return self.model.new_cache(
            1, room, num_loops=o.num_loops, prefill=o.prefill, decode=o.decode
        )

    def _scored(self, row: _Row, top: int) -> PromptScored:
        o, prompt = row.asked.options, row.asked.prompt
        cache, found, used = self._new_cache(row), [], []
        for place, token in enumerate(prompt):
            tokens = torch.tensor([token], device=self.model.device)
            logits, loops = decode_one_token(self.model, tokens, o, cache)
            used.append(int(loops[0]))
            found += logprobs(logits, prompt[place + 1 : place + 2], top)
        return PromptScored(request=row.request, logprobs=(None, *found), loops=tuple(used))


def logprobs(logits: Tensor, tokens: Iterable[int], top: int) -> list[TokenLogprobs]:
    """For each token its log-probability under its row of logits [rows, vocab], and `top` more."""
    rows = logits.double().log_softmax(dim=-1)
    found = []
    for row, token in zip(rows, tokens, strict=False):
        values, ids = row.topk(top)
        best = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        found.append(TokenLogprobs(float(row[token]), best))
    return found
