"""Keys and values in pages, for sequences that come and go.

All layers have the same kv_width, so one pool serves every layer and loop. A sequence has a table
[planes, blocks] of pages: a plane per prelude layer, coda layer, and recurrent layer and slot of
its cache policy; a block is `page_tokens` tokens. A sequence with fewer loops has fewer planes.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openmythos.nn.cache import CachePolicy
from openmythos.nn.layout import AttentionContext
from openmythos.nn.view import Project
from openmythos.types import KeyValues


class PagePool:
    """Storage for `pages` pages; one more, number 0, takes what nobody reads."""

    def __init__(self, pages: int, page_tokens: int, kv_width: int, like: Tensor) -> None:
        """`like` gives device and dtype."""
        self.page_tokens = page_tokens
        try:
            self.storage = like.new_zeros(pages + 1, page_tokens, kv_width)
        except (RuntimeError, MemoryError):
            size = pages * page_tokens * kv_width * like.itemsize / 2**30
            raise ValueError(f"pages = {pages}: no room for {size:.1f} GiB") from None
        self.columns = self.storage.view(-1, kv_width)  # of all pages

    def write(self, kv: Tensor, pages: Tensor, start: int) -> None:
        """Store kv [planes, tokens, kv_width] from position `start` on; pages [planes, blocks]."""
        at = torch.arange(start, start + kv.shape[1], device=kv.device)
        columns = pages[:, at // self.page_tokens] * self.page_tokens + at % self.page_tokens
        self.columns.index_copy_(0, columns.flatten(), kv.flatten(0, 1))

    def copy(
        self, source: Sequence[Sequence[int]], target: Sequence[Sequence[int]], tokens: int
    ) -> None:
        """Copy the blocks that hold the first `tokens` of a sequence and are not shared."""
        pairs = [
            pair
            for old, new in zip(source[: -(-tokens // self.page_tokens)], target, strict=False)
            if old != new
            for pair in zip(old, new, strict=True)
        ]
        if pairs:
            old, new = torch.tensor(pairs, device=self.storage.device).T
            self.storage.index_copy_(0, new, self.storage.index_select(0, old))

    def gather(self, pages: Tensor, total: int) -> KeyValues:
        """The first `total` columns of each row of pages [rows, blocks]."""
        rows = self.storage.index_select(0, pages.flatten())
        return rows.view(len(pages), -1, rows.shape[-1])[:, :total]


@dataclass(frozen=True)
class Paged:
    """A view (`nn.view.KVView`) on the pages of one layer, of rows with one new token each."""

    pool: PagePool
    pages: Tensor  # [rows, blocks]
    position: Tensor  # [rows] of the new token
    total: int  # columns to read
    writes: Tensor | None = None  # [rows]; None: all. A row that does not, puts it into page 0.

    @property
    def column(self) -> Tensor:
        """[rows] where the new tokens go, in `pool.columns`."""
        size = self.pool.page_tokens
        page = self.pages.gather(1, (self.position // size)[:, None])[:, 0]
        if self.writes is not None:
            page = page * self.writes
        return page * size + self.position % size

    def own(self) -> KeyValues:
        """Keys and values [rows, 1, kv_width] of the new tokens."""
        return self.pool.columns.index_select(0, self.column)[:, None]

    def update(self, project: Project) -> KeyValues:
        self.pool.columns.index_copy_(0, self.column, project()[:, 0])
        return self.pool.gather(self.pages, self.total)


class PageTables:
    """The page tables of the rows in flight, in one tensor."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self._tables = torch.zeros(rows, 1, 1, dtype=torch.long, device=device)
        self._free = list(range(rows - 1, -1, -1))

    @property
    def tensor(self) -> Tensor:
        """[rows, planes, blocks]; another one once there are more of them."""
        return self._tables

    def open(self) -> int:
        """A table for a new row."""
        return self._free.pop()

    def close(self, table: int) -> None:
        self._free.append(table)

    def set(self, table: int, block: int, pages: tuple[int, ...]) -> None:
        """The pages of a block of a row, one per plane."""
        rows, planes, blocks = self._tables.shape
        if len(pages) > planes or block >= blocks:
            grown = self._tables.new_zeros(
                rows, max(planes, len(pages)), max(blocks, 2 * block if block >= blocks else 0, 1)
            )
            grown[:, :planes, :blocks] = self._tables
            self._tables = grown
        self._tables[table, : len(pages), block] = torch.tensor(pages, device=self._tables.device)

    def rows(self, tables: Tensor, blocks: int) -> Tensor:
        """[rows, planes, blocks], the first `blocks` of each of these tables."""
        return self._tables[:, :, :blocks].index_select(0, tables)


