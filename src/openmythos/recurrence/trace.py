"""What is recorded during the loops, and their output."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from openmythos.nn.block import LayerStats
from openmythos.nn.feed_forward import RouterStats
from openmythos.recurrence.loop import RecurrentBlock
from openmythos.recurrence.state import LoopState
from openmythos.types import Hidden, LoopsPerToken, Scalar

_SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class RecurrentOutput:
    """The coda's input, and what was recorded of the loops.

    `states`, `outputs` (the coda's input if the loops ended there) and `halt_weights` are keyed by
    loop count, for the counts in `LoopPlan.collect`. If rows ran different numbers of loops, an
    entry has only the rows that ran that loop, in the order `order`. `norms` [num_loops, 3], if
    `RecurrentBlock.record_norms` is set: sums over positions of 1, |h'|^2 / dim and
    |h' - h| / |h'|.
    """

    state: Hidden
    loops_used: LoopsPerToken
    ponder_cost: Scalar | None
    router: Sequence[RouterStats | None] = ()  # per recurrent layer, summed over loops
    states: Mapping[int, Tensor] = field(default_factory=dict)
    outputs: Mapping[int, Tensor] = field(default_factory=dict)
    halt_weights: Mapping[int, Tensor] = field(default_factory=dict)
    order: Tensor | None = None
    norms: Tensor | None = None


class Trace:
    """Router statistics summed over loops; states and their norms if requested."""

    def __init__(self, block: RecurrentBlock, collect: Collection[int]) -> None:
        # Of every loop or part of one. Summed at the end: some are made without gradient.
        self.router: list[LayerStats] = []
        self.states: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}
        self._block, self._collect = block, collect
        self._cumulative: list[Tensor] = []
        self._norms: list[Tensor] = []

    def record(self, loops_run: int, before: LoopState, state: LoopState) -> None:
        """Record what is requested of the loop from state `before` to `state`."""
        if loops_run in self._collect:
            self.states[loops_run] = state.hidden
            self.outputs[loops_run] = self._block.readout(state)[0]
        if self._collect and self._block.halting is not None:
            self._cumulative.append(self._block.halting.cumulative(state.halt))
        if self._block.record_norms:
            self._record_norms(before.hidden, state.hidden)

    def _halt_weights(self) -> Mapping[int, Tensor]:
        """Weight of every loop's state, [rows, seq] each; a row's last loop gets the remainder."""
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

    def added_to(self, output: RecurrentOutput, last: Hidden, loops_run: int) -> RecurrentOutput:
        """The output with what was recorded; `last` is the state after the last loop run."""
        if output.order is None and not isinstance(self._collect, range):
            # All positions had stopped: the loops not run repeat the last state.
            for loops in sorted(loops for loops in self._collect if loops > loops_run):
                self.states[loops], self.outputs[loops] = last, output.state
        router = self.router[0]
        for stats in self.router[1:]:
            router = [b if a is None else a.plus(b) for a, b in zip(stats, router, strict=True)]
        return replace(
            output,
            router=router,
            states=self.states,
            outputs=self.outputs,
            halt_weights=self._halt_weights() if self._cumulative else {},
            norms=torch.stack(self._norms) if self._norms else None,
        )
