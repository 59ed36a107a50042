"""The KV cache: preallocated, one slot per (layer, loop); policies share slots between loops.

A policy states the `slot` of each loop, numbered in the order of loops without gaps, and whether a
loop `overwrites` what an earlier one has written to the same slot.

A looped layer runs many times per token, so a layer cannot know when a token is finished. Only the
caller of the model advances the cache (`KVCache.advance`), after the whole forward pass.
"""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from openmythos.config import require_int
from openmythos.nn.layout import TokenLayout
from openmythos.nn.view import Cached
from openmythos.types import LoopsPerToken, Mask, TokenIds


@dataclass(frozen=True, kw_only=True)
class ExactCache:
    """Every loop keeps keys and values of its own: cached decoding equals the full forward pass."""

    kind: Literal["exact"] = "exact"
    overwrites: ClassVar[bool] = True

    def slot(self, loop: int) -> int:
        return loop


@dataclass(frozen=True, kw_only=True)
class LastLoopCache:
    """One slot, overwritten by each loop: queries see earlier tokens' K/V of their last loop."""

    kind: Literal["last"] = "last"
    overwrites: ClassVar[bool] = True

    def slot(self, loop: int) -> int:
        return 0


@dataclass(frozen=True, kw_only=True)
class FirstLoopCache:
    """One slot, written by the first loop: later loops project no keys or values."""

    kind: Literal["first"] = "first"
    overwrites: ClassVar[bool] = False

    def slot(self, loop: int) -> int:
        return 0


@dataclass(frozen=True, kw_only=True)
class GroupedLoopCache:
    """`group` consecutive loops share a slot, each overwriting the one before it."""

    kind: Literal["grouped"] = "grouped"
    overwrites: ClassVar[bool] = True
    group: int = 2

    def __post_init__(self) -> None:
        require_int("group", self.group, minimum=1)

    def slot(self, loop: int) -> int:
        return loop // self.group


CachePolicy = ExactCache | LastLoopCache | FirstLoopCache | GroupedLoopCache
# "probe": the coda, run after a loop for an exit rule that reads logits.
Part = Literal["prelude", "recurrent", "coda", "probe", "early"]


