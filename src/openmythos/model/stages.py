"""The parts of a pass, one by one, on rows that are at different tokens and in different loops.

`OpenMythos.run` computes a pass of a batch that goes through all loops together; an engine goes
around it: a row's loops may be run beside any other row's. See `inference.runner`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from openmythos.kernels import few_rows_native
from openmythos.model.inputs import ModelInputs
from openmythos.nn.block import Block
from openmythos.nn.cache import KVCache
from openmythos.nn.few_rows import native_layer
from openmythos.nn.layout import AttentionContext, own_mask, rope_tables
from openmythos.nn.view import KVView, LayerView
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
        self.halts = self._block.halting is not None
        self._rotary: tuple[Tensor, Tensor] | None = None  # of the first positions

    @property
    def most_rows(self) -> int:
        """Up to how many rows of one token the native kernel computes; 0: it does not."""
        like = self.like.new_empty(1, 1)
        layers = (*self._prelude, *self._block.layers, *self.model.coda)
        if not few_rows_native.accepts(like, like):
            return 0
        native = all(native_layer(cast("Block", layer)) is not None for layer in layers)
        return few_rows_native.MOST_ROWS if native else 0

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

    def context(self, tokens: TokenIds, lengths: Sequence[int]) -> AttentionContext:
        """For one new token per row [rows, 1], after `lengths` earlier ones each."""
        positions = torch.tensor(lengths, device=tokens.device)[:, None]
        mask, window, total = None, self.model.config.attention.window, max(lengths) + 1
        cos, sin = self._rotated(positions, total)
        if min(lengths) + 1 < total or 0 < window < total:
            keys = torch.arange(total, device=tokens.device)
            mask = own_mask(positions[:, 0], keys, window)
        return AttentionContext(
            positions, cos, sin, mask, is_causal=False, window=window, packed=True, tokens=tokens
        )

    def _rotated(self, positions: Tensor, total: int) -> tuple[Tensor | None, Tensor | None]:
        """Rotary tables [rows, 1, 1, rotary_dim] of positions [rows, 1] below `total`."""
        attention, tables = self.model.config.attention, self._rotary
        rotary = attention.rotary_dim(self.model.config.dim)
        if not rotary:
            return None, None
        if tables is None or len(tables[0]) < total:
            every = torch.arange(2 * total, device=positions.device)
            tables = rope_tables(every, rotary, attention.rope_base, attention.rope_scaling)
            self._rotary = tables
        cos, sin = (table[positions][:, None] for table in tables)
        return cos, sin

    def encode(
        self, context: AttentionContext, views: Sequence[KVView]
    ) -> tuple[LoopState, LoopInputs]:
        """Embedding and prelude of the context's tokens: the state before the first loop."""
        assert context.tokens is not None
        x = self.model.embedded(context.tokens)
        x, _ = self._prelude(x, [LayerView(context, kv) for kv in views])
        return self._block.start(x, context)

    def loop(
        self,
        state: LoopState,
        inputs: LoopInputs,
        loop: int | LoopCounts,
        views: Sequence[KVView],
    ) -> LoopState:
        """One loop of all rows, counted from 0, each in its own."""
        return self._block.step(state, inputs, loop, views)[0]

    def output(self, state: LoopState) -> Hidden:
        """The coda's input if the loops end here."""
        return self._block.readout(state)[0]

    def read_out(
        self,
        output: Hidden,
        context: AttentionContext,
        views: Sequence[KVView],
        only: Sequence[int] | None = None,
    ) -> NextLogits:
        """Coda, norm and head of `output` [rows, 1, dim]: logits [rows, vocab], of some `only`."""
        model = self.model
        x, _ = model.coda(output, [LayerView(context, kv) for kv in views])
        x = x if only is None else x[list(only)]
        return model.logits(model.norm(x))[:, 0]
