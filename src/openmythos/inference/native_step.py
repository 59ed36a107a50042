"""One new token for every row, as native calls whose arguments are arranged once for a cache.

Python still computes what is between the layers: injection, norms, exit rule. The model itself
decodes where a layer has no native form, or where rows may stop at different loops.
"""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn

from openmythos.inference.contrast import Contrast
from openmythos.inference.decode import StepModel, step_tracker, unsupported
from openmythos.kernels import few_rows_native
from openmythos.kernels.few_rows import Places
from openmythos.machine import use_huge_pages
from openmythos.nn.block import Block, Layers
from openmythos.nn.cache import KVCache
from openmythos.nn.few_rows import DecodedLayer, native_layer
from openmythos.nn.layout import rope_tables
from openmythos.nn.linear import NO_DELTAS, Deltas, addresses
from openmythos.recurrence.exit_rules import ExitRule, FixedExit, LoopStates
from openmythos.recurrence.loop import RecurrentBlock
from openmythos.types import Hidden, LoopCounts, NextLogits, TokenIds

if TYPE_CHECKING:
    from openmythos.kernels.few_rows_native import PreparedLayer
    from openmythos.nn.view import Cached


class NativeStep:
    """Steps of `num_loops` loops of a model on one cache; valid while both are as they were."""

    def __init__(
        self,
        model: StepModel,
        cache: KVCache,
        num_loops: int,
        layers: Sequence[DecodedLayer],
        dtype: torch.dtype,
    ) -> None:
        self.model, self.num_loops, self._layers = model, num_loops, layers
        self._policy, self._valid = cache.policy, cache.valid
        self._slots = [cache.slots(part) for part in ("prelude", "recurrent", "coda")]
        for x in itertools.chain(*self._slots):
            use_huge_pages(x.data_ptr(), x.nbytes)
        # Padding, which is before the prompt, moves a row's positions.
        self._padding = (~cache.valid[:, : cache.length]).sum(1)[:, None]
        self._positions = torch.zeros_like(self._padding)
        self._dtype = dtype
        rows, window = cache.batch, model.attention.window
        self._first = torch.zeros_like(self._padding[:, 0]) if window else None
        self._table, self._angles = None, None
        rotary = model.attention.rotary_dim(model.width)
        if rotary:
            attention = model.attention
            every = torch.arange(cache.capacity, device=cache.valid.device)
            tables = rope_tables(every, rotary, attention.rope_base, attention.rope_scaling)
            self._table = torch.cat(tables, dim=-1)
            self._angles = self._table.new_zeros(rows, 2 * rotary)
        block = model.recurrent
        recurrent, coda = len(model.prelude), len(model.prelude) + len(block.layers)
        self._prelude = self._arranged(layers[:recurrent], cache.views("prelude", 1))
        self._coda = self._arranged(layers[coda:], cache.views("coda", 1))
        deltas = [block.conditioning(loop)[1] for loop in range(num_loops)]
        self._deltas, self._memory = deltas, addresses(deltas[0])
        self._loops = [
            self._arranged(layers[recurrent:coda], cache.views("recurrent", 1, loop), own, loop)
            for loop, own in enumerate(deltas)
        ]

    def _arranged(
        self,
        layers: Sequence[DecodedLayer],
        views: Sequence["Cached"],
        deltas: Deltas = NO_DELTAS,
        loop: int = 0,
    ) -> list["PreparedLayer"]:
        cos = sin = None
        if self._angles is not None:
            cos, sin = self._angles.chunk(2, dim=-1)
        made = []
        for layer, view in zip(layers, views, strict=True):
            places = Places(
                kv=view.storage[None],
                column=0,
                first=self._first,
                writes=view.writes,
                mask=self._valid if bool(self._padding.any()) else None,
                cos=cos,
                sin=sin,
                loop=loop,
            )
            shape = (len(view.storage), self.model.width)
            out = view.storage.new_empty(shape, dtype=self._dtype)
            made.append(layer.prepared(out, places, deltas))
        return made

    def fits(self, cache: KVCache, num_loops: int, layers: Sequence[DecodedLayer]) -> bool:
        """Whether so many loops of these layers on this cache are what was arranged."""
        slots = [cache.slots(part) for part in ("prelude", "recurrent", "coda")]
        return (
            self.num_loops == num_loops
            and cache.policy is self._policy
            and cache.valid is self._valid
            and all(a is b for a, b in zip(slots, self._slots, strict=True))
            and all(a is b for a, b in zip(layers, self._layers, strict=True))
            and addresses(self.model.recurrent.conditioning(0)[1]) == self._memory
        )

    def __call__(
        self, tokens: TokenIds, rule: ExitRule, cache: KVCache
    ) -> tuple[NextLogits, LoopCounts]:
        """(logits [rows, vocab] after `tokens` [rows, 1], loops they ran); advances the cache."""
        model, block, column = self.model, self.model.recurrent, cache.length
        cache.place(tokens, None)  # checks that there is room
        self._arrange(column)
        x = model.embedded(tokens).to(self._dtype)
        x = block.prelude_norm(_run(self._prelude, x, column))
        state = block.initial_state.draw(x, self._positions, fresh=False)
        drive = block.injection.prepare(x)
        tracker = None if isinstance(rule, FixedExit) else step_tracker(rule, cache)
        embedding, loops = block.conditioning.embedding, 0
        active = torch.ones_like(tokens, dtype=torch.bool)
        for layers in self._loops:
            u, before = block.injection(state, drive), state
            if embedding is not None:
                u = u + embedding(loops).to(u.dtype)
            state = block.loop_norm(_run(layers, u, column))
            loops += 1
            if tracker is not None:
                output = block.readout_map(block.readout_norm(state))
                view = LoopStates(before, state, output)
                if not bool(tracker.update(view, active, loops - 1)):
                    break
        used = torch.full_like(tokens, loops)
        x = _run(self._coda, block.readout_map(block.readout_norm(state)), column)
        cache.hidden = model.norm(x).clone()
        logits = model.logits(cache.hidden)[:, 0]
        cache.end_loops(loops, used)
        cache.advance(1)
        return logits, used[:, 0]

    def _arrange(self, column: int) -> None:
        torch.sub(column, self._padding, out=self._positions)
        if self._table is not None and self._angles is not None:
            torch.index_select(self._table, 0, self._positions[:, 0], out=self._angles)
        if self._first is not None:
            self._first.fill_(max(0, column - self.model.attention.window + 1))