@dataclass(frozen=True)
class PlaneMap:
    """Which planes of a sequence hold what, in the order of `KVCache.planes`."""

    layers: tuple[int, int, int]  # of prelude, recurrent block and coda
    num_loops: int
    policy: CachePolicy
    probed: bool  # an exit rule runs the coda after every loop

    @property
    def total(self) -> int:
        return self.recurrent[-1] + self.layers[1]

    @property
    def coda(self) -> int:
        """The first plane of the coda; that of the prelude is 0."""
        return self.layers[0]

    def probe(self, loop: int) -> int:
        """The first plane of the coda after a loop."""
        return self.layers[0] + self.layers[2] * (1 + loop)

    @functools.cached_property
    def recurrent(self) -> tuple[int, ...]:
        """For each loop the first plane that it reads and writes."""
        start = self.probe(self.num_loops if self.probed else 0)
        return tuple(
            start + self.layers[1] * self.policy.slot(loop) for loop in range(self.num_loops)
        )

    @functools.cached_property
    def writes(self) -> tuple[bool, ...]:
        """For each loop whether it writes, and does not read what another loop has written."""
        slots = [-1, *(self.policy.slot(loop) for loop in range(self.num_loops))]
        return tuple(self.policy.overwrites or a != b for a, b in itertools.pairwise(slots))

    def unrun(self, loops_run: int) -> list[tuple[int, int]]:
        """(from, to): planes to copy at a position whose loops ended early."""
        pairs = []
        source = self.recurrent[loops_run - 1]
        for start in range(source + self.layers[1], self.total, self.layers[1]):
            pairs += [(source + layer, start + layer) for layer in range(self.layers[1])]
        return pairs

    def unprobed(self, loops_run: int) -> list[tuple[int, int]]:
        """The same for the planes of the coda after the loops that were not run."""
        if not self.probed:
            return []
        source, width = self.probe(loops_run - 1), self.layers[2]
        starts = [self.probe(loop) for loop in range(loops_run, self.num_loops)]
        return [(source + layer, start + layer) for start in starts for layer in range(width)]


class Batch:
    """One new token for each of some rows: its id and position, and where its row has its pages.

    What a layer without a native form needs of them as tensors is made when it is asked for.
    """

    def __init__(
        self,
        pool: PagePool,
        tables: PageTables,
        rows: list[int],
        positions: list[int],
        ids: list[int],
    ) -> None:
        """`rows`: the page table of each row; a row may occur at several positions."""
        self.pool, self.tables = pool, tables
        self.rows, self.positions, self.ids = rows, positions, ids
        self.context: AttentionContext | None = None  # kept by who makes it

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, places: Sequence[int]) -> "Batch":
        """Of these rows of the batch."""
        chosen = (
            [numbers[place] for place in places]
            for numbers in (self.rows, self.positions, self.ids)
        )
        return Batch(self.pool, self.tables, *chosen)

    def planes(self, start: Sequence[int], writes: Sequence[bool] | None = None) -> "Planes":
        """Those of a stage, each row's from `start` on; rows that do not write read only."""
        return Planes(self, start, None if writes is None or all(writes) else writes)

    @functools.cached_property
    def position(self) -> Tensor:
        """[rows]"""
        return torch.tensor(self.positions, device=self.pool.storage.device)

    @functools.cached_property
    def pages(self) -> Tensor:
        """[rows, planes, blocks]"""
        blocks = -(-(max(self.positions) + 1) // self.pool.page_tokens)
        return self.tables.rows(torch.tensor(self.rows, device=self.position.device), blocks)

    def duplicate(self, row: int, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy the keys and values of a row's own position from planes to planes."""
        if not pairs:
            return
        size, at = self.pool.page_tokens, self.position[row]
        pages = self.pages[row, torch.tensor(pairs, device=at.device), at // size]
        source, target = (pages * size + at % size).T
        self.pool.columns.index_copy_(0, target, self.pool.columns.index_select(0, source))


@dataclass(slots=True)
class Planes:
    """The planes of a stage's layers, one per layer, that each row of a batch reads and writes."""

    batch: Batch
    start: Sequence[int]  # the first one of each row
    writes: Sequence[bool] | None  # None: all rows write

    def views(self, layers: int) -> list[Paged]:
        """A view per layer."""
        batch, start, mask = self.batch, self.start, None
        device = batch.pages.device
        if min(start) == max(start):
            pages = batch.pages[:, start[0] : start[0] + layers].unbind(1)
        else:
            planes = torch.tensor([[x + layer for x in start] for layer in range(layers)])
            rows = torch.arange(len(start), device=device)
            pages = batch.pages[rows, planes.to(device)].unbind()
        if self.writes is not None:
            mask = torch.tensor(self.writes, device=device)
        total = max(batch.positions) + 1
        return [Paged(batch.pool, each, batch.position, total, mask) for each in pages]
