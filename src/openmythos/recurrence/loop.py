"""The loop itself: shared layers run num_loops times on a state that the input re-enters.

    e      = norm(encoded)                                     prelude norm
    h_0    = initial_state(e)
    u      = injection(h, e) + embedding(loop)                 decay * h + B e for LTI
    h'     = norm(u + R(u))                                    R: residual branches of the layers,
                                                               norm: none but by `loop_norm`

The linear part of the update is the injection's alone: R adds no second copy of the state. Which
rows of a batch run which loop, and with which memory, is decided in `recurrence.schedule`.
"""

from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from openmythos.nn.block import Block, Layers, LayerStats
from openmythos.nn.layout import AttentionContext
from openmythos.nn.view import Halting, KVView
from openmythos.recurrence.conditioning import Conditioning
from openmythos.recurrence.halting import HaltingLayer
from openmythos.recurrence.initial_state import InitialState
from openmythos.recurrence.injection import Entry, InjectionLayer
from openmythos.recurrence.state import LoopInputs, LoopState
from openmythos.types import Hidden, LoopCounts

P = ParamSpec("P")
T = TypeVar("T")


class RecurrentBlock(nn.Module):
    """h_{t+1} = u_t + R(u_t),  u_t = injection(h_t, e) + embedding_t,  for t < num_loops.

    `start`, `step` and `readout` are the definition; `forward` runs them as they are written. The
    three settings are read by `recurrence.schedule`: `checkpoint_loops` recomputes every loop in
    the backward pass, `record_norms` asks for the size of every loop's state, and
    `sync_num_loops(n)` is the maximum of n over the ranks of an expert-parallel group.
    """

    def __init__(
        self,
        layers: Sequence[Block],
        *,
        norm: nn.Module,
        initial_state: InitialState,
        injection: InjectionLayer,
        conditioning: Callable[[nn.ModuleList], Conditioning],
        halting: HaltingLayer | None,
        loop_norm: nn.Module,
        readout_norm: nn.Module,
    ) -> None:
        super().__init__()
        self.initial_state = initial_state
        self.prelude_norm = norm
        self.injection = injection
        self.entry = Entry(norm, injection)
        self.layers = Layers(layers)
        self.conditioning = conditioning(self.layers)
        self.loop_norm = loop_norm
        self.readout_norm = readout_norm
        self.halting = halting
        self.checkpoint_loops = False
        self.record_norms = False
        self.sync_num_loops: Callable[[int], int] | None = None

    def forward(
        self, encoded: Hidden, context: AttentionContext, positions: Tensor, num_loops: int
    ) -> Hidden:
        """The equation: what the coda reads after num_loops loops, [batch, seq, dim]."""
        state, inputs = self.start(encoded, context, positions)
        for loop in range(num_loops):
            state, _ = self.step(state, inputs, loop)
        return self.readout(state)[0]

    def start(
        self,
        encoded: Hidden,
        context: AttentionContext,
        positions: Tensor,
        *,
        given: Hidden | None = None,
        training: bool = False,
        can_stop: bool = False,
    ) -> tuple[LoopState, LoopInputs]:
        """h_0 (or `given`), and what the loops read of the prelude's output [batch, seq, dim].

        `can_stop`: an exit rule may stop positions. `training` draws fresh noise for a random
        initial state and asks for router statistics.
        """
        encoded, drive = self.entry(encoded)
        hidden = given
        if hidden is None:
            hidden = self.initial_state.draw(encoded, positions, fresh=training)
        halt = None if self.halting is None else self.halting.start(hidden)
        weights = self.layers.shared_weights()
        state = LoopState.first(hidden, halt, can_stop=can_stop or self.halting is not None)
        return state, LoopInputs(drive, context, weights, collects=training)

    def step(
        self,
        state: LoopState,
        inputs: LoopInputs,
        loop: int | LoopCounts,
        kv: Sequence[KVView] | None = None,
    ) -> tuple[LoopState, LayerStats]:
        """One loop. `loop` counts from 0; [batch] numbers let every row be in a loop of its own.

        `kv` has a view per layer (default: this call's tokens alone). Halted positions keep their
        state, and their keys and values.
        """
        u = self.injection(state.hidden, inputs.drive)
        embedding, deltas = self.conditioning(loop)
        if embedding is not None:
            u = u + embedding.to(u.dtype)
        views = inputs.views(state, deltas, kv)
        hidden, router = self.layers(u, views)
        hidden = self.loop_norm(hidden)
        if state.active is None:
            return state._replace(hidden=hidden, loops_used=state.loops_used + 1), router
        hidden = torch.where(state.active[..., None], hidden, state.hidden)
        used = state.loops_used + state.active
        halt, active = state.halt, state.active
        if self.halting is not None:
            halt, active = self.halting.update(halt, active, hidden, loop)
        kept = tuple(view.kv.kept() for view in views if isinstance(view.kv, Halting))
        return LoopState(hidden, used, active, halt, kept), router

    def readout(self, state: LoopState) -> tuple[Hidden, Tensor | None]:
        """(what the coda reads if the loops end here, ponder cost [batch, seq])."""
        if self.halting is None:
            return self.readout_norm(state.hidden), None
        output, ponder = self.halting.finish(state.halt, state.hidden, state.loops_used)
        return self.readout_norm(output), ponder

    def scheduled(self, run: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """run(...) as one forward pass of this module: FSDP gathers the weights once for it."""
        return run(*args, **kwargs)
