"""The loop: shared layers run num_loops times on a state, with the encoded input re-entering.

    e   = norm(encoded)                       (prelude norm)
    u   = decay * h + B e (+ embedding_loop)  (injection)
    h'  = u + R(u)                            (the layers, R their residual branches)

so the linear part of the update is exactly the injection's. Rows of a batch may run different
numbers of loops: they are sorted by depth and leave the batch when they are done, so a step costs
the sum of its depths, not its batch times the largest.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openmythos.nn.block import Attention, Block, FeedForward, Frozen
from openmythos.nn.cache import CacheSlot, KVCache
from openmythos.nn.experts import ExpertWeights
from openmythos.nn.layout import AttentionContext
from openmythos.nn.linear import Deltas
from openmythos.nn.moe import RouterStats
from openmythos.nn.norm import RMSNorm
from openmythos.recurrence.conditioning import Conditioning
from openmythos.recurrence.exit_rules import ExitTracker, LoopStates
from openmythos.recurrence.halting import Halting
from openmythos.recurrence.initial_state import position_noise
from openmythos.recurrence.injection import Drive, Injection, InjectionLayer
from openmythos.recurrence.loop_embedding import LoopEmbeddings
from openmythos.recurrence.loop_lora import LoopLoRAs
from openmythos.recurrence.trace import Carry, Trace
from openmythos.types import Hidden, LoopCounts, LoopsPerToken, Mask, Scalar

StateInit = Literal["zeros", "encoded", "normal"]
LoopWeights = list[ExpertWeights | None]  # of each layer, made once for all loops


@runtime_checkable
class RecurrentConfig(Protocol):
    """The part of a model's config that the block reads."""

    @property
    def dim(self) -> int: ...
    @property
    def recurrent_layers(self) -> int: ...
    @property
    def attention(self) -> Attention: ...
    @property
    def recurrent_feed_forward(self) -> FeedForward: ...
    @property
    def injection(self) -> Injection: ...
    @property
    def halting(self) -> Halting: ...
    @property
    def loop_embedding(self) -> LoopEmbeddings: ...
    @property
    def loop_lora(self) -> LoopLoRAs: ...
    @property
    def state_init(self) -> StateInit: ...
    @property
    def prelude_norm(self) -> bool: ...
    @property
    def norm_eps(self) -> float: ...


@dataclass(frozen=True)
class RecurrentOutput:
    """State after the last loop and what happened on the way.

    `states`, `outputs` (what the coda would get if the loops ended there: under halting, the
    weighted sum) and `halt_weights` hold an entry for each loop count in `collected`. Where rows
    ran different numbers of loops, an entry has only those that ran that loop, in `order`.
    `sizes` is there where `RecurrentBlock.watched` is set; see `Trace.watch`.
    """

    state: Hidden
    loops_used: LoopsPerToken
    ponder_cost: Scalar | None
    router: list[RouterStats | None]  # per recurrent layer, summed over loops
    collected: list[int]
    states: list[Tensor]
    outputs: list[Tensor]
    halt_weights: list[Tensor]
    order: Tensor | None
    sizes: Tensor | None


class SharedLayers(nn.ModuleList):
    """x + R(x): the layers that every loop runs, one after the other."""

    def forward(
        self,
        x: Tensor,
        context: AttentionContext,
        slots: list[CacheSlot | None],
        frozen: list[Frozen | None],
        deltas: Deltas,
        experts: LoopWeights,
    ) -> tuple[Tensor, tuple[Tensor, ...], list[RouterStats | None]]:
        kv, router = [], []
        for layer, slot, stopped, weights in zip(self, slots, frozen, experts, strict=True):
            out = layer(
                x, context, slot=slot, frozen=stopped, deltas=deltas, expert_weights=weights
            )
            x = out.x
            kv.append(out.kv)
            router.append(out.router)
        return x, tuple(kv), router


class Entry(nn.Module):
    """What the loops read of the prelude's output, and what of it no loop changes.

    A module to be compiled as one piece. It has no parameters of its own: the norm and the
    injection stay the block's, under the names that they have there.
    """

    def __init__(self, norm: nn.Module, injection: InjectionLayer) -> None:
        super().__init__()
        self._parts = (norm, injection)  # in a tuple, so that they are not registered twice

    def forward(self, encoded: Hidden) -> tuple[Hidden, Drive]:
        norm, injection = self._parts
        encoded = norm(encoded)
        return encoded, injection.prepare(encoded)


