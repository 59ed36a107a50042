"""The KV cache: preallocated, one slot per (layer, loop); policies share slots between loops.

A looped layer runs many times per token, so a layer cannot know when a token is finished. Only the
caller of the model advances the cache (`KVCache.advance`), after the whole forward pass.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from openmythos.config import require_int
from openmythos.nn.view import Cached


@dataclass(frozen=True, kw_only=True)
class ExactCache:
    """Every loop keeps keys and values of its own: cached decoding equals the full forward pass."""

    kind: Literal["exact"] = "exact"

    def slot(self, loop: int) -> int:
        return loop

    def writes(self, loop: int) -> bool:
        return True

    def last_writer(self, slot: int, num_loops: int) -> int:
        return slot


@dataclass(frozen=True, kw_only=True)
class LastLoopCache:
    """One slot, overwritten by each loop: queries see earlier tokens' K/V of their last loop."""

    kind: Literal["last"] = "last"

    def slot(self, loop: int) -> int:
        return 0

    def writes(self, loop: int) -> bool:
        return True

    def last_writer(self, slot: int, num_loops: int) -> int:
        return num_loops - 1


@dataclass(frozen=True, kw_only=True)
class FirstLoopCache:
    """One slot, written by the first loop: later loops project no keys or values."""

    kind: Literal["first"] = "first"

    def slot(self, loop: int) -> int:
        return 0

    def writes(self, loop: int) -> bool:
        return loop == 0

    def last_writer(self, slot: int, num_loops: int) -> int:
        return 0


@dataclass(frozen=True, kw_only=True)
class GroupedLoopCache:
    """`group` consecutive loops share a slot, each overwriting the one before it."""

    kind: Literal["grouped"] = "grouped"
    group: int = 2

    def __post_init__(self) -> None:
        require_int("group", self.group, minimum=1)

    def slot(self, loop: int) -> int:
        return loop // self.group

    def writes(self, loop: int) -> bool:
        return True

    def last_writer(self, slot: int, num_loops: int) -> int:
        return min((slot + 1) * self.group, num_loops) - 1


CachePolicy = ExactCache | LastLoopCache | FirstLoopCache | GroupedLoopCache


class KVCache:
    """Preallocated keys and values for a batch, and which columns are real tokens (`valid`).

    Storage: one slot per prelude and coda layer; per recurrent layer as many as the policy needs
    for `num_loops`; each slot is [batch, capacity, kv_width]. `length` columns are filled. Exit
    rules that read logits add one slot per coda layer and loop (`keep_probes`).
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
        shape = (batch, capacity, kv_width)

        slots = prefill.slot(num_loops - 1) + 1
        try:
            self._prelude = like.new_zeros(prelude, *shape)
            self._coda = like.new_zeros(coda, *shape)
            self._recurrent = [like.new_zeros(slots, *shape) for _ in range(recurrent)]
        except (RuntimeError, MemoryError):
            numbers = (prelude + coda + slots * recurrent) * batch * capacity * kv_width
            raise ValueError(
                f"cache: no room for {numbers * like.itemsize / 2**30:.1f} GiB (a batch of "
                f"{batch}, {capacity} tokens, {num_loops} loops)"
            ) from None
        # The coda's K/V for the state after each loop, for exit rules that read logits.
        self._probes: list[Tensor] = []
        self._probed = 0

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(t.nbytes for t in (self._prelude, self._coda, *self._recurrent, *self._probes))

    def prelude(self, layer: int, seq: int) -> Cached:
        """A prelude layer's view of the next `seq` tokens and all earlier ones."""
        return Cached(self._prelude[layer], self.length, seq)

    def coda(self, layer: int, seq: int) -> Cached:
        return Cached(self._coda[layer], self.length, seq)

    def probe(self, layer: int, seq: int, loop: int) -> Cached:
        """A coda layer's view for reading out the state after `loop`, for an exit rule."""
        return Cached(self._probes[layer][loop], self.length, seq)

    def recurrent(self, layer: int, seq: int, loop: int) -> Cached:
        """A recurrent layer's view in that loop."""
        storage = self._recurrent[layer][self.policy.slot(loop)]
        return Cached(storage, self.length, seq, self.policy.writes(loop))

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
        if not self._probes:
            shape = (self.num_loops, *self._coda.shape[1:])
            self._probes = [self._coda.new_zeros(shape) for _ in self._coda]

    def fill_probes(self, loops_run: int, seq: int) -> None:
        """Copy the coda's K/V of the last probed loop to the loops after `loops_run`."""
        end = self.length + seq
        for storage in self._probes:
            last = storage[loops_run - 1, :, self.length : end]
            storage[loops_run:, :, self.length : end] = last
        self._probed = end

    def fill_unrun_loops(self, loops_run: int, seq: int) -> None:
        """For the current tokens, copy the K/V of the last loop run to the loops not run."""
        source = self.policy.slot(loops_run - 1)
        end = self.length + seq
        for storage in self._recurrent:
            if source + 1 < storage.shape[0]:
                storage[source + 1 :, :, self.length : end] = storage[source, :, self.length : end]

    def advance(self, seq: int) -> None:
        """Count the `seq` columns of the last forward pass as filled."""
        self.length += seq

    def begin_decode(self) -> None:
        """Switch from the prefill to the decode policy; keep the K/V that the latter reads."""
        if self.policy == self._decode_policy:
            return
        old, new = self.policy, self._decode_policy
        writers = [
            new.last_writer(slot, self.num_loops)
            for slot in range(new.slot(self.num_loops - 1) + 1)
        ]
        index = torch.tensor([old.slot(loop) for loop in writers], device=self.valid.device)
        self._recurrent = [storage.index_select(0, index) for storage in self._recurrent]
        self.policy = new

    def note_exits(self, loops_used: Tensor) -> None:
        """Keep the largest of loops_used [batch, seq] over the real tokens of every sequence."""
        used = loops_used * self.valid[:, self.length : self.length + loops_used.shape[1]]
        self.exit_loop = torch.maximum(self.exit_loop, used.amax(dim=1))

    def mark_padding(self, attention_mask: Tensor) -> None:
        """Declare which of the columns about to be written are real tokens."""
        self.valid[:, self.length : self.length + attention_mask.shape[1]] = attention_mask
        self.padded = self.padded or not bool(attention_mask.all())

    def select_rows(self, rows: Tensor) -> None:
        """Reorder, repeat or drop sequences: row i becomes the present row rows[i]."""
        self._replace_storage(lambda x: x.index_select(1, rows))
        self.valid, self.exit_loop = self.valid[rows], self.exit_loop[rows]
        self.batch = len(rows)

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` tokens in all, if there is less."""
        more = capacity - self.capacity
        if more <= 0:
            return
        self._replace_storage(lambda x: F.pad(x, (0, 0, 0, more)))
        self.valid = F.pad(self.valid, (0, more), value=True)
        self.capacity = capacity

    def _replace_storage(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` to all keys and values, each [slots, batch, capacity, kv_width]."""
        self._prelude, self._coda = change(self._prelude), change(self._coda)
        self._recurrent = [change(storage) for storage in self._recurrent]
        self._probes = [change(storage) for storage in self._probes]

    def check_room(self, seq: int, batch: int) -> None:
        if batch != self.batch:
            raise ValueError(f"cache: was made for a batch of {self.batch}, not of {batch}")
        if self.length + seq > self.capacity:
            raise ValueError(
                f"cache: {self.length} + {seq} new tokens exceed its capacity of {self.capacity}"
            )
