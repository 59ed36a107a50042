"""What is recorded of the loops on their way."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from openmythos.nn.block import LayerStats
from openmythos.recurrence.loop import RecurrentBlock
from openmythos.recurrence.state import LoopState

_SMALLEST = torch.finfo(torch.float32).tiny


class Trace:
    """Router statistics summed over loops; states and their norms where they are asked for."""

    def __init__(self, block: RecurrentBlock, collect: Collection[int]) -> None:
        self.router: LayerStats = [None] * len(block.layers)
        self.states: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}
        self._block, self._collect = block, collect
        self._cumulative: list[Tensor] = []
        self._norms: list[Tensor] = []

    def add_router(self, stats: LayerStats) -> None:
        self.router = [
            old if new is None else new.plus(old)
            for old, new in zip(self.router, stats, strict=True)
        ]

    def record(self, loops_run: int, before: LoopState, state: LoopState) -> None:
        """Keep what is wanted of the loop that led from one state to the next."""
        if loops_run in self._collect:
            self.states[loops_run] = state.hidden
            self.outputs[loops_run] = self._block.readout(state)[0]
        if self._collect and self._block.halting is not None:
            self._cumulative.append(self._block.halting.cumulative(state.halt))
        if self._block.record_norms:
            self._record_norms(before.hidden, state.hidden)

    def record_rest(self, loops_run: int, state: LoopState) -> None:
        """Loops that no position went on to would have changed nothing."""
        rest = [] if isinstance(self._collect, range) else sorted(self._collect)
        for loops in (loops for loops in rest if loops > loops_run):
            self.states[loops] = state.hidden
            self.outputs[loops] = self._block.readout(state)[0]

    def halt_weights(self) -> Mapping[int, Tensor]:
        """Weight of every loop's state, [rows, seq] each; a row's last loop has its remainder."""
        weights = {}
        for loop, total in enumerate(self._cumulative):
            before = self._cumulative[loop - 1][: len(total)] if loop else torch.zeros_like(total)
            going_on = len(self._cumulative[loop + 1]) if loop + 1 < len(self._cumulative) else 0
            last = torch.arange(len(total), device=total.device) >= going_on
            weights[loop + 1] = total - before + last[:, None] * (1 - total)
        return {loops: weights[loops] for loops in self.states if loops in weights}

    @torch.no_grad()
    def _record_norms(self, previous: Tensor, state: Tensor) -> None:
        size = state.float().norm(dim=-1)
        change = (state.float() - previous.float()).norm(dim=-1) / size.clamp_min(_SMALLEST)
        squares = size.square().sum() / state.shape[-1]
        self._norms.append(torch.stack([torch.ones_like(size).sum(), squares, change.sum()]))

    def norms(self) -> Tensor | None:
        """[num_loops, 3]: sums over positions of 1, |h'|^2 / dim and |h' - h| / |h'|."""
        return torch.stack(self._norms) if self._norms else None