class KVCache:
    """Preallocated keys and values for a batch, and which columns are real tokens (`valid`).

    Storage: one slot per prelude and coda layer; per recurrent layer as many as the policy needs
    for `num_loops`; each slot is [batch, capacity, kv_width]. `length` columns are filled. Exit
    rules that read logits add one slot per coda layer and loop (`keep_probes`), a contrast with an
    early loop one per coda layer (`keep_early`).
    """

    def __init__(
        self,
        *,
        layers: tuple[int, int, int],
        kv_width: int,
        batch: int,
        capacity: int,
        num_loops: int,
        prefill: CachePolicy,
        decode: CachePolicy,
        like: Tensor,
    ) -> None:
        """`like` gives device and dtype; `layers` counts prelude, recurrent and coda layers."""
        self.layers = layers
        self.batch, self.capacity, self.num_loops = batch, capacity, num_loops
        self.policy: CachePolicy = prefill
        self._decode_policy: CachePolicy = decode
        self.length = 0
        self.padded = False
        self.valid = torch.ones(batch, capacity, dtype=torch.bool, device=like.device)
        # Most loops that any token of a sequence ran: with an exit rule of scope "prefix", a later
        # token must not stop earlier.
        self.exit_loop = torch.zeros(batch, dtype=torch.long, device=like.device)
        prelude, recurrent, coda = layers
        slots = {"prelude": 1, "recurrent": prefill.slot(num_loops - 1) + 1, "coda": 1}
        counts = {"prelude": prelude, "recurrent": recurrent, "coda": coda}
        shape = (batch, capacity, kv_width)
        try:
            self._storage = {
                part: [like.new_zeros(slots[part], *shape) for _ in range(count)]
                for part, count in counts.items()
            }
        except (RuntimeError, MemoryError):
            numbers = sum(slots[part] * counts[part] for part in slots) * math.prod(shape)
            raise ValueError(
                f"cache: no room for {numbers * like.itemsize / 2**30:.1f} GiB (a batch of "
                f"{batch}, {capacity} tokens, {num_loops} loops)"
            ) from None
        self._storage |= {"probe": [], "early": []}
        self.hidden: Tensor | None = None  # the last token's, [batch, 1, dim], for a latent step
        self._probed = 0
        self._early_loops = 0

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(slots.nbytes for layers in self._storage.values() for slots in layers)

    def check_loops(self, num_loops: int) -> None:
        """Raise a ValueError unless the cache has places for so many loops."""
        if not 1 <= num_loops <= self.num_loops:
            raise ValueError(
                f"num_loops = {num_loops}: the cache was made for at most {self.num_loops} loops"
            )

    def place(self, tokens: TokenIds, attention_mask: Mask | None) -> TokenLayout:
        """The layout of tokens [batch, seq] about to be written, whose padding is remembered.

        Raises a ValueError if they do not fit.
        """
        batch, seq = tokens.shape
        end = self.length + seq
        if batch != self.batch:
            raise ValueError(f"cache: was made for a batch of {self.batch}, not of {batch}")
        if end > self.capacity:
            raise ValueError(
                f"cache: {self.length} + {seq} new tokens exceed its capacity of {self.capacity}"
            )
        if attention_mask is not None:
            self.valid[:, self.length : end] = attention_mask
            self.padded = self.padded or not bool(attention_mask.all())
        valid = self.valid[:, :end] if self.padded else None
        return TokenLayout(seq, self.length, tokens.device, valid)

    def views(self, part: Part, seq: int, loop: int = 0) -> list[Cached]:
        """What each layer of a part sees in a loop: the next `seq` tokens and all before them."""
        slot, writes = loop, True
        if part == "recurrent":
            slot = self.policy.slot(loop)
            is_first = loop == 0 or self.policy.slot(loop - 1) != slot
            writes = self.policy.overwrites or is_first
        return [Cached(slots[slot], self.length, seq, writes) for slots in self._storage[part]]

    def slots(self, part: Part) -> list[Tensor]:
        """Keys and values of each layer of a part, [slots, batch, capacity, kv_width]."""
        return self._storage[part]

    def keep_probes(self) -> None:
        """Allocate keys and values of the coda for every loop, not only for the last.

        An exit rule computes a loop's logits with the coda. Without a cache the coda attends to
        all earlier tokens in their state after that loop. Cached decoding must match, so the cache
        keeps the coda's K/V of every loop.
        """
        if self._probed < self.length:
            raise ValueError(
                "exit_rule: reads the logits of every loop, so a cache must be filled under such a "
                "rule from its first token on"
            )
        if not self._storage["probe"]:
            self._storage["probe"] = [
                slots.new_zeros(self.num_loops, *slots.shape[1:]) for slots in self._storage["coda"]
            ]

    def keep_early(self, loops: int) -> None:
        """Allocate keys and values of the coda for the state after so many loops."""
        if self.length and loops != self._early_loops:
            raise ValueError(
                f"contrast: reads the logits after {loops} loops, so a cache must be filled under "
                "it from its first token on"
            )
        if not self._early_loops:
            self._early_loops = loops
            self._storage["early"] = [torch.zeros_like(slots) for slots in self._storage["coda"]]

    def fill_probes(self, loops_run: int, seq: int) -> None:
        """Copy the coda's K/V of the last probed loop to the loops after `loops_run`."""
        self._probed = self.length + seq
        for slots in self._storage["probe"]:
            new = slots[:, :, self.length : self._probed]
            new[loops_run:] = new[loops_run - 1]

    def end_loops(self, loops_run: int, loops_used: LoopsPerToken) -> None:
        """After the loops of a pass, of which the current tokens ran loops_used [batch, seq].

        Loops that were not run get the K/V of the last that was. `exit_loop` becomes the largest
        number of loops of the real tokens of every sequence.
        """
        new = slice(self.length, self.length + loops_used.shape[1])
        last = self.policy.slot(loops_run - 1)
        for slots in self._storage["recurrent"]:
            if last + 1 < len(slots):
                slots[last + 1 :, :, new] = slots[last, :, new]
        used = loops_used * self.valid[:, new]
        self.exit_loop = torch.maximum(self.exit_loop, used.amax(dim=1))

    def planes(self) -> Tensor:
        """All keys and values [planes, batch, length, kv_width].

        In order: prelude, coda, the coda after every loop (probes), recurrent; the last two by
        slot, then by layer.
        """
        parts = [self._storage[part] for part in ("prelude", "coda", "probe", "recurrent")]
        stacked = [torch.stack(layers, dim=1).flatten(0, 1) for layers in parts if layers]
        return torch.cat(stacked)[:, :, : self.length]

    def select_rows(self, rows: Tensor) -> None:
        """Reorder, repeat or drop sequences: row i becomes the present row rows[i]."""
        self._replace_storage(lambda x: x.index_select(1, rows))
        self.valid, self.exit_loop = self.valid[rows], self.exit_loop[rows]
        self.hidden = None if self.hidden is None else self.hidden[rows]
        self.batch = len(rows)

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` tokens in all, if there is less."""
        more = capacity - self.capacity
        if more <= 0:
            return
        self._replace_storage(lambda x: F.pad(x, (0, 0, 0, more)))
        self.valid = F.pad(self.valid, (0, more), value=True)
        self.capacity = capacity

    def emptied(self) -> "KVCache":
        """An empty cache in the same memory."""
        new = copy.copy(self)
        new._storage = dict(self._storage)
        for slots in itertools.chain(*self._storage.values()):
            slots.zero_()
        new.valid, new.exit_loop = torch.ones_like(self.valid), torch.zeros_like(self.exit_loop)
        new.length, new.padded, new.hidden = 0, False, None
        return new

    def _replace_storage(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` to all keys and values, each [slots, batch, capacity, kv_width]."""
        self._storage = {
            part: [change(slots) for slots in layers] for part, layers in self._storage.items()
        }

    def advance(self, seq: int) -> None:
        """Count the `seq` columns of the last forward pass as filled."""
        self.length += seq

    def begin_decode(self) -> None:
        """Switch from the prefill to the decode policy; keep the K/V that the latter reads."""
        old, new = self.policy, self._decode_policy
        if old == new:
            return
        # The last loop that writes a slot stays.
        writers: dict[int, int] = {}
        for loop in range(self.num_loops):
            if new.overwrites or new.slot(loop) not in writers:
                writers[new.slot(loop)] = loop
        index = torch.tensor(
            [old.slot(loop) for loop in writers.values()], device=self.valid.device
        )
        self._storage["recurrent"] = [
            slots.index_select(0, index) for slots in self._storage["recurrent"]
        ]
        self.policy = new
