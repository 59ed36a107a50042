"""Guards against loss spikes and losses that are not finite."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from openmythos.config import require_int, require_number

# Standard deviation / median absolute deviation of a normal distribution.
_SIGMA_PER_MAD = 1.4826


@dataclass(frozen=True, kw_only=True)
class NoSpikes:
    """Ignores loss spikes."""

    kind: Literal["none"] = "none"
    window: ClassVar[int] = 0  # number of earlier losses needed
    at_most: ClassVar[int] = 0

    def is_spike(self, recent: Sequence[float], loss: float) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """After a loss spike, continues from the newest checkpoint with other data.

    A spike is a loss `deviations` standard deviations above the median of the last `window` steps.
    The standard deviation is estimated from the median absolute deviation. PaLM (arXiv 2204.02311,
    5.1) did the same by hand. After `at_most` rollbacks, spikes are ignored.
    """

    kind: Literal["rollback"] = "rollback"
    window: int = 100
    deviations: float = 8.0
    at_most: int = 10

    def __post_init__(self) -> None:
        require_int("window", self.window, minimum=3)
        require_number("deviations", self.deviations, above=0)
        require_int("at_most", self.at_most, minimum=1)

    def is_spike(self, recent: Sequence[float], loss: float) -> bool:
        """Whether a loss is a spike; False until there are `window` losses before it."""
        if len(recent) < self.window:
            return False
        median = statistics.median(recent)
        spread = statistics.median(abs(x - median) for x in recent)
        return loss > median + self.deviations * _SIGMA_PER_MAD * spread


Spikes = NoSpikes | Rollback


class Divergence:
    """Watches for steps whose loss or gradient is not finite, which change no weights.

    `since` is the first step of the current series of them; None: the last step was finite.
    """

    def __init__(self) -> None:
        self.since: int | None = None
        self._warned = False

    def saw(self, step: int, *values: float) -> str:
        """A warning at the first such step, else nothing."""
        if all(map(math.isfinite, values)):
            self.since = None
            return ""
        self.since = step if self.since is None else self.since
        warned, self._warned = self._warned, True
        warning = f"step {step}: the loss or its gradient is not finite, so it changes no weight"
        return "" if warned else f"{warning}; lower train.optimizer.lr if that goes on"

    def check(self) -> None:
        """Raise a FloatingPointError if the last step was not finite."""
        if self.since is not None:
            advice = "later steps changed nothing; train again with a lower train.optimizer.lr"
            raise FloatingPointError(f"loss not finite since step {self.since}: {advice}")
