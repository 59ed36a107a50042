"""Runs the loops: loops per row, truncated backpropagation, checkpointing, early stopping.

The equation is in `recurrence.loop`. Rows of a batch may run different numbers of loops: they are
sorted by loop count and leave the batch when done, so a pass costs the sum of the rows' loops, not
the batch size times the largest.
"""

import bisect
import operator
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from openmythos.nn.cache import KVCache
from openmythos.nn.layout import AttentionContext
from openmythos.recurrence.exit_rules import ExitTracker, LoopStates
from openmythos.recurrence.loop import RecurrentBlock
from openmythos.recurrence.state import LoopInputs, LoopState, index_at
from openmythos.recurrence.trace import RecurrentOutput, Trace
from openmythos.types import Hidden, LoopCounts


@dataclass(frozen=True, kw_only=True)
class LoopPlan:
    """Options of the loops of one pass.

    num_loops: one number, or one per row. backprop_loops: how many last loops of each row carry
    gradient (0: all). collect: loop counts after which states are kept (1: after the first loop).
    initial_state: h_0 [batch, seq, dim] in place of the model's own.
    """

    num_loops: int | LoopCounts
    backprop_loops: int = 0
    cache: KVCache | None = None
    exits: ExitTracker | None = None
    collect: Collection[int] = ()
    initial_state: Tensor | None = None


def run(
    block: RecurrentBlock, encoded: Hidden, context: AttentionContext, plan: LoopPlan
) -> RecurrentOutput:
    """All loops of one pass on the prelude's output [batch, seq, dim]."""
    # With a cache it is inference, whatever mode the module is in.
    training = block.training and plan.cache is None
    given, order = plan.initial_state, None
    if isinstance(plan.num_loops, Tensor):
        ordered = plan.num_loops.sort(descending=True, stable=True)
        loops, order = ordered.values.tolist(), ordered.indices.to(encoded.device)
        encoded, context = encoded[order], context.select(order)
        given = None if given is None else given[order]
    else:
        loops = [plan.num_loops] * len(encoded)
    state, inputs = block.start(
        encoded, context, given=given, training=training, can_stop=plan.exits is not None
    )
    wanted = inputs.collects or plan.collect or block.record_norms
    trace = Trace(block, plan.collect) if wanted else None
    sync = block.sync_num_loops or (lambda number: number)
    deepest, loops_run, done = sync(loops[0]), 0, []
    for loop in range(deepest):
        running = _deeper(loops, loop)
        if running < len(state.hidden):
            done.append(state.map(lambda x, running=running: x[running:]))
            state = state.map(lambda x, running=running: x[:running])
            inputs = inputs.rows(0, running)
        before, last_held = state, loop + plan.backprop_loops
        if plan.backprop_loops and last_held < deepest:
            held = _deeper(loops, last_held)
            state = _truncated(block, state, inputs, loop, held, plan.cache, trace)
        else:
            state = _step(block, state, inputs, loop, plan.cache, trace)
        if plan.exits is not None and state.active is not None:
            view = LoopStates(before.hidden, state.hidden, block.readout(state)[0])
            state = state._replace(active=plan.exits.update(view, state.active, loop))
        loops_run = loop + 1
        if trace is not None:
            trace.record(loops_run, before, state)
        # Only at inference: in training all ranks must run the same loops.
        if not training and state.active is not None and not sync(int(state.active.any())):
            break
    state = _joined([state, *reversed(done)]) if done else state
    return _finished(block, state, plan, order, trace, loops_run)


def _deeper(loops: list[int], loop: int) -> int:
    """How many rows run more than `loop` loops; `loops` [batch] is in descending order."""
    return bisect.bisect_left(loops, -loop, key=operator.neg)


