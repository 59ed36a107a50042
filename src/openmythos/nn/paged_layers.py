"""Native layers on pages (`nn.pages`), as calls whose arguments are arranged once.

A call then only sets the numbers of its rows: positions, lines of the page tables, loops.
"""

import ctypes
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from openmythos.kernels.few_rows import Places
from openmythos.kernels.few_rows_native import MOST_ROWS, PreparedLayer
from openmythos.nn.few_rows import DecodedLayer
from openmythos.nn.linear import NO_DELTAS, Deltas, LowRank, addresses
from openmythos.nn.pages import Batch, PagePool, PageTables, Planes
from openmythos.types import Hidden


class _Numbers:
    """A tensor of whole numbers, one per row, whose first ones are set from a list."""

    def __init__(self) -> None:
        self.tensor = torch.zeros(MOST_ROWS, dtype=torch.long)
        self._array = (ctypes.c_int64 * MOST_ROWS).from_address(self.tensor.data_ptr())

    def set(self, numbers: Sequence[int]) -> None:
        self._array[: len(numbers)] = [*numbers]


class PagedLayers:
    """The layers of a model on a pool; valid while layers, pool and tables are as they were.

    `parts` has the layers of each part. `rotary`: cos and sin [positions, 2 * rotary_dim] of as
    many positions as there may be, None without; `window`: keys that a query sees, 0: all.
    The recurrent layers have `deltas`, of which each call says that of each row.
    """

    def __init__(
        self,
        parts: Mapping[str, Sequence[DecodedLayer]],
        pool: PagePool,
        tables: PageTables,
        *,
        width: int,
        dtype: torch.dtype,
        rotary: Tensor | None,
        window: int,
        deltas: Deltas = NO_DELTAS,
    ) -> None:
        self._dtype = dtype
        self._parts, self._pool, self._tables = parts, pool, tables.tensor
        self._rotary, self._window = rotary, window
        self._position, self._line, self._first = _Numbers(), _Numbers(), _Numbers()
        self._change, self._loop = _Numbers(), _Numbers()
        self._writes = torch.ones(MOST_ROWS, dtype=torch.bool)
        self._all_write = True
        self._angles = None if rotary is None else rotary.new_zeros(MOST_ROWS, rotary.shape[1])
        self._batch: Batch | None = None  # whose positions are set
        self._between = torch.empty(MOST_ROWS, 1, width, dtype=dtype)
        self._memory = addresses(deltas)
        own = {key: LowRank(x.down, x.up, self._change.tensor) for key, x in deltas.items()}
        self._calls = {
            name: self._arranged(layers, own, self._loop.tensor)
            if name == "recurrent"
            else self._arranged(layers, NO_DELTAS, 0)
            for name, layers in parts.items()
        }

    def _arranged(
        self, layers: Sequence[DecodedLayer], deltas: Deltas, loop: Tensor | int
    ) -> list[PreparedLayer]:
        cos = sin = None
        if self._angles is not None:
            cos, sin = self._angles.chunk(2, dim=-1)
        pages = self._tables.flatten(0, 1)  # [tables * planes, blocks]
        return [
            layer.prepared(
                self._between[:, 0],
                Places(
                    kv=self._pool.storage,
                    column=self._position.tensor,
                    line=self._line.tensor,
                    pages=pages[number:],
                    first=self._first.tensor if self._window else None,
                    writes=self._writes,
                    cos=cos,
                    sin=sin,
                    loop=loop,
                ),
                deltas,
            )
            for number, layer in enumerate(layers)
        ]

    def fits(
        self,
        part: str,
        layers: Sequence[DecodedLayer],
        batch: Batch,
        rotary: Tensor | None,
        dtype: torch.dtype,
        deltas: Deltas | None,
    ) -> bool:
        """Whether the layers of a part, and all else, are what was arranged; deltas None: any."""
        return (
            batch.pool is self._pool
            and batch.tables.tensor is self._tables
            and rotary is self._rotary
            and dtype == self._dtype
            and (deltas is None or addresses(deltas) == self._memory)
            and all(a is b for a, b in zip(layers, self._parts[part], strict=True))
        )

    def run(
        self,
        part: str,
        x: Hidden,
        planes: Planes,
        deltas: Deltas = NO_DELTAS,
        loops: Sequence[int] = (),
    ) -> Hidden:
        """x [rows, 1, dim] through the layers of a part; `deltas` and `loops` of each row."""
        calls = self._calls[part]
        if not calls:
            return x
        batch = planes.batch
        if batch is not self._batch:
            self._place(batch)
        size = self._tables.shape[1]
        self._line.set([row * size + at for row, at in zip(batch.rows, planes.start, strict=True)])
        for delta in deltas.values():  # of all maps the same one
            assert delta.which is not None
            self._change.tensor[: len(batch)] = delta.which
            break
        self._loop.set(loops)
        if planes.writes is not None:
            self._writes[: len(batch)] = torch.tensor(planes.writes)
        elif not self._all_write:
            self._writes.fill_(True)
        self._all_write = planes.writes is None
        x = x.to(self._dtype).contiguous()
        between, out = self._between, torch.empty_like(x)
        for call in calls[:-1]:
            call.some(x, between)
            x = between[: len(batch)]
        calls[-1].some(x, out)
        return out

    def _place(self, batch: Batch) -> None:
        self._batch = batch
        self._position.set(batch.positions)
        if self._window:
            self._first.set([max(0, at - self._window + 1) for at in batch.positions])
        if self._angles is not None and self._rotary is not None:
            rows = len(batch)
            at, out = self._position.tensor[:rows], self._angles[:rows]
            torch.index_select(self._rotary, 0, at, out=out)


def can_arrange(deltas: Deltas) -> bool:
    """Whether rows differ only in which of the same deltas they have."""
    which = [delta.which for delta in deltas.values()]
    return all(one is not None and one is which[0] for one in which)
