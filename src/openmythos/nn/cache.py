"""Keys and values of earlier tokens: preallocated, one slot per (layer, loop), shared on request.

A looped layer runs many times per token, so a layer cannot know when a token is finished. Only the
caller of the model advances the cache (`KVCache.advance`), after the whole forward pass.
"""

from dataclasses import dataclass
from typing import Literal

import torch
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
    """One slot, overwritten by each loop: earlier tokens are seen as their last loop left them."""

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
    """Preallocated keys and values for a batch, with the validity and position of every column.

    Storage: per prelude and coda layer one slot, per recurrent layer as many as the policy needs
    for `num_loops`; each slot is [batch, capacity, kv_width]. `length` columns are filled. Exit
    rules that read logits add, per coda layer, one slot for every loop (`keep_probes`).
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
        # The loop in which the last of a sequence's tokens stopped: an exit rule that judges the
        # whole prefix must not leave earlier at a later token.
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
        # What coda layers made of each loop's state, for exit rules that read logits.
        self._probes: list[Tensor] = []
        self._probed = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values held."""
        return sum(t.nbytes for t in (self._prelude, self._coda, *self._recurrent, *self._probes))

    def prelude(self, layer: int, seq: int) -> Cached:
        """A prelude layer's view of the next `seq` tokens and all earlier ones."""
        return Cached(self._prelude[layer], self.length, seq)

    def coda(self, layer: int, seq: int) -> Cached:
        return Cached(self._coda[layer], self.length, seq)

    def probe(self, layer: int, seq: int, loop: int) -> Cached:
        """A coda layer's view where it reads the state after `loop`, for an exit rule."""
        return Cached(self._probes[layer][loop], self.length, seq)

    def recurrent(self, layer: int, seq: int, loop: int) -> Cached:
        """A recurrent layer's view in that loop."""
        storage = self._recurrent[layer][self.policy.slot(loop)]
        return Cached(storage, self.length, seq, self.policy.writes(loop))

    def keep_probes(self) -> None:
        """Keep keys and values of the coda for every loop, not only for the last.

        An exit rule reads a loop's logits through the coda. Without a cache the coda then sees all
        earlier tokens in their state after that loop; for a cache to give the same, it must hold
        what the coda made of that state.
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
        """Give the loops beyond the `loops_run` that were probed what the last of these has."""
        end = self.length + seq
        for storage in self._probes:
            last = storage[loops_run - 1, :, self.length : end]
            storage[loops_run:, :, self.length : end] = last
        self._probed = end

    def fill_unrun_loops(self, loops_run: int, seq: int) -> None:
        """Give the loops that were not run for the current tokens the last run loop's K/V."""
        source = self.policy.slot(loops_run - 1)
        end = self.length + seq
        for storage in self._recurrent:
            if source + 1 < storage.shape[0]:
                storage[source + 1 :, :, self.length : end] = storage[source, :, self.length : end]

    def advance(self, seq: int) -> None:
        """Declare the `seq` columns of the last forward pass final."""
        self.length += seq

    def begin_decode(self) -> None:
        """Change from the prefill policy to the decode policy, keeping what the latter reads."""
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

    def check_room(self, seq: int, batch: int) -> None:
        if batch != self.batch:
            raise ValueError(f"cache: was made for a batch of {self.batch}, not of {batch}")
        if self.length + seq > self.capacity:
            raise ValueError(
                f"cache: {self.length} + {seq} new tokens exceed its capacity of {self.capacity}"
            )