def _finished(
    block: RecurrentBlock,
    state: LoopState,
    plan: LoopPlan,
    order: Tensor | None,
    trace: Trace | None,
    loops_run: int,
) -> RecurrentOutput:
    """The output of the loops, with the rows in their original order; the cache is completed."""
    (hidden, ponder), used = block.readout(state), state.loops_used
    if order is not None:
        back = order.argsort()
        hidden, used = hidden[back], used[back]
    out = RecurrentOutput(hidden, used, None if ponder is None else ponder.mean(), order=order)
    if trace is not None:
        out = trace.added_to(out, state.hidden, loops_run)
    if plan.exits is not None:
        out = plan.exits.finish(out)
    if plan.cache is not None:
        plan.cache.end_loops(loops_run, out.loops_used)
    return out


def _truncated(
    block: RecurrentBlock,
    state: LoopState,
    inputs: LoopInputs,
    loop: int,
    held: int,
    cache: KVCache | None,
    trace: Trace | None,
) -> LoopState:
    """One loop in which the first `held` rows run without gradient."""
    parts, rows = [], len(state.hidden)
    for start, stop, with_gradient in ((0, held, False), (held, rows, True)):
        # With expert parallelism an empty part runs too: other ranks wait in its collectives.
        if start == stop and block.sync_num_loops is None:
            continue
        part, own = state, inputs
        if stop - start < rows:
            part, own = state.map(lambda x: x[start:stop]), inputs.rows(start, stop)  # noqa: B023
        with torch.set_grad_enabled(torch.is_grad_enabled() and with_gradient):
            parts.append(_step(block, part, own, loop, cache, trace))
        if not with_gradient:
            # The next part must not reuse weights that autocast has cast without gradient.
            torch.clear_autocast_cache()
    return _joined(parts)


def _step(
    block: RecurrentBlock,
    state: LoopState,
    inputs: LoopInputs,
    loop: int,
    cache: KVCache | None,
    trace: Trace | None,
) -> LoopState:
    """One loop at the active positions, checkpointed if the block asks for it."""
    whole, seq, length = state, state.hidden.shape[1], 0 if cache is None else cache.length
    some_stopped = state.active is not None and not bool(state.active.all())
    if some_stopped:
        state, inputs = _packed(state, inputs, length + seq)
    if block.checkpoint_loops and cache is None and torch.is_grad_enabled():
        state, router = checkpoint(block.step, state, inputs, loop, use_reentrant=False)
    else:
        kv = None if cache is None else cache.views("recurrent", seq, loop)
        state, router = block.step(state, inputs, loop, kv)
    if trace is not None:
        trace.router.append(router)
    return _unpacked(whole, state, inputs) if some_stopped else state


def _packed(state: LoopState, inputs: LoopInputs, total: int) -> tuple[LoopState, LoopInputs]:
    """Pack the active positions at the front of their rows, padded to the longest row.

    Keys and values stay those of all `total` positions: active ones attend to halted ones.
    """
    active = state.active
    assert active is not None
    longest = max(1, int(active.sum(dim=1).max()))  # at least 1: an empty batch is no special case
    columns = (~active).to(torch.int8).argsort(dim=1, stable=True)[:, :longest]
    packed = state._replace(kv=()).map(lambda x: x.gather(1, index_at(columns, x)))
    return packed._replace(kv=state.kv), inputs.pick(columns, total)


def _unpacked(whole: LoopState, packed: LoopState, inputs: LoopInputs) -> LoopState:
    """Scatter the packed positions back; halted positions keep their state."""
    columns = inputs.columns
    assert columns is not None
    merged = whole._replace(kv=()).map(
        lambda x, new: x.scatter(1, index_at(columns, x), new.to(x.dtype)), packed._replace(kv=())
    )
    return merged._replace(kv=packed.kv)


def _joined(parts: list[LoopState]) -> LoopState:
    """Concatenate the rows of the parts of a batch."""
    return parts[0] if len(parts) == 1 else parts[0].map(lambda *x: torch.cat(x), *parts[1:])
