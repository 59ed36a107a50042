"""What goes from loop to loop, and what is kept of it on the way."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from openmythos.nn.moe import RouterStats
from openmythos.recurrence.halting import HaltState
from openmythos.types import Hidden

_SMALLEST = torch.finfo(torch.float32).tiny


class Carry(NamedTuple):
    """What goes from one loop to the next; every tensor has the batch as its first dimension."""

    state: Tensor
    loops_used: Tensor  # [batch, seq]
    active: Tensor | None  # [batch, seq]; None where no position can stop
    kv: tuple[Tensor, ...]  # per layer, kept only where positions can stop
    halt: HaltState | None

    def rows(self, start: int, stop: int) -> "Carry":
        return Carry(
            self.state[start:stop],
            self.loops_used[start:stop],
            None if self.active is None else self.active[start:stop],
            tuple(kv[start:stop] for kv in self.kv),
            None if self.halt is None else HaltState(*(x[start:stop] for x in self.halt)),
        )

    @staticmethod
    def join(parts: "Sequence[Carry]") -> "Carry":
        if len(parts) == 1:
            return parts[0]
        halts = [part.halt for part in parts if part.halt is not None]
        masks = [part.active for part in parts if part.active is not None]
        return Carry(
            torch.cat([part.state for part in parts]),
            torch.cat([part.loops_used for part in parts]),
            torch.cat(masks) if masks else None,
            tuple(torch.cat(kv) for kv in zip(*(part.kv for part in parts), strict=True)),
            HaltState(*map(torch.cat, zip(*halts, strict=True))) if halts else None,
        )


class Trace:
    """Router statistics summed over loops, and states and their sizes where they are asked for."""

    def __init__(self, num_layers: int, collect: Collection[int]) -> None:
        self.router: list[RouterStats | None] = [None] * num_layers
        self.collected: list[int] = []
        self.states: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self._collect = collect
        self._cumulative: list[Tensor] = []
        self._sizes: list[Tensor] = []

    def add_router(self, stats: list[RouterStats | None]) -> None:
        self.router = [
            old if new is None else new.plus(old)
            for old, new in zip(self.router, stats, strict=True)
        ]

    def record(self, loops_run: int, carry: Carry, output: Tensor) -> None:
        if loops_run in self._collect:
            self.collected.append(loops_run)
            self.states.append(carry.state)
            self.outputs.append(output)
        if carry.halt is not None:
            self._cumulative.append(carry.halt.cumulative)

    def halt_weights(self) -> list[Tensor]:
        """Weight of every loop's state, [rows, seq] each; a row's last loop has its remainder."""
        weights = []
        for loop, total in enumerate(self._cumulative):
            before = self._cumulative[loop - 1][: len(total)] if loop else torch.zeros_like(total)
            going_on = len(self._cumulative[loop + 1]) if loop + 1 < len(self._cumulative) else 0
            last = torch.arange(len(total), device=total.device) >= going_on
            weights.append(total - before + last[:, None] * (1 - total))
        return [weights[loop - 1] for loop in self.collected] if weights else []

    @torch.no_grad()
    def watch(self, previous: Hidden, state: Hidden) -> None:
        """Three sums over the positions of a loop: 1, |h'|^2 / dim and |h' - h| / |h'|."""
        size = state.float().norm(dim=-1)
        change = (state.float() - previous.float()).norm(dim=-1) / size.clamp_min(_SMALLEST)
        squares = size.square().sum() / state.shape[-1]
        self._sizes.append(torch.stack([torch.ones_like(size).sum(), squares, change.sum()]))

    def sizes(self) -> Tensor | None:
        """[num_loops, 3]: what `watch` has summed."""
        return torch.stack(self._sizes) if self._sizes else None
