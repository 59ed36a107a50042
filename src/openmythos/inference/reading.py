"""Reads prompts, in one of two ways.

As a prompt: into a cache of its own, as `generation.stream` does, which is then copied to pages.
As rows of one token each, straight into pages, where the model computes those fast (`most_rows`):
all tokens run their loops at once, each loop on the keys that it has just made of earlier tokens,
and prompts of several requests need no padding. That is exact for the cache policies exact and
first without exit rules, as chunks of any size are.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from openmythos.inference.runner import Continuation, Runner
from openmythos.inference.sampling import logprobs
from openmythos.inference.scheduler import Prefill
from openmythos.nn.cache import KVCache
from openmythos.recurrence.exit_rules import FixedExit
from openmythos.types import NextLogits

# More tokens at once, or more keys, are faster as a prompt, which reads keys once for all tokens.
MOST_TOKENS, MOST_KEYS = 128, 1024


class _Token(NamedTuple):
    """A token of a prompt: its row among the job's, and its position."""

    row: int
    position: int


class Reader:
    """The prompts that are being read."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._rows: list[Continuation] = []
        self._cache: KVCache | None = None  # None: they are read as rows

    def prefill(self, job: Prefill[Continuation]) -> tuple[NextLogits, list[int]]:
        """Read tokens of prompts: (logits after the last ones, loops of the last ones)."""
        if job.start == 0:
            self._begin(job)
        return self._as_rows(job) if self._cache is None else self._as_prompts(job, self._cache)

    def settle(self, forks: Sequence[list[Continuation]]) -> bool:
        """The rows have been read: all have their pages; `forks` share the full ones of each."""
        if self._cache is not None:
            self._copy(self._cache, forks)
        else:
            for row, others in zip(self._rows, forks, strict=True):
                for each in others:
                    self._open(each)
                    self._runner.pool.copy(row.blocks, each.blocks, row.cached)
        self._cache, self._rows = None, []
        return True

    def forget(self, row: Continuation) -> None:
        """The row has ended, or waits again."""
        if row in self._rows:
            self._cache, self._rows = None, []

    def _begin(self, job: Prefill[Continuation]) -> None:
        o, self._rows = job.rows[0].asked.options, list(job.rows)
        for row in job.rows:
            row.scores, row.prompt_loops = [], []
        if self._reads_as_rows(job):
            self._cache = None
            for row in job.rows:
                self._open(row)
        else:
            longest = max(row.tokens for row in job.rows)
            self._cache = self._runner.model.new_cache(
                len(job.rows), longest, num_loops=o.num_loops, prefill=o.prefill, decode=o.decode
            )

    def _open(self, row: Continuation) -> None:
        row.table, row.exit_loop = self._runner.tables.open(), row.num_loops

    # As rows

    def _reads_as_rows(self, job: Prefill[Continuation]) -> bool:
        stages, rows = self._runner.stages, job.rows
        if stages.halts or not stages.most_rows or any(row.scored for row in rows):
            return False
        tokens = sum(min(job.stop, row.tokens) for row in rows)
        short = tokens <= MOST_TOKENS and max(row.tokens for row in rows) <= MOST_KEYS
        return short and all(
            row.restartable and isinstance(row.asked.options.exit_rule, FixedExit) for row in rows
        )

    def _as_rows(self, job: Prefill[Continuation]) -> tuple[NextLogits, list[int]]:
        loops = job.rows[0].num_loops
        todo = [
            _Token(index, position)
            for index, row in enumerate(job.rows)
            for position in range(job.start, min(job.stop, row.tokens))
        ]
        most, found = max(1, self._runner.stages.most_rows), []
        for start in range(0, len(todo), most):
            found.append(self._read(job.rows, todo[start : start + most]))
        for token in todo:
            job.rows[token.row].token_loops += loops
        return torch.cat(found), [loops] * len(job.rows)

    def _read(self, rows: Sequence[Continuation], tokens: Sequence[_Token]) -> NextLogits:
        """Logits after those of the tokens that are the last of their row."""
        runner, owners = self._runner, [rows[token.row] for token in tokens]
        stages, positions = runner.stages, [token.position for token in tokens]
        ids = [row.ids[position] for row, position in zip(owners, positions, strict=True)]
        batch = runner.batch_of(owners, positions, ids)
        plane_map, count = owners[0].plane_map, len(tokens)
        state, inputs = stages.encode(batch.planes([0] * count))
        for loop in range(plane_map.num_loops):
            start, writes = [plane_map.recurrent[loop]] * count, [plane_map.writes[loop]] * count
            state = stages.loop(state, inputs, [loop] * count, batch.planes(start, writes))
        planes = batch.planes([plane_map.coda] * count)
        pairs = enumerate(zip(owners, positions, strict=True))
        last = [index for index, (row, position) in pairs if position + 1 == row.tokens]
        return stages.read_out(stages.output(state), planes, last)

    # As prompts

    def _as_prompts(
        self, job: Prefill[Continuation], cache: KVCache
    ) -> tuple[NextLogits, list[int]]:
        rows, o, device = job.rows, job.rows[0].asked.options, self._runner.device
        ids = [row.ids[job.start : job.stop] for row in rows]
        longest = max(map(len, ids))
        padding = [longest - len(own) for own in ids]
        tokens = torch.tensor([[0] * n + own for n, own in zip(padding, ids, strict=True)])
        mask = None
        if any(padding):
            mask = torch.arange(longest) >= torch.tensor(padding)[:, None]
            mask = mask.to(device)
        logits, used = self._runner.stages.prefill(
            tokens.to(device),
            num_loops=o.num_loops,
            exit_rule=o.exit_rule,
            attention_mask=mask,
            cache=cache,
            every=any(row.scored for row in rows),
        )
        loops = used.tolist()
        for row, own, left, row_logits in zip(rows, loops, padding, logits, strict=True):
            row.token_loops += sum(own[left:])
            if row.scored:
                row.prompt_loops += own[left:]
                following = row.ids[job.start + 1 : job.stop + 1]
                scored = row_logits[left : left + len(following)]
                row.scores += logprobs(scored, following, row.asked.prompt_logprobs or 0)
        return logits[:, -1], [own[-1] for own in loops]

    def _copy(self, cache: KVCache, forks: Sequence[list[Continuation]]) -> None:
        pool = self._runner.pool
        cache.begin_decode()
        planes, exit_loops = cache.planes(), cache.exit_loop.tolist()
        for index, (row, others) in enumerate(zip(self._rows, forks, strict=True)):
            kv = planes[:, index, planes.shape[2] - row.cached :]
            full = row.cached - row.cached % pool.page_tokens
            for each in (row, *others):
                self._open(each)
                each.exit_loop = exit_loops[index]
                start = 0 if each is row else full
                pages = torch.tensor(each.blocks, device=self._runner.device).T
                pool.write(kv[:, start:], pages, start)
