"""One new token for every row, as three regions of fixed shapes: begin, one loop, end.

The regions are the model's own modules on views that say by tensors where a row is: at which
column of the cache, at which position, in which loop. So a region can be compiled, or captured as a
CUDA graph, once for all tokens and any number of loops (`inference.graphs`). What a loop decides,
such as to stop, is a tensor too; a row that has stopped is computed and its result dropped.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeGuard, cast

import torch
from torch import Tensor, nn

from openmythos.inference.contrast import Contrast, NoContrast
from openmythos.nn.block import Block, Layers
from openmythos.nn.cache import KVCache
from openmythos.nn.layout import AttentionContext, AttentionPositions, own_mask, rope_tables
from openmythos.nn.view import CachedRows, LayerView
from openmythos.recurrence.exit_rules import ExitRule, ExitTracker, FixedExit, LoopStates
from openmythos.recurrence.injection import Drive
from openmythos.recurrence.loop import RecurrentBlock
from openmythos.recurrence.state import LoopInputs, LoopState
from openmythos.types import Hidden, LoopCounts, NextLogits, NextTokenIds, TokenIds


class StepModel(Protocol):
    """What the regions need of a model."""

    prelude: Layers
    recurrent: RecurrentBlock
    coda: Layers
    norm: nn.Module

    @property
    def attention(self) -> AttentionPositions: ...
    @property
    def width(self) -> int:
        """Width of the hidden state."""

    def embedded(self, tokens: TokenIds) -> Hidden:
        """The prelude's input."""

    def logits(self, hidden: Hidden) -> Tensor:
        """Logits from the output of `norm`."""


def shows_its_parts(model: object) -> TypeGuard[StepModel]:
    """Whether it is a `StepModel`. From Python 3.12 on isinstance overlooks submodules."""
    parts = (*StepModel.__annotations__, "attention", "width", "embedded", "logits")
    return all(hasattr(model, name) for name in parts)


class Places(NamedTuple):
    """Where the new tokens are."""

    tokens: Tensor  # [rows, 1]
    column: Tensor  # [rows] of the cache
    position: Tensor  # [rows] in the sequence: the column, less the padding before it
    keys: Tensor  # [total] the columns that are read: 0, 1, ...
    valid: Tensor | None  # [rows, capacity] False at padding; None: no padding


class Seen(NamedTuple):
    """What every layer of the step sees; see `nn.layout.AttentionContext`."""

    cos: Tensor | None  # [rows, 1, 1, rotary_dim]
    sin: Tensor | None
    mask: Tensor | None  # [rows, 1, 1, total]; None: every row sees all `total` columns


Planes = Sequence[Tensor]  # keys and values of each layer, as in `CachedRows`


def begin(
    model: StepModel, places: Places, kv: Planes, masked: bool, can_stop: bool
) -> tuple[LoopState, Drive, Seen]:
    """Embedding and prelude: the state before the first loop, and what is constant over loops."""
    cos = sin = mask = None
    attention, rotary = model.attention, model.attention.rotary_dim(model.width)
    if rotary:
        at = places.position[:, None, None]
        cos, sin = rope_tables(at, rotary, attention.rope_base, attention.rope_scaling)
    if masked:
        mask = own_mask(places.column, places.keys, attention.window)
        if places.valid is not None:
            mask = mask & places.valid[:, None, None, : places.keys.shape[0]]
    seen = Seen(cos, sin, mask)
    context = _context(places, seen)
    views = [LayerView(context, CachedRows(x, places.column, places.keys.shape[0])) for x in kv]
    x, _ = model.prelude(model.embedded(places.tokens), views)
    state, inputs = model.recurrent.start(x, context, can_stop=can_stop)
    if state.active is not None:
        widths = [cast("Block", layer).attention.kv_width for layer in model.recurrent.layers]
        state = state._replace(kv=tuple(x.new_zeros(x.shape[0], 1, width) for width in widths))
    return state, inputs.drive, seen


def one_loop(  # noqa: PLR0913
    model: StepModel,
    state: LoopState,
    drive: Drive,
    seen: Seen,
    places: Places,
    loop: LoopCounts,
    kv: Planes,
    slot: Tensor | None,
    writes: Tensor | None,
) -> LoopState:
    """One loop of every row; `loop` [rows], or [1] if all rows are in the same loop."""
    block = model.recurrent
    weights = [cast("Block", layer).feed_forward.shared_weights() for layer in block.layers]
    inputs = LoopInputs(drive, _context(places, seen), weights, collects=False, keeps_shape=True)
    views = [CachedRows(x, places.column, places.keys.shape[0], slot, writes) for x in kv]
    return block.step(state, inputs, loop, views)[0]


def end(model: StepModel, output: Hidden, seen: Seen, places: Places, kv: Planes) -> NextLogits:
    """Coda, norm and head of the loops' output [rows, 1, dim]: logits [rows, vocab]."""
    context = _context(places, seen)
    views = [LayerView(context, CachedRows(x, places.column, places.keys.shape[0])) for x in kv]
    x, _ = model.coda(output, views)
    return model.logits(model.norm(x))[:, 0]


def _context(places: Places, seen: Seen) -> AttentionContext:
    positions, tokens = places.position[:, None], places.tokens
    return AttentionContext(positions, *seen, is_causal=False, packed=True, tokens=tokens)