def _run(layers: Sequence["PreparedLayer"], x: Hidden, column: int) -> Hidden:
    """x [rows, 1, dim] through the layers; the result is overwritten by the next step."""
    x = x.contiguous()
    for layer in layers:
        x = layer(x, column)
    return x.view(-1, 1, x.shape[-1])


_STEPS: WeakKeyDictionary[KVCache, NativeStep] = WeakKeyDictionary()


def native_step(
    model: StepModel, cache: KVCache, num_loops: int, rule: ExitRule, contrast: Contrast
) -> NativeStep | None:
    """The step of the model on this cache, which has tokens; None if there is none."""
    last = cache.hidden
    if last is None or not few_rows_native.accepts(last, cache.slots("recurrent")[0]):
        return None
    if unsupported(rule, contrast) or not (cache.batch == 1 or isinstance(rule, FixedExit)):
        return None
    layers = native_layers(model)
    if layers is None:
        return None
    step = _STEPS.get(cache)
    if step is None or step.model is not model or not step.fits(cache, num_loops, layers):
        step = _STEPS[cache] = NativeStep(model, cache, num_loops, layers, last.dtype)
    return step


def native_layers(model: StepModel) -> list[DecodedLayer] | None:
    """The native form of every layer; None if one has none, or if more is to be done."""
    found: list[DecodedLayer] = []
    for part in (model.prelude, model.recurrent.layers, model.coda):
        layers = native_part(part)
        if layers is None:
            return None
        found += layers
    return found if loops_plainly(model.recurrent) else None


def native_part(part: Layers) -> list[DecodedLayer] | None:
    """The native form of the layers of one part; None if one has none."""
    if _has_hooks(part):
        return None
    found = []
    for layer in part:
        native = native_layer(cast("Block", layer))
        if native is None:
            return None
        found.append(native)
    return found


def loops_plainly(block: RecurrentBlock) -> bool:
    """Whether its loops are layers, injection and norm alone, for every row."""
    plain = block.halting is None and not block.record_norms and block.sync_num_loops is None
    return plain and not (_has_hooks(block) or _has_hooks(block.conditioning))


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
