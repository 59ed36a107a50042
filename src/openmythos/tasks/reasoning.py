"""What stands between a question and its answer: nothing, written steps, latents or pauses.

A problem of h hops gets h positions of thought behind the question, and is answered at the last.
A curriculum (Coconut, arXiv 2412.06769) starts from written steps: at stage s the first s of them
are replaced by blanks, and only what follows the blanks is learned.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from openmythos.config import require_number
from openmythos.tasks.batch import IGNORE, TaskBatch
from openmythos.types import TokenIds


@dataclass(frozen=True, kw_only=True)
class NoThoughts:
    """The answer follows the question."""

    kind: Literal["none"] = "none"

    def stage(self, progress: float) -> int:
        """How many steps are blanks after a share `progress` of the training."""
        return 0

    def written(self, question: TaskBatch, steps: Tensor, stage: int, blank: int) -> TaskBatch:
        """The problems with the right steps [batch, hops], the last of which is the answer."""
        return question

    def asked(self, tokens: TokenIds, hops: int, blank: int) -> TokenIds:
        """What is given of a problem at inference."""
        return tokens

    def latent_steps(self, hops: int) -> int:
        """How many latent steps follow it."""
        return 0

    def new_tokens(self, hops: int) -> int:
        """How many tokens the model writes; the last is its answer."""
        return 1


@dataclass(frozen=True, kw_only=True)
class WrittenThoughts(NoThoughts):
    """Chain of thought: every step is a token that the model learns to write."""

    kind: Literal["written"] = "written"  # type: ignore[assignment]

    def written(self, question: TaskBatch, steps: Tensor, stage: int, blank: int) -> TaskBatch:
        batch, hops = steps.shape
        stage = min(stage, hops)
        blanks = torch.full((batch, stage), blank)
        tokens = torch.cat((question.tokens, blanks, steps[:, stage:]), dim=1)
        # The last question token and every step predict what follows them, unless it is a blank.
        following = torch.cat((steps, question.answers()[:, None]), dim=1)
        following[:, :stage] = IGNORE
        before = torch.full_like(question.targets[:, :-1], IGNORE)
        last = torch.full((batch,), tokens.shape[1] - 1)
        return TaskBatch(tokens, torch.cat((before, following), dim=1), last)

    def new_tokens(self, hops: int) -> int:
        return hops + 1


@dataclass(frozen=True, kw_only=True)
class PauseThoughts(WrittenThoughts):
    """Blanks are one and the same token, with a learned embedding.

    A stage takes a share `stage_share` of the training; the last, without written steps, the rest.
    """

    kind: Literal["pauses"] = "pauses"  # type: ignore[assignment]
    stage_share: float = 0.1

    def __post_init__(self) -> None:
        require_number("stage_share", self.stage_share, above=0, at_most=1)

    def stage(self, progress: float) -> int:
        return int(progress / self.stage_share + 1e-9)

    def asked(self, tokens: TokenIds, hops: int, blank: int) -> TokenIds:
        return torch.cat((tokens, torch.full((len(tokens), hops), blank)), dim=1)

    def new_tokens(self, hops: int) -> int:
        return 1


@dataclass(frozen=True, kw_only=True)
class LatentThoughts(PauseThoughts):
    """Blanks are latent positions: their input is the last hidden state of the one before."""

    kind: Literal["latents"] = "latents"  # type: ignore[assignment]

    def written(self, question: TaskBatch, steps: Tensor, stage: int, blank: int) -> TaskBatch:
        made = super().written(question, steps, stage, blank)
        return made._replace(latents=made.tokens == blank)

    def asked(self, tokens: TokenIds, hops: int, blank: int) -> TokenIds:
        return tokens

    def latent_steps(self, hops: int) -> int:
        return hops


Thoughts = NoThoughts | WrittenThoughts | PauseThoughts | LatentThoughts
