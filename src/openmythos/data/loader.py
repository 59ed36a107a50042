"""Batches from token shards, for training and for evaluation.

Documents are packed: windows are cut from the token stream without regard to documents. A batch
says which document each token belongs to, so that attention can be masked between documents.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from openmythos.config import ConfigError, require
from openmythos.data.mixture import Mixture
from openmythos.data.shards import TokenShards
from openmythos.types import Mask, NextLogits, PerToken, TokenIds


@dataclass(frozen=True)
class Batch:
    """Token ids; ``targets`` are the tokens shifted by one.

    ``documents`` numbers the documents within a row: 0 at the start, 1 more at every bos.
    ``latents`` marks positions whose input is the last hidden state (see `model.latents`).
    """

    tokens: TokenIds
    targets: TokenIds
    documents: TokenIds
    latents: Mask | None = field(default=None, kw_only=True)

    def to(self, device: torch.device) -> Self:
        """The same batch on a device."""
        moved = {name: x.to(device) for name, x in vars(self).items() if x is not None}
        return replace(self, **moved)


@dataclass(frozen=True)
class EvaluationBatch(Batch):
    """``weights`` is 1 where a target counts, 0 where it is context or padding."""

    weights: PerToken


@runtime_checkable
class BatchSource(Protocol):
    """What the trainer reads. A batch depends only on (seed, step, rank) and `state`.

    Text has no state; the state of a task is its curriculum's progress. To resume, `load` the state
    and ask for the next step.
    """

    seq_len: int  # tokens of the longest row
    vocab_size: int

    def batch(self, step: int) -> Batch:
        """This rank's rows of the batch of a step; steps count from 0."""
        ...

    def loops(self, step: int) -> int | None:
        """Number of loops for all rows of a step; None: sample it from `train.loops`."""
        return None

    def restarts(self, step: int) -> bool:
        """Whether the optimizer forgets its state before this step: another task begins."""
        return False

    def learned(self, step: int, last_logits: Callable[[TokenIds], NextLogits]) -> None:
        """Called after every step, on all ranks.

        `last_logits` returns the model's logits at the last position [batch, vocab] of tokens
        [batch, seq], with the loops of the step. Either all ranks call it or none.
        """
        return None

    def metrics(self) -> dict[str, float]:
        """Numbers for metrics.jsonl."""
        return {}

    def state(self) -> dict[str, Any]:
        """Plain data, for a checkpoint."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        return None


class Loader(BatchSource):
    """Windows of seq_len tokens in random order, a pure function of (seed, step, rank).

    Several sources are interleaved by ``Mixture`` according to ``weights`` (default: in proportion
    to their numbers of windows). An epoch of a source reads each of its windows once. The order of
    the windows and the offset of the first one depend on seed, epoch and the index of the source.
    Batches may cross epochs. ``batch_size`` is the global batch size: all ranks together read what
    one rank would read. To resume, ask for the next step.
    """

    def __init__(
        self,
        shards: TokenShards | Sequence[TokenShards],
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        weights: Sequence[int | float] = (),
    ) -> None:
        fits = batch_size % world_size == 0
        require(fits, "batch_size", batch_size, f"must divide by world_size = {world_size}")
        streams = [shards] if isinstance(shards, TokenShards) else list(shards)
        if any(stream.index.tokenizer != streams[0].index.tokenizer for stream in streams):
            raise ConfigError("the sources were written with different tokenizers")
        self._sources = [
            _Source(stream, seq_len, seed, number) for number, stream in enumerate(streams)
        ]
        self._bos_id = streams[0].bos_id
        self.seq_len, self.vocab_size = seq_len, streams[0].index.vocab_size
        self._batch_size = batch_size
        self._rows = range(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self.windows_per_epoch = tuple(source.windows_per_epoch for source in self._sources)
        self._mixture = Mixture(weights or self.windows_per_epoch, seed)
        given = len(self._mixture) == len(streams)
        require(given, "weights", list(weights), f"must be {len(streams)}, one for each source")

    def batch(self, step: int) -> Batch:
        places = [self._mixture.place(step * self._batch_size + row) for row in self._rows]
        windows = [self._sources[number].window(earlier) for number, earlier in places]
        return Batch(*_split(np.stack(windows), self._bos_id))


class _Source:
    """The windows of one token stream, shuffled anew in every epoch; epochs count from 0."""

    def __init__(self, shards: TokenShards, seq_len: int, seed: int, number: int) -> None:
        if len(shards) < seq_len + 1:
            raise ConfigError(
                f"the corpus has {len(shards)} tokens, seq_len = {seq_len} needs {seq_len + 1}"
            )
        self._shards = shards
        self._seq_len = seq_len
        self._seed, self._number = seed, number
        # One window fewer than would fit, so that every epoch can start at a random offset.
        self.windows_per_epoch = max(1, (len(shards) - seq_len) // seq_len)
        self._starts = lru_cache(maxsize=1)(self._window_starts)

    def window(self, sample: int) -> NDArray[np.int64]:
        """The window's tokens, [seq_len + 1]."""
        start = self.start(sample)
        return self._shards.read(start, start + self._seq_len + 1)

    def start(self, sample: int) -> int:
        """Position of the window's first token in the stream."""
        epoch, number = divmod(sample, self.windows_per_epoch)
        return int(self._starts(epoch)[number])

    def _window_starts(self, epoch: int) -> NDArray[np.int64]:
        own = (self._number,) if self._number else ()
        random = np.random.default_rng((self._seed, epoch, *own))
        # A random offset up to all remaining tokens, so that the last tokens are read too.
        spare = len(self._shards) - 1 - self.windows_per_epoch * self._seq_len
        offset = random.integers(spare, endpoint=True)
        return offset + self._seq_len * random.permutation(self.windows_per_epoch)


def evaluation_windows(
    shards: TokenShards, seq_len: int, *, batch_size: int = 8
) -> Iterator[EvaluationBatch]:
    """Batches that score every token but the first exactly once (weight 1).

    Windows do not overlap; the last one is padded.
    """
    last = len(shards) - 1
    if last < 1:
        raise ConfigError(f"the held-out text has {len(shards)} tokens, evaluation needs 2")
    starts = range(0, last, seq_len)
    for first in range(0, len(starts), batch_size):
        rows = starts[first : first + batch_size]
        windows = np.zeros((len(rows), seq_len + 1), dtype=np.int64)
        weights = np.zeros((len(rows), seq_len), dtype=np.float32)
        for row, start in enumerate(rows):
            size = min(seq_len, last - start)
            windows[row, : size + 1] = shards.read(start, start + size + 1)
            weights[row, :size] = 1
        yield EvaluationBatch(*_split(windows, shards.bos_id), torch.from_numpy(weights))


def _split(
    windows: NDArray[np.int64], bos_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens, targets, documents), [rows, seq_len] each, of windows [rows, seq_len + 1]."""
    # Copies: with .contiguous() tokens and targets of a single row would share memory.
    tokens, targets = torch.tensor(windows[:, :-1]), torch.tensor(windows[:, 1:])
    counted = (tokens == bos_id).cumsum(1)
    return tokens, targets, counted - counted[:, :1]