class Run(Protocol):
    """How regions are run: eagerly, compiled, or as CUDA graphs (`inference.graphs`).

    With `fixed` the step keeps every shape: it reads a multiple of `bucket` columns under a mask,
    and slots are tensors, so that the storage of all loops is one input.
    """

    fixed: bool
    bucket: int

    def __call__(self, region: Callable[..., Any], model: Any, /, **inputs: Any) -> Any:
        """region(model, **inputs)."""


class Eager:
    """Regions as they are written."""

    def __init__(self, *, fixed: bool = False, bucket: int = 64) -> None:
        self.fixed, self.bucket = fixed, bucket

    def __call__(self, region: Callable[..., Any], model: Any, /, **inputs: Any) -> Any:
        return region(model, **inputs)


def unsupported(rule: ExitRule, contrast: Contrast) -> str:
    """Why a step cannot follow them; empty if it can."""
    if not isinstance(contrast, NoContrast):
        return f"contrast {contrast.kind} reads the logits of an earlier loop"
    if rule.needs_logits:
        return f"exit_rule {rule.kind} reads the logits of every loop"
    if not isinstance(rule, FixedExit) and rule.scope == "sequence":
        return "with scope sequence the loops of a row depend on the other rows"
    return ""


def step_tracker(rule: ExitRule, cache: KVCache) -> ExitTracker:
    """What applies a rule that reads no logits to the loops of one new token per row."""

    def no_logits(state: Hidden, loop: int) -> Tensor:
        raise AssertionError("such a rule is not supported")

    assert not isinstance(rule, FixedExit)
    valid = torch.ones(cache.batch, 1, dtype=torch.bool, device=cache.valid.device)
    return ExitTracker(rule, no_logits, valid, cache.exit_loop)


class Step:
    """Decoding steps of `num_loops` loops under an exit rule, on one cache.

    It does not hold the cache, so that one may be kept for each cache as long as that lives.
    """

    def __init__(
        self, model: StepModel, cache: KVCache, num_loops: int, rule: ExitRule, run: Run
    ) -> None:
        self.model, self.rule, self.run = model, rule, run
        self.num_loops, self._policy = num_loops, cache.policy
        device = cache.valid.device
        self._keys = torch.arange(cache.capacity, device=device)
        self._counts = torch.arange(num_loops, device=device)[:, None]  # one loop index each
        policy, size = cache.policy, cache.batch
        slots = [policy.slot(loop) for loop in range(num_loops)]
        first = [policy.overwrites or slot not in slots[:loop] for loop, slot in enumerate(slots)]
        self._writes: Sequence[Tensor | None] = [None] * num_loops
        if not all(first):
            self._writes = list(torch.tensor(first, device=device)[:, None].repeat(1, size))
        self._slots = torch.tensor(slots, device=device)[:, None].repeat(1, size)

    def __call__(self, tokens: NextTokenIds, cache: KVCache) -> tuple[NextLogits, LoopCounts]:
        """(logits [rows, vocab] after `tokens` [rows], loops they ran); the cache is advanced."""
        model, run = self.model, self.run
        places, masked = self.places(tokens, cache)
        early = not isinstance(self.rule, FixedExit)
        prelude = [view.storage for view in cache.views("prelude", 1)]
        state, drive, seen = run(
            begin, model, places=places, kv=prelude, masked=masked, can_stop=early
        )
        tracker = step_tracker(self.rule, cache) if early else None
        loops_run = 0
        for loop in range(self.num_loops):
            before = state
            kv = self._planes(cache, loop)
            state = run(
                one_loop,
                model,
                state=state,
                drive=drive,
                seen=seen,
                places=places,
                loop=self._counts[loop],
                kv=kv,
                slot=self._slots[loop] if run.fixed else None,
                writes=self._writes[loop],
            )
            loops_run = loop + 1
            if tracker is not None and state.active is not None:
                output = model.recurrent.readout(state)[0]
                view = LoopStates(before.hidden, state.hidden, output)
                state = state._replace(active=tracker.update(view, state.active, loop))
            # Where shapes are fixed for the device's sake, waiting for it would cost more.
            if state.active is not None and not run.fixed and not bool(state.active.any()):
                break
        output, used = model.recurrent.readout(state)[0], state.loops_used
        coda = [view.storage for view in cache.views("coda", 1)]
        logits = run(end, model, output=output, seen=seen, places=places, kv=coda)
        cache.end_loops(loops_run, used)
        cache.advance(1)
        return logits, used[:, 0]

    def fits(self, cache: KVCache, num_loops: int, rule: ExitRule) -> bool:
        """Whether it is a step of so many loops under this rule, and the cache is as it was."""
        same_cache = self._policy is cache.policy and len(self._keys) == cache.capacity
        same_cache = same_cache and self._slots.shape[1] == cache.batch
        return same_cache and self.num_loops == num_loops and self.rule == rule

    def places(self, tokens: NextTokenIds, cache: KVCache) -> tuple[Places, bool]:
        """Where the tokens are, and whether a mask is needed."""
        tokens = tokens[:, None]
        layout = cache.place(tokens, None)
        total = cache.length + 1
        if self.run.fixed:
            total = min(-(-total // self.run.bucket) * self.run.bucket, cache.capacity)
        column = torch.full((len(tokens),), cache.length, device=layout.device)
        position = column if layout.valid is None else layout.positions()[:, -1]
        valid = None if layout.valid is None else cache.valid
        masked = self.run.fixed or valid is not None or self.model.attention.window > 0
        return Places(tokens, column, position, self._keys[:total], valid), masked

    def _planes(self, cache: KVCache, loop: int) -> Planes:
        if self.run.fixed:
            return cache.slots("recurrent")
        return [view.storage for view in cache.views("recurrent", 1, loop)]
