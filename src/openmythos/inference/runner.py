"""Carries out what the scheduler decides: loops and boundaries of rows, with a model.

The rows that loop are one batch, whatever tokens and loops they are at. `reading` reads prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from openmythos.inference.exits import RowExit, leaving
from openmythos.inference.request import EngineLimits, EngineRequest
from openmythos.inference.sampling import TokenLogprobs
from openmythos.inference.scheduler import Row
from openmythos.nn.cache import CachePolicy, KVCache
from openmythos.nn.pages import Batch, PagePool, PageTables, PlaneMap, Planes
from openmythos.recurrence.exit_rules import ExitRule, FixedExit
from openmythos.recurrence.state import LoopInputs, LoopState
from openmythos.types import Hidden, LoopsPerToken, NextLogits, TokenIds


@runtime_checkable
class StagedModel(Protocol):
    """The stages of a model, for rows at any tokens and in any loops; inference only.

    `planes` say where the keys and values of each layer of a stage are.
    """

    layers: tuple[int, int, int]  # of prelude, recurrent block and coda
    kv_width: int
    halts: bool  # whether the model itself may end the loops

    @property
    def most_rows(self) -> int:
        """Up to how many rows of one token are computed fast; 0: a prompt is faster as one."""

    @property
    def like(self) -> Tensor:
        """An empty tensor with the device and dtype of keys and values."""

    def prefill(
        self,
        tokens: TokenIds,
        *,
        num_loops: int,
        exit_rule: ExitRule,
        attention_mask: Tensor | None,
        cache: KVCache,
        every: bool,
    ) -> tuple[Tensor, LoopsPerToken]:
        """(logits of the last position or of `every` one, loops of all positions)."""

    def encode(self, planes: Planes) -> tuple[LoopState, LoopInputs]:
        """The state of a batch's tokens before the first loop."""

    def loop(
        self, state: LoopState, inputs: LoopInputs, loops: Sequence[int], planes: Planes
    ) -> LoopState:
        """One loop of all rows, each in its own, counted from 0."""

    def output(self, state: LoopState) -> Hidden:
        """The coda's input if the loops end here."""

    def read_out(
        self, output: Hidden, planes: Planes, only: Sequence[int] | None = None
    ) -> NextLogits:
        """Logits [rows, vocab] of the coda's input [rows, 1, dim]; of some rows `only`."""


