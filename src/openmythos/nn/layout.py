"""Token positions, rotary tables and attention masks."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from openmythos.kernels.attention import attention
from openmythos.nn.rope_scaling import NO_SCALING, RopeFrequencies


@dataclass(frozen=True)
class AttentionContext:
    """Positions and masks of one forward pass: computed once, used by every layer in every loop."""

    positions: Tensor  # [batch or 1, seq]
    cos: Tensor | None  # [batch or 1, 1, seq, rotary_dim]; None without rotary positions
    sin: Tensor | None
    mask: Tensor | None  # [batch or 1, 1, seq, total], True = may attend
    is_causal: bool  # the mask is the plain causal one and need not be built
    window: int = 0  # size of the mask's sliding window, in keys; 0: unlimited
    packed: bool = False  # the queries are not at the last positions of the keys
    tokens: Tensor | None = None  # [batch or 1, seq] ids, for value embeddings

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """softmax(scale q k^T) v on [batch, heads, seq, head_dim]; keys may have fewer heads."""
        return attention(
            query,
            key,
            value,
            mask=self.mask,
            is_causal=self.is_causal,
            window=self.window,
            packed=self.packed,
            scale=scale,
        )

    def select(self, rows: Tensor | slice) -> "AttentionContext":
        """The context of these rows of the batch, in this order."""
        # Tensors with batch size 1 are shared by all rows.
        positions = self.positions if len(self.positions) == 1 else self.positions[rows]
        cos, sin, mask, tokens = (
            x if x is None or len(x) == 1 else x[rows]
            for x in (self.cos, self.sin, self.mask, self.tokens)
        )
        window, packed = self.window, self.packed
        return AttentionContext(positions, cos, sin, mask, self.is_causal, window, packed, tokens)

    def last(self) -> "AttentionContext":
        """The context of the last query of every row."""
        cos, sin, mask = (
            None if x is None else x[:, :, -1:] for x in (self.cos, self.sin, self.mask)
        )
        return AttentionContext(self.positions[:, -1:], cos, sin, mask, False, self.window)

    def pick(self, columns: Tensor, total: int) -> "AttentionContext":
        """The context of the queries at `columns` [batch, picked] of each row, on `total` keys."""
        batch, picked = columns.shape

        def along(x: Tensor) -> Tensor:
            index = columns[:, None, :, None].expand(-1, -1, -1, x.shape[-1])
            return x.expand(batch, -1, -1, -1).gather(2, index)

        positions = self.positions.expand(batch, -1).gather(1, columns)
        tokens = None if self.tokens is None else self.tokens.expand(batch, -1).gather(1, columns)
        cos, sin = (None if x is None else along(x) for x in (self.cos, self.sin))
        if self.mask is not None:
            mask = along(self.mask)
        elif self.is_causal:
            mask = torch.arange(total, device=columns.device) <= columns[:, None, :, None]
        else:
            mask = columns.new_ones(batch, 1, picked, total, dtype=torch.bool)
        return AttentionContext(positions, cos, sin, mask, False, self.window, True, tokens)


@dataclass(frozen=True)
class TokenLayout:
    """A forward pass's tokens: columns [start, start + seq) of total = start + seq keys.

    `valid` [batch, total] is False at padding, `documents` [batch, total] numbers the packed
    documents of a row; None means all valid, one document.
    """

    seq: int
    start: int
    device: torch.device
    valid: Tensor | None = None
    documents: Tensor | None = None

    def positions(self) -> Tensor:
        """Position of each token in its document, padding not counted, [batch or 1, seq]."""
        if self.documents is not None:
            index = torch.arange(self.seq, device=self.device).expand_as(self.documents)
            begins = self.documents.diff(dim=1, prepend=self.documents[:, :1]) != 0
            return index - (index * begins).cummax(dim=1).values
        if self.valid is None:
            return torch.arange(self.start, self.start + self.seq, device=self.device)[None]
        return (self.valid.long().cumsum(1) - 1).clamp_min(0)[:, self.start :]

    def mask(self, window: int) -> tuple[Tensor | None, bool]:
        """(mask, is_causal) for a sliding window of `window` keys (0: unlimited)."""
        total = self.start + self.seq
        windowed = 0 < window < total
        if self.valid is None and self.documents is None and not windowed:
            if self.seq == 1:
                return None, False
            if self.start == 0:
                return None, True
        query = torch.arange(self.start, total, device=self.device)[:, None]
        key = torch.arange(total, device=self.device)[None, :]
        allowed = (key <= query)[None]
        if windowed:
            allowed = allowed & (key > query - window)
        if self.documents is not None:
            allowed = allowed & (self.documents[:, self.start :, None] == self.documents[:, None])
        if self.valid is not None:
            # Padding attends to itself: a softmax over no keys would be nan.
            allowed = (allowed & self.valid[:, None]) | (key == query)
        return allowed[:, None], False


class AttentionPositions(Protocol):
    """What the config of an attention layer states about positions."""

    @property
    def rope_base(self) -> float: ...
    @property
    def rope_scaling(self) -> RopeFrequencies: ...
    @property
    def window(self) -> int:
        """How many of the last keys a query sees; 0: all."""

    def rotary_dim(self, dim: int) -> int:
        """Features of a head that are rotated in a model of width `dim`; 0: no rotary tables."""


def attention_context(
    layout: TokenLayout, attention: AttentionPositions, dim: int, tokens: Tensor | None = None
) -> AttentionContext:
    """Rotary tables and mask for `layout`, of an attention layer in a model of width `dim`."""
    positions, rotary_dim, window = layout.positions(), attention.rotary_dim(dim), attention.window
    mask, is_causal = layout.mask(window)
    cos = sin = None
    if rotary_dim:
        cos, sin = rope_tables(
            positions[:, None], rotary_dim, attention.rope_base, attention.rope_scaling
        )
    return AttentionContext(positions, cos, sin, mask, is_causal, window, tokens=tokens)


def own_mask(columns: Tensor, keys: Tensor, window: int) -> Tensor:
    """Which of the columns `keys` [total] one token per row, in `columns` [rows], may attend to.

    [rows, 1, 1, total]; a sliding window of `window` keys (0: unlimited).
    """
    own = columns[:, None]
    seen = keys <= own
    if window:
        seen = seen & (keys > own - window)
    return seen[:, None, None]


def rope_tables(
    positions: Tensor, rotary_dim: int, base: float, scaling: RopeFrequencies = NO_SCALING
) -> tuple[Tensor, Tensor]:
    """cos and signed sin of angle_i = position * frequency_i, [*positions.shape, rotary_dim] fp32.

    cos = [cos | cos],  sin = [-sin | sin]

    Real tables rather than complex numbers: complex buffers lose their imaginary part under
    `.to(dtype)` and make torch.compile recompile. Computed in every forward pass, so that no
    checkpoint depends on a maximum length.
    """
    frequencies = scaling.frequencies(rotary_dim, base, positions.device)
    angle = positions.to(torch.float32).unsqueeze(-1) * frequencies
    cos, sin = angle.cos(), angle.sin()
    if scaling.amplitude != 1:
        cos, sin = cos * scaling.amplitude, sin * scaling.amplitude
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
