"""The parts of a pass, one by one, on rows that are at different tokens and in different loops.

`OpenMythos.run` computes a pass of a batch that goes through all loops together; an engine goes
around it: a row's loops may be run beside any other row's. See `inference.runner`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from openmythos.inference.native_step import loops_plainly, native_layers, native_part
from openmythos.kernels import few_rows_native
from openmythos.model.inputs import ModelInputs
from openmythos.nn.cache import KVCache
from openmythos.nn.layout import AttentionContext, own_mask, rope_tables
from openmythos.nn.linear import NO_DELTAS, Deltas
from openmythos.nn.paged_layers import PagedLayers, can_arrange
from openmythos.nn.pages import Batch, Planes
from openmythos.nn.view import LayerView
from openmythos.recurrence.exit_rules import ExitRule
from openmythos.recurrence.state import LoopInputs, LoopState
from openmythos.types import Hidden, LoopCounts, LoopsPerToken, NextLogits, TokenIds

if TYPE_CHECKING:
    from openmythos.model.decoding import Decodable


class Stages:
    """A model's stages; see `inference.runner.StagedModel`."""

    def __init__(self, model: "Decodable") -> None:
        self.model = model
        c = model.config
        self.layers = (c.prelude_layers, c.recurrent_layers, c.coda_layers)
        self.kv_width = c.attention.kv_width(c.dim)
        self._prelude, self._block = model.prelude, model.recurrent
        self._parts = {
            "prelude": model.prelude,
            "recurrent": model.recurrent.layers,
            "coda": model.coda,
        }
        self.halts = self._block.halting is not None
        self._table: Tensor | None = None  # see `_rotary`
        self._kept: PagedLayers | None = None

    @property
    def most_rows(self) -> int:
        """Up to how many rows of one token the native kernel computes; 0: it does not."""
        like = self.like.new_empty(1, 1)
        if not few_rows_native.accepts(like, like):
            return 0
        return 0 if native_layers(self.model) is None else few_rows_native.MOST_ROWS

    @property
    def like(self) -> Tensor:
        """An empty tensor with the device and dtype of keys and values."""
        return self.model.embed.weight.new_empty(0)

    def prefill(
        self,
        tokens: TokenIds,
        *,
        num_loops: int,
        exit_rule: ExitRule,
        attention_mask: Tensor | None,
        cache: KVCache,
        every: bool,
    ) -> tuple[Tensor, LoopsPerToken]:
        """(logits, loops of all positions); the tokens are appended to the cache.

        Logits of the last position [batch, 1, vocab], or of `every` one.
        """
        model = self.model
        inputs = ModelInputs.decoding(model.config, tokens, attention_mask, num_loops, cache)
        recurrence, _ = model.run(inputs, exit_rule)
        logits = model.logits(model.hidden(recurrence.state, inputs, last_only=not every))
        cache.advance(tokens.shape[1])
        return logits, recurrence.loops_used

    def encode(self, planes: Planes) -> tuple[LoopState, LoopInputs]:
        """Embedding and prelude of a batch's tokens: the state before the first loop."""
        batch = planes.batch
        tokens = torch.tensor(batch.ids, device=batch.pool.storage.device)[:, None]
        x = self.model.embedded(tokens)
        layers = self._native("prelude", x, batch)
        if layers is None:
            x, _ = self._prelude(x, self._views(planes, self.layers[0]))
            return self._block.start(x, self._context(batch))
        x = layers.run("prelude", x, planes)
        context = AttentionContext(batch.position[:, None], None, None, None, is_causal=False)
        return self._block.start(x, context)

    def loop(
        self, state: LoopState, inputs: LoopInputs, loops: Sequence[int], planes: Planes
    ) -> LoopState:
        """One loop of all rows, each in its own, counted from 0."""
        batch, block = planes.batch, self._block
        own = torch.tensor(loops, device=state.hidden.device)
        loop = loops[0] if min(loops) == max(loops) else own
        deltas = self._deltas(own)
        layers = self._native("recurrent", state.hidden, batch, deltas)
        if layers is None:
            inputs = replace(inputs, context=self._context(batch))
            views = planes.views(self.layers[1])
            return block.step(state, inputs, loop, views)[0]
        u, embedding = block.injection(state.hidden, inputs.drive), block.conditioning.embedding
        if embedding is not None:
            u = u + embedding(loop).to(u.dtype)
        hidden = layers.run("recurrent", u, planes, deltas, loops)
        return state._replace(hidden=block.loop_norm(hidden))

    def output(self, state: LoopState) -> Hidden:
        """The coda's input if the loops end here."""
        return self._block.readout(state)[0]

    def read_out(
        self, output: Hidden, planes: Planes, only: Sequence[int] | None = None
    ) -> NextLogits:
        """Coda, norm and head of `output` [rows, 1, dim]: logits [rows, vocab], of some `only`."""
        model, layers = self.model, self._native("coda", output, planes.batch)
        if layers is None:
            x, _ = model.coda(output, self._views(planes, self.layers[2]))
        else:
            x = layers.run("coda", output, planes)
        x = x if only is None else x[list(only)]
        return model.logits(model.norm(x))[:, 0]

    # By the layers' modules

    def _views(self, planes: Planes, layers: int) -> list[LayerView]:
        context = self._context(planes.batch)
        return [LayerView(context, kv) for kv in planes.views(layers)]

    def _context(self, batch: Batch) -> AttentionContext:
        """For the new tokens of a batch; kept there."""
        if batch.context is None:
            batch.context = self._made_context(batch)
        return batch.context

    def _made_context(self, batch: Batch) -> AttentionContext:
        positions = batch.position[:, None]
        tokens = torch.tensor(batch.ids, device=positions.device)[:, None]
        mask, window = None, self.model.config.attention.window
        total, cos, sin = max(batch.positions) + 1, None, None
        rotary = self._rotary(total)
        if rotary is not None:
            cos, sin = rotary[positions][:, None].chunk(2, dim=-1)
        if min(batch.positions) + 1 < total or 0 < window < total:
            keys = torch.arange(total, device=positions.device)
            mask = own_mask(positions[:, 0], keys, window)
        return AttentionContext(
            positions, cos, sin, mask, is_causal=False, window=window, packed=True, tokens=tokens
        )

    def _rotary(self, total: int) -> Tensor | None:
        """cos and sin [positions, 2 * rotary_dim] of at least `total` positions; None without."""
        attention, table = self.model.config.attention, self._table
        rotary = attention.rotary_dim(self.model.config.dim)
        if rotary and (table is None or len(table) < total):
            every = torch.arange(2 * total, device=self.like.device)
            tables = rope_tables(every, rotary, attention.rope_base, attention.rope_scaling)
            self._table = table = torch.cat(tables, dim=-1)
        return table

    # By native layers

    def _native(
        self, part: str, x: Hidden, batch: Batch, deltas: Deltas | None = None
    ) -> PagedLayers | None:
        """The native layers, arranged for the batch's pages; None if those of the part are not.

        `deltas`: those of each row, if they are to be computed with.
        """
        if not few_rows_native.accepts(x, batch.pool.storage):
            return None
        found = native_part(self._parts[part])
        plain = loops_plainly(self._block) and (deltas is None or can_arrange(deltas))
        if found is None or not plain:
            return None
        rotary, kept = self._rotary(max(batch.positions) + 1), self._kept
        fits = kept is not None and kept.fits(part, found, batch, rotary, x.dtype, deltas)
        if not fits:
            kept = self._kept = self._arranged(batch, rotary, x.dtype)
        return kept

    def _arranged(
        self, batch: Batch, rotary: Tensor | None, dtype: torch.dtype
    ) -> PagedLayers | None:
        parts = {name: native_part(layers) for name, layers in self._parts.items()}
        deltas = self._deltas(batch.position.new_zeros(1))
        native = {name: layers for name, layers in parts.items() if layers is not None}
        if len(native) < len(parts) or not can_arrange(deltas):
            return None
        return PagedLayers(
            native,
            batch.pool,
            batch.tables,
            width=self.model.config.dim,
            dtype=dtype,
            rotary=rotary,
            window=self.model.config.attention.window,
            deltas=deltas,
        )

    def _deltas(self, loops: LoopCounts) -> Deltas:
        """Those of rows in these loops."""
        lora = self._block.conditioning.lora
        return NO_DELTAS if lora is None else lora(loops)