class EngineModel(Protocol):
    """What an engine needs of a model."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def context(self) -> int:
        """The longest sequence, in tokens."""

    def stages(self) -> StagedModel: ...

    def new_cache(
        self,
        batch: int,
        capacity: int,
        *,
        num_loops: int,
        prefill: CachePolicy,
        decode: CachePolicy,
    ) -> KVCache:
        """An empty cache that prompts are read into."""


@dataclass(eq=False, kw_only=True)
class Continuation(Row):
    """A row with its token ids and what has been computed of it."""

    asked: EngineRequest
    ids: list[int]
    generator: torch.Generator
    plane_map: PlaneMap
    exit: RowExit | None
    table: int = -1
    blocks_set: int = 0
    exit_loop: int = 0  # most loops of any of its positions
    output: Tensor | None = None  # [1, 1, dim] the coda's input, while it waits at the boundary
    new_tokens: int = 0
    token_loops: int = 0
    scores: list[TokenLogprobs] = field(default_factory=list)
    prompt_loops: list[int] = field(default_factory=list)

    @property
    def scored(self) -> bool:
        """Whether log-probabilities of the prompt are still wanted."""
        return self.asked.prompt_logprobs is not None and self.sample == 0 and not self.new_tokens


class Runner:
    """The tensors of the rows in flight."""

    def __init__(self, model: EngineModel, limits: EngineLimits) -> None:
        self.model, self.stages = model, model.stages()
        like = self.stages.like
        self.device = like.device
        self.pool = PagePool(limits.pages, limits.page_tokens, self.stages.kv_width, like)
        self.tables = PageTables(limits.max_rows, self.device)
        self.rows: list[Continuation] = []  # those that loop
        self._state: LoopState | None = None
        self._inputs: LoopInputs | None = None
        self._batch: Batch | None = None
        self._left: tuple[list[Continuation], Batch] | None = None

    def plane_map(self, asked: EngineRequest) -> PlaneMap:
        o = asked.options
        probed = o.exit_rule.needs_logits and self.stages.layers[2] > 0
        return PlaneMap(self.stages.layers, o.num_loops, o.decode, probed)

    # Boundary

    def read_out(self, rows: Sequence[Continuation]) -> NextLogits:
        """Logits [rows, vocab] of rows whose loops are done."""
        outputs = torch.cat([row.output for row in rows if row.output is not None])
        for row in rows:
            row.output = None
        return self._read_out(outputs, rows, [row.plane_map.coda for row in rows])

    def _read_out(
        self, output: Hidden, rows: Sequence[Continuation], start: list[int]
    ) -> NextLogits:
        left = self._left is not None and self._left[0] == list(rows)
        batch = self._left[1] if self._left is not None and left else self._next(rows)
        return self.stages.read_out(output, batch.planes(start))

    def encode(self, rows: Sequence[Continuation]) -> None:
        """Start the next token of each row: it joins those that loop."""
        self._left = None
        for row in rows:
            if row.exit is not None:
                row.exit.restart()
        before, self.rows, batch = self._inputs, [*self.rows, *rows], self._next(rows)
        state, inputs = self.stages.encode(batch.planes([0] * len(rows)))
        if before is not None:
            assert self._state is not None
            state = self._state.map(lambda *x: torch.cat(x), state)
            term = torch.cat((before.drive.input_term, inputs.drive.input_term))
            inputs = replace(inputs, drive=before.drive._replace(input_term=term))
            batch = self._next(self.rows)
        self._state, self._inputs, self._batch = state, inputs, batch

    # Loops

    def loop(self) -> list[Continuation]:
        """One loop of every looping row; returns those that are done, ready for the boundary."""
        before, rows, batch = self._state, self.rows, self._batch
        assert before is not None and self._inputs is not None and batch is not None
        planes = batch.planes(
            [row.plane_map.recurrent[row.loop] for row in rows],
            [row.plane_map.writes[row.loop] for row in rows],
        )
        # Every row in the batch loops on: a layer need not look at what the loop before stored.
        loops = [row.loop for row in rows]
        state = self.stages.loop(before, self._inputs, loops, planes)._replace(kv=())
        done = [row.loop + 1 == row.num_loops for row in rows]
        if state.active is not None:
            halted = (~state.active[:, 0]).tolist()
            done = [a or b for a, b in zip(done, halted, strict=True)]
        judged = any(row.exit is not None for row in rows)
        if not judged and not any(done):
            self._state = state
            return []
        output = self.stages.output(state)
        if judged:
            exits = self._judged(before.hidden, state.hidden, output)
            done = [a or b for a, b in zip(done, exits, strict=True)]
        self._state = state
        return self._leave(done, output, batch)

    def _judged(self, previous: Tensor, state: Tensor, output: Tensor) -> list[bool]:
        """Which rows leave by their exit rule; rows of the same rule are judged together."""
        groups: dict[Any, list[int]] = {}
        for index, row in enumerate(self.rows):
            if row.exit is not None:
                groups.setdefault(row.exit.rule, []).append(index)
        found = [False] * len(self.rows)
        for rule, places in groups.items():
            rows = [self.rows[index] for index in places]
            at, logits = torch.tensor(places, device=self.device), None
            if rule.needs_logits:
                start = [row.plane_map.probe(row.loop) for row in rows]
                if not self.stages.layers[2]:
                    start = [0] * len(rows)
                logits = self._read_out(output[at], rows, start)[:, None]
            ends = leaving(
                [row.exit for row in rows if row.exit is not None],
                [row.loop + 1 for row in rows],
                [row.exit_loop for row in rows],
                previous[at],
                state[at],
                logits,
            )
            for index, end in zip(places, ends, strict=True):
                found[index] = end
        return found

    def _leave(self, done: list[bool], output: Hidden, batch: Batch) -> list[Continuation]:
        """Take the rows that are done out of the batch."""
        left = [index for index, gone in enumerate(done) if gone]
        rows, outputs = [self.rows[index] for index in left], torch.split(output, 1)
        for index, row in zip(left, rows, strict=True):
            used = row.loop + 1
            row.output = outputs[index]
            row.token_loops += used
            row.exit_loop = max(row.exit_loop, used)
            batch.duplicate(index, row.plane_map.unrun(used))
            if row.plane_map.probed:
                self._probe_unrun(row, row.output, used)
                probed = max(used, row.exit_loop if self.stages.layers[2] > 1 else 0)
                batch.duplicate(index, row.plane_map.unprobed(probed))
        self._keep([index for index, gone in enumerate(done) if not gone])
        return rows

    def _probe_unrun(self, row: Continuation, output: Hidden, used: int) -> None:
        """A second coda layer's keys also depend on earlier tokens, which may have run longer."""
        if self.stages.layers[2] > 1:
            for loop in range(used, row.exit_loop):
                self._read_out(output, [row], [row.plane_map.probe(loop)])

    def drop(self, row: Continuation) -> None:
        """Forget a row that has ended or waits again."""
        if row in self.rows:
            self._keep([index for index, each in enumerate(self.rows) if each is not row])
        if row.table >= 0:
            self.tables.close(row.table)
        row.table, row.blocks_set, row.output = -1, 0, None

    def _keep(self, places: list[int]) -> None:
        """Only these rows go on looping."""
        if len(places) == len(self.rows):
            return
        state, inputs, batch = self._state, self._inputs, self._batch
        assert state is not None and inputs is not None and batch is not None
        if not places:  # the boundary reads them out where they are
            self._left = (self.rows, batch)
            self.rows, self._state, self._inputs, self._batch = [], None, None, None
            return
        self.rows = [self.rows[index] for index in places]
        at = torch.tensor(places, device=self.device)
        self._state = state.map(lambda x: x.index_select(0, at))
        term = inputs.drive.input_term.index_select(0, at)
        self._inputs = replace(inputs, drive=inputs.drive._replace(input_term=term))
        self._batch = batch.select(places)

    def _next(self, rows: Sequence[Continuation]) -> Batch:
        """The token of each row that is computed now."""
        positions = [row.cached for row in rows]
        ids = [row.ids[at] for row, at in zip(rows, positions, strict=True)]
        return self.batch_of(rows, positions, ids)

    def batch_of(self, rows: Sequence[Continuation], positions: list[int], ids: list[int]) -> Batch:
        """Tokens of rows at these positions; a row may occur at several."""
        for row in rows:
            for block in range(row.blocks_set, len(row.blocks)):
                self.tables.set(row.table, block, row.blocks[block])
            row.blocks_set = len(row.blocks)
        return Batch(self.pool, self.tables, [row.table for row in rows], positions, ids)


def row_exit(rule: ExitRule) -> RowExit | None:
    """The state of an exit rule for one row; None if the rule never ends the loops."""
    return None if isinstance(rule, FixedExit) else RowExit(rule)
