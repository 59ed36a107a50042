"""Contrastive decoding: enlarge what the later loops changed where the model is unsure."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from openmythos.config import require, require_number
from openmythos.types import NextLogits


@dataclass(frozen=True, kw_only=True)
class NoContrast:
    """The logits after the last loop as they are."""

    kind: Literal["none"] = "none"

    def early_loops(self, num_loops: int) -> int:
        """0: no logits of an earlier loop are needed."""
        return 0

    def adjusted(self, logits: NextLogits, early: NextLogits) -> NextLogits:
        return logits


@dataclass(frozen=True, kw_only=True)
class LoopContrast:
    """LoopCD (arXiv 2610.02185), for any model: z = z_T + w (z_T - z_early).

    w = cap (1 - (p_1 - p_2)), with p_1 and p_2 the two largest probabilities after the last loop.
    `early` >= 1 is the number of loops after which z_early is read out, below 1 a share of
    num_loops. A position that stopped before that many loops is not changed.
    """

    kind: Literal["loops"] = "loops"
    cap: float = 1.0
    early: float = 0.25

    def __post_init__(self) -> None:
        require_number("cap", self.cap, above=0, at_most=1e3)
        require_number("early", self.early, above=0)
        whole = self.early < 1 or float(self.early).is_integer()
        require(whole, "early", self.early, "must be a whole number of loops, or below 1")

    def early_loops(self, num_loops: int) -> int:
        """The loops after which z_early is read out; a ConfigError unless fewer than num_loops."""
        loops = int(self.early) if self.early >= 1 else max(1, round(self.early * num_loops))
        allowed = f"gives {loops} early loops, which must be fewer than num_loops = {num_loops}"
        require(loops < num_loops, "sampling.contrast.early", self.early, allowed)
        return loops

    def adjusted(self, logits: NextLogits, early: NextLogits) -> NextLogits:
        """fp32 logits [..., vocab] from those after the last loop and after the early one."""
        logits = logits.float()
        return logits + self.weight(logits)[..., None] * (logits - early.float())

    def weight(self, logits: Tensor) -> Tensor:
        """w [...] of logits [..., vocab]: near `cap` where the two likeliest tokens are close."""
        first, second = logits.softmax(dim=-1).topk(2, dim=-1).values.unbind(dim=-1)
        return self.cap * (1 - (first - second))


Contrast = NoContrast | LoopContrast
