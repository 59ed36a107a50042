"""Runs the loops: loops per row, truncated backpropagation, checkpointing, early stopping.

The equation is in `recurrence.loop`. Rows of a batch may run different numbers of loops: they are
sorted by loop count and leave the batch when done, so a pass costs the sum of the rows' loops, not
the batch size times the largest.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from openmythos.nn.block import LayerStats
from openmythos.nn.cache import KVCache
from openmythos.nn.layout import AttentionContext
from openmythos.recurrence.exit_rules import ExitTracker, LoopStates
from openmythos.recurrence.loop import RecurrentBlock
from openmythos.recurrence.state import LoopInputs, LoopState
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
    block: RecurrentBlock,
    encoded: Hidden,
    context: AttentionContext,
    positions: Tensor,
    plan: LoopPlan,
) -> RecurrentOutput:
    """All loops of one pass; encoded [batch, seq, dim], positions [batch or 1, seq]."""
    # With a cache it is inference, whatever mode the module is in.
    training = block.training and plan.cache is None
    (loops, order), given = _sorted_rows(plan.num_loops, len(encoded)), plan.initial_state
    if order is not None:
        order = order.to(encoded.device)
        encoded, context = encoded[order], context.select(order)
        positions = positions if len(positions) == 1 else positions[order]
        given = None if given is None else given[order]
    state, inputs = block.start(
        encoded,
        context,
        positions,
        given=given,
        training=training,
        can_stop=plan.exits is not None,
    )
    wanted = inputs.collects or plan.collect or block.record_norms
    trace, done, loops_run = Trace(block, plan.collect) if wanted else None, [], 0
    sync = block.sync_num_loops or (lambda number: number)
    deepest = sync(loops[0])
    for loop in range(deepest):
        running = _count_above(loops, loop)
        if running < len(state.hidden):
            done.append(state.map(lambda x, running=running: x[running:]))
            state = state.map(lambda x, running=running: x[:running])
        cut = None
        if plan.backprop_loops and deepest > loop + plan.backprop_loops:
            cut = _count_above(loops, loop + plan.backprop_loops)
        before = state
        state = _truncated(block, state, inputs.rows(0, running), loop, cut, plan.cache, trace)
        if plan.exits is not None and state.active is not None:
            view = LoopStates(before.hidden, state.hidden, block.readout(state)[0])
            state = state._replace(active=plan.exits.update(view, state.active, loop))
        loops_run = loop + 1
        if trace is not None:
            trace.record(loops_run, before, state)
        # Only at inference: in training all ranks must run the same loops.
        if not training and state.active is not None and not sync(int(state.active.any())):
            break
    if plan.cache is not None:
        plan.cache.fill_unrun_loops(loops_run, encoded.shape[1])
    if trace is not None and order is None:
        trace.record_rest(loops_run, state)
    state = _joined([state, *reversed(done)]) if done else state
    out = _finished(block, state, order, trace)
    return out if plan.exits is None else plan.exits.finish(out)


def _finished(
    block: RecurrentBlock, state: LoopState, order: Tensor | None, trace: Trace | None
) -> RecurrentOutput:
    """The output of the loops, with the rows in their original order."""
    (hidden, ponder), used = block.readout(state), state.loops_used
    if order is not None:
        back = order.argsort()
        hidden, used = hidden[back], used[back]
    found = RecurrentOutput(hidden, used, None if ponder is None else ponder.mean(), order=order)
    return found if trace is None else trace.added_to(found)


def _truncated(
    block: RecurrentBlock,
    state: LoopState,
    inputs: LoopInputs,
    loop: int,
    cut: int | None,
    cache: KVCache | None,
    trace: Trace | None,
) -> LoopState:
    """One loop of the rows still in the batch; rows before `cut` run without gradient."""
    rows, parts = len(state.hidden), []
    halves = [(0, rows, True)] if cut is None else [(0, cut, False), (cut, rows, True)]
    for start, stop, with_gradient in halves:
        # With expert parallelism an empty part runs too: other ranks wait in its collectives.
        if start == stop and block.sync_num_loops is None:
            continue
        part = state if stop - start == rows else state.map(lambda x: x[start:stop])  # noqa: B023
        with torch.set_grad_enabled(torch.is_grad_enabled() and with_gradient):
            part, router = _step(block, part, inputs.rows(start, stop), loop, cache)
        if not with_gradient:
            # The next part must not reuse weights that autocast has cast without gradient.
            torch.clear_autocast_cache()
        if trace is not None:
            trace.add_router(router)
        parts.append(part)
    return parts[0] if len(parts) == 1 else _joined(parts)


def _step(
    block: RecurrentBlock, state: LoopState, inputs: LoopInputs, loop: int, cache: KVCache | None
) -> tuple[LoopState, LayerStats]:
    """One loop at the active positions, checkpointed if the block asks for it."""
    active, whole = state.running(), state
    if active is not None:
        state, inputs = _packed(state, inputs, active, 0 if cache is None else cache.length)
    if block.checkpoint_loops and cache is None and torch.is_grad_enabled():
        state, router = checkpoint(block.step, state, inputs, loop, use_reentrant=False)
    else:
        seq = whole.hidden.shape[1]
        layers = range(len(block.layers))
        kv = None if cache is None else [cache.recurrent(layer, seq, loop) for layer in layers]
        state, router = block.step(state, inputs, loop, kv)
    return (state if active is None else _unpacked(whole, state, inputs)), router


def _packed(
    state: LoopState, inputs: LoopInputs, active: Tensor, cached: int
) -> tuple[LoopState, LoopInputs]:
    """Pack the active positions at the front of their rows, padded to the longest row.

    Keys and values stay those of all positions: active ones attend to halted ones.
    """
    longest = max(1, int(active.sum(dim=1).max()))  # at least 1: an empty batch is no special case
    columns = (~active).to(torch.int8).argsort(dim=1, stable=True)[:, :longest]
    packed = state._replace(kv=()).map(lambda x: x.gather(1, _like(columns, x)))
    return packed._replace(kv=state.kv), inputs.pick(columns, cached + active.shape[1])


def _unpacked(whole: LoopState, packed: LoopState, inputs: LoopInputs) -> LoopState:
    """Scatter the packed positions back; halted positions keep their state."""
    columns = inputs.columns
    assert columns is not None
    merged = whole._replace(kv=()).map(
        lambda x, new: x.scatter(1, _like(columns, x), new.to(x.dtype)), packed._replace(kv=())
    )
    return merged._replace(kv=packed.kv)


def _like(columns: Tensor, x: Tensor) -> Tensor:
    """[batch, width] as an index into x [batch, seq, ...] along its positions."""
    return columns.view(*columns.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])


def _joined(parts: list[LoopState]) -> LoopState:
    """Concatenate the rows of several parts of a batch."""
    return parts[0].map(lambda *x: torch.cat(x), *parts[1:])


def _sorted_rows(num_loops: int | LoopCounts, batch: int) -> tuple[list[int], Tensor | None]:
    """(loops of each row, descending; the order of the rows, None if all run equally many)."""
    if not isinstance(num_loops, Tensor):
        return [num_loops] * batch, None
    ordered = num_loops.sort(descending=True, stable=True)
    return ordered.values.tolist(), ordered.indices


def _count_above(loops: list[int], loop: int) -> int:
    return sum(number > loop for number in loops)
