"""The loop itself: shared layers run num_loops times on a state that the input re-enters.

    e      = norm(encoded)                                     prelude norm
    h_0    = initial_state(e)
    u      = injection(h, e) + embedding(loop)                 decay * h + B e for LTI
    h'     = norm(u + R(u))                   R: the layers' residual branches; norm: `loop_norm`

R is without the skip connection, so that u enters h' once. `recurrence.schedule` decides which rows
of a batch run which loop, and what is kept for the backward pass.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from openmythos.nn.block import Block, Layers, LayerStats
from openmythos.nn.layout import AttentionContext
from openmythos.nn.view import KVView
from openmythos.recurrence.conditioning import Conditioning
from openmythos.recurrence.halting import HaltingLayer
from openmythos.recurrence.initial_state import InitialState
from openmythos.recurrence.injection import InjectionLayer
from openmythos.recurrence.state import LoopInputs, LoopState, Scheduled
from openmythos.types import Hidden, LoopCounts


class RecurrentBlock(Scheduled):
    """h_{t+1} = u_t + R(u_t),  u_t = injection(h_t, e) + embedding_t,  for t < num_loops.

    `start`, `step` and `readout` are the definition; `forward` runs them as they are written.
    """

    def __init__(  # noqa: PLR0913
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
        readout_map: nn.Module,
    ) -> None:
        super().__init__()
        self.initial_state = initial_state
        self.prelude_norm = norm
        self.injection = injection
        self.layers = Layers(layers)
        self.conditioning = conditioning(self.layers)
        self._asks_loop = any(layer.feed_forward.asks_loop for layer in layers)
        self.loop_norm = loop_norm
        self.readout_norm = readout_norm
        self.readout_map = readout_map
        self.halting = halting

    def forward(self, encoded: Hidden, context: AttentionContext, num_loops: int) -> Hidden:
        """The equation: the coda's input after num_loops loops, [batch, seq, dim]."""
        state, inputs = self.start(encoded, context)
        for loop in range(num_loops):
            state, _ = self.step(state, inputs, loop)
        return self.readout(state)[0]

    def start(
        self,
        encoded: Hidden,
        context: AttentionContext,
        *,
        given: Hidden | None = None,
        training: bool = False,
        can_stop: bool = False,
    ) -> tuple[LoopState, LoopInputs]:
        """(first state: h_0 or `given`; loop inputs) from the prelude's output [batch, seq, dim].

        `can_stop`: an exit rule may stop positions. `training`: fresh noise, router statistics.
        """
        encoded = self.prelude_norm(encoded)
        weights = [cast("Block", layer).feed_forward.shared_weights() for layer in self.layers]
        draw = self.initial_state.draw
        hidden = draw(encoded, context.positions, fresh=training) if given is None else given
        active, used = None, hidden.new_zeros(hidden.shape[:2], dtype=torch.long)
        if can_stop or self.halting is not None:
            active = torch.ones_like(used, dtype=torch.bool)
        halt = None if self.halting is None else self.halting.start(hidden)
        state = LoopState(hidden, used, active, halt, kv=())
        return state, LoopInputs(self.injection.prepare(encoded), context, weights, training)

    def step(
        self,
        state: LoopState,
        inputs: LoopInputs,
        loop: int | LoopCounts,
        kv: Sequence[KVView] | None = None,
    ) -> tuple[LoopState, LayerStats]:
        """One loop, counted from 0; loop indices [batch] give each row its own.

        `kv` has a view per layer (default: no cache). Halted positions keep their state and KV.
        """
        u = self.injection(state.hidden, inputs.drive)
        embedding, deltas = self.conditioning(loop)
        u = u if embedding is None else u + embedding.to(u.dtype)
        index = None
        if self._asks_loop:
            index = loop if isinstance(loop, Tensor) else u.new_full((1,), loop, dtype=torch.long)
        views = inputs.views(state, deltas, kv, index)
        hidden, router = self.layers(u, views)
        hidden = self.loop_norm(hidden)
        if state.active is None:
            return state._replace(hidden=hidden, loops_used=state.loops_used + 1), router
        hidden = torch.where(state.active[..., None], hidden, state.hidden)
        halt, active = state.halt, state.active
        if self.halting is not None:
            halt, active = self.halting.update(halt, active, hidden, loop)
        return state.moved(hidden, active, halt, views), router

    def readout(self, state: LoopState) -> tuple[Hidden, Tensor | None]:
        """(the coda's input if the loops end here, ponder cost [batch, seq])."""
        output, ponder = state.hidden, None
        if self.halting is not None:
            output, ponder = self.halting.finish(state.halt, state.hidden, state.loops_used)
        return self.readout_map(self.readout_norm(output)), ponder