class RecurrentBlock(nn.Module):
    """h_{t+1} = u_t + R(u_t), u_t = Injection(h_t, e), for t < num_loops.

    `checkpoint_loops` recomputes each loop in the backward pass, so that the memory of a training
    step holds one state per loop instead of every activation. `watched` asks for the size and the
    change of every loop's state. `agree`, the largest of the numbers that some processes give, has
    these call the layers equally often: with no rows when done.
    """

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__()
        c = config
        self.state_init = c.state_init
        self.prelude_norm = RMSNorm(c.dim, c.norm_eps) if c.prelude_norm else nn.Identity()
        self.injection = c.injection.build(c.dim)
        self.entry = Entry(self.prelude_norm, self.injection)
        self.layers = SharedLayers(
            Block(c.dim, c.attention, c.recurrent_feed_forward, c.norm_eps)
            for _ in range(c.recurrent_layers)
        )
        self.conditioning = Conditioning(c.dim, self.layers, c.loop_embedding, c.loop_lora)
        self.halting = c.halting.build(c.dim)
        self.checkpoint_loops = False
        self.watched = False
        self.agree: Callable[[int], int] | None = None

    def forward(
        self,
        encoded: Hidden,
        context: AttentionContext,
        positions: Tensor,
        *,
        num_loops: int | LoopCounts,
        backprop_loops: int = 0,
        cache: KVCache | None = None,
        tracker: ExitTracker | None = None,
        collect: Collection[int] = (),
    ) -> RecurrentOutput:
        """Run the loops; backprop_loops > 0 lets only each row's last ones carry gradient.

        `collect` names the loop counts (1 = after the first loop) whose states are kept.
        """
        batch = encoded.shape[0]
        order: Tensor | None = None
        if isinstance(num_loops, Tensor):
            sorted_loops = num_loops.sort(descending=True, stable=True)
            depths, order = sorted_loops.values.tolist(), sorted_loops.indices.to(encoded.device)
            encoded, context = encoded[order], context.select(order)
            positions = positions if positions.shape[0] == 1 else positions[order]
        else:
            depths = [num_loops] * batch
        encoded, drive = self.entry(encoded)
        experts = [cast("Block", layer).feed_forward.shared_weights() for layer in self.layers]
        # With a cache it is inference, whatever mode the module is in: see `OpenMythos.forward`.
        training = self.training and cache is None
        carry = self._start(encoded, positions, tracker is not None, training)
        trace = Trace(len(self.layers), collect)
        done: list[Carry] = []
        loops_run = 0
        deepest = depths[0] if self.agree is None else self.agree(depths[0])
        for loop in range(deepest):
            running = _count_above(depths, loop)
            if running < carry.state.shape[0]:
                done.append(carry.rows(running, carry.state.shape[0]))
                carry = carry.rows(0, running)
            split = None
            if backprop_loops and deepest > loop + backprop_loops:
                split = _count_above(depths, loop + backprop_loops)
            previous = carry.state
            carry = self._run_rows(carry, drive, context, experts, loop, split, cache, trace)
            if tracker is not None:
                carry = self._judge(previous, carry, tracker, loop)
            loops_run = loop + 1
            if self.watched:
                trace.watch(previous, carry.state)
            if collect:
                trace.record(loops_run, carry, self._output(carry)[0])
            # Only at inference: in training all ranks must run the same loops.
            if not training and carry.active is not None and self._have_stopped(carry.active):
                break
        if cache is not None:
            cache.fill_unrun_loops(loops_run, encoded.shape[1])
        return self._finish(Carry.join([carry, *reversed(done)]), trace, order)

    def _run_rows(
        self,
        carry: Carry,
        drive: Drive,
        context: AttentionContext,
        experts: LoopWeights,
        loop: int,
        split: int | None,
        cache: KVCache | None,
        trace: "Trace",
    ) -> Carry:
        """One loop of all running rows, those before `split` without gradient."""
        rows = carry.state.shape[0]
        if rows < drive.forced.shape[0]:
            drive, context = drive.rows(0, rows), context.rows(0, rows)
        parts = []
        plan = [(0, rows, True)] if split is None else [(0, split, False), (split, rows, True)]
        for start, stop, graded in plan:
            # Others, who have rows here, must find this process at the same collectives.
            if start == stop and self.agree is None:
                continue
            part, cut, visible = (
                (carry, drive, context)
                if stop - start == rows
                else (carry.rows(start, stop), drive.rows(start, stop), context.rows(start, stop))
            )
            with torch.set_grad_enabled(torch.is_grad_enabled() and graded):
                if self.checkpoint_loops and cache is None and torch.is_grad_enabled():
                    part, router = checkpoint(
                        self._loop, part, cut, visible, experts, loop, use_reentrant=False
                    )
                else:
                    part, router = self._loop(part, cut, visible, experts, loop, cache)
            if not graded:
                # Weights that autocast has cast without gradient must not serve the next part.
                torch.clear_autocast_cache()
            trace.add_router(router)
            parts.append(part)
        return Carry.join(parts)

    def _loop(
        self,
        carry: Carry,
        drive: Drive,
        context: AttentionContext,
        experts: LoopWeights,
        loop: int,
        cache: KVCache | None = None,
    ) -> tuple[Carry, list[RouterStats | None]]:
        """One pass of the shared layers."""
        u = self.injection(carry.state, drive)
        embedding, deltas = self.conditioning(loop)
        if embedding is not None:
            u = u + embedding.to(u.dtype)
        slots = [
            None if cache is None else cache.recurrent_slot(layer, loop)
            for layer in range(len(self.layers))
        ]
        frozen: list[Frozen | None] = [None] * len(self.layers)
        if carry.active is not None and carry.kv:
            frozen = [Frozen(carry.active, kv) for kv in carry.kv]
        state, kv, router = self.layers(u, context, slots, frozen, deltas, experts)
        loops_used = carry.loops_used + 1
        if carry.active is not None:
            state = torch.where(carry.active[..., None], state, carry.state)
            loops_used = carry.loops_used + carry.active
        kept = kv if carry.active is not None else ()
        halt, active = carry.halt, carry.active
        if self.halting is not None and halt is not None and active is not None:
            halt, active = self.halting.update(halt, active, state, loop)
        return Carry(state, loops_used, active, kept, halt), router

    def compile_layers(self, **options: object) -> None:
        """torch.compile the shared layers, once for all loops, and what precedes the loops."""
        # `Module.compile` leaves nothing behind in a copy: that one runs its own weights, eagerly.
        self.entry.compile(**options)
        self.layers.compile(**options)

    def _start(self, encoded: Hidden, positions: Tensor, can_stop: bool, training: bool) -> Carry:
        state = self._initial_state(encoded, positions, training)
        halt = None if self.halting is None else self.halting.start(state)
        active = torch.ones(state.shape[:2], dtype=torch.bool, device=state.device)
        can_stop = can_stop or halt is not None
        used = torch.zeros(state.shape[:2], dtype=torch.long, device=state.device)
        return Carry(state, used, active if can_stop else None, (), halt)

    def _initial_state(self, encoded: Hidden, positions: Tensor, training: bool) -> Hidden:
        """h_0; "normal" is N(0, 2 / (5 dim)) as in Parcae, at inference a function of position."""
        if self.state_init == "zeros":
            return torch.zeros_like(encoded)
        if self.state_init == "encoded":
            return encoded
        std = (2 / (5 * encoded.shape[-1])) ** 0.5
        if training:
            return torch.randn_like(encoded) * std
        # Fixed noise per position: same logits every time, for any batch, prefill or cache.
        noise = position_noise(positions, encoded.shape[-1])
        return (noise * std).to(encoded.dtype).expand_as(encoded)

    def _have_stopped(self, active: Mask) -> bool:
        return not (active.any() if self.agree is None else self.agree(int(active.any())))

    def _judge(self, previous: Hidden, carry: Carry, tracker: ExitTracker, loop: int) -> Carry:
        """Let the exit rule look at the state and stop the positions that it lets go."""
        assert carry.active is not None
        view = LoopStates(previous, carry.state, self._output(carry)[0])
        return carry._replace(active=tracker.update(view, carry.active, loop))

    def _finish(self, carry: Carry, trace: "Trace", order: Tensor | None) -> RecurrentOutput:
        (state, ponder_cost), loops_used = self._output(carry), carry.loops_used
        if order is not None:
            back = order.argsort()
            state, loops_used = state[back], loops_used[back]
        return RecurrentOutput(
            state,
            loops_used,
            ponder_cost,
            trace.router,
            trace.collected,
            trace.states,
            trace.outputs,
            trace.halt_weights(),
            order,
            trace.sizes(),
        )

    def _output(self, carry: Carry) -> tuple[Hidden, Scalar | None]:
        """(what the coda gets if the loops end here, ponder cost)."""
        if self.halting is None or carry.halt is None:
            return carry.state, None
        output, ponder = self.halting.finish(carry.halt, carry.state, carry.loops_used)
        return output, ponder.mean()


def _count_above(depths: list[int], loop: int) -> int:
    return sum(depth > loop for depth in depths)
