"""Mixtures of data sources: which source a sample comes from, as a function of its index."""

from collections.abc import Sequence

import numpy as np

from openmythos.config import require, require_number

_BITS = 48  # shares are integers in units of 2^-48, so that the arithmetic is exact


class Mixture:
    """Assigns samples 0, 1, 2, ... to sources in proportion to their weights.

    The first source has share w and takes sample s if floor((s + 1) w + u) > floor(s w + u), with
    u in [0, 1) drawn from the seed; before sample s it has taken floor(s w + u) samples. The
    remaining samples are renumbered and assigned to the other sources in the same way. Of any n
    consecutive samples a source gets n w, with an error of at most the number of sources;
    independent draws would be off by about sqrt(n). Earlier samples need not be counted one by one.
    """

    def __init__(self, weights: Sequence[int | float], seed: int) -> None:
        require(len(weights) > 0, "weights", list(weights), "must be at least one")
        for weight in weights:
            require_number("weights", weight, above=0, below=float("inf"))
        shares = [
            round(weight / sum(weights[number:]) * (1 << _BITS))
            for number, weight in enumerate(weights[:-1])
        ]
        # Differs from the seeds that `Loader` uses for epochs.
        random = np.random.default_rng((seed, len(weights), _BITS))
        phases = random.integers(1 << _BITS, size=len(shares)).tolist()
        self._splits = list(zip(shares, phases, strict=True))

    def __len__(self) -> int:
        return len(self._splits) + 1

    def place(self, sample: int) -> tuple[int, int]:
        """(source of a sample, number of earlier samples from that source)."""
        for number, (share, phase) in enumerate(self._splits):
            taken = (sample * share + phase) >> _BITS
            if ((sample + 1) * share + phase) >> _BITS > taken:
                return number, taken
            sample -= taken
        return len(self._splits), sample
