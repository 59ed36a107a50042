"""Latent positions: the model's last hidden state is the input of the next position (Coconut).

    input_i = norm(coda(h_T))_{i-1}  at a latent position i,  else the embedding of token i

(arXiv 2412.06769). The state of a position is known only after a pass over all earlier ones, so a
sequence with k latents takes k + 1 passes; gradients flow through all of them. In decoding a latent
is one step like a token: see `inference.generation`.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from openmythos.model.config import MythosConfig
from openmythos.model.inputs import ModelInputs
from openmythos.nn.block import LayerStats
from openmythos.recurrence.exit_rules import ExitRule
from openmythos.recurrence.trace import RecurrentOutput
from openmythos.types import Hidden, Mask


class LatentModel(Protocol):
    """What filling latents needs of the model."""

    config: MythosConfig

    def run(
        self,
        inputs: ModelInputs,
        exit_rule: ExitRule | None = None,
        embedded: Hidden | None = None,
    ) -> tuple[RecurrentOutput, dict[str, LayerStats]]: ...

    def hidden(self, state: Hidden, inputs: ModelInputs) -> Tensor: ...


def filled(
    model: LatentModel,
    embedded: Hidden,
    inputs: ModelInputs,
    exit_rule: ExitRule | None,
) -> Hidden:
    """The input embeddings [batch, seq, dim] with those of the latent positions filled in."""
    seq, latents = embedded.shape[1], inputs.latents
    for place in [] if latents is None else _in_order(latents):
        end = _last(place)
        before = inputs.prefix(model.config, end)
        recurrence, _ = model.run(before, exit_rule, embedded[:, :end])
        hidden = model.hidden(recurrence.state, before)
        shifted = F.pad(hidden, (0, 0, 1, seq - 1 - end)).to(embedded.dtype)
        embedded = torch.where(place[..., None], shifted, embedded)
    return embedded


def positions(latents: Mask | None, seq: int) -> int:
    """How many positions of a row all its passes compute."""
    return seq + (0 if latents is None else sum(map(_last, _in_order(latents))))


def _in_order(latents: Mask) -> list[Mask]:
    """A mask for each number n: the n-th latent of every row that has so many."""
    number = latents.cumsum(dim=1)
    return [latents & (number == n) for n in range(1, int(number.max()) + 1)]


def _last(place: Mask) -> int:
    """The largest column of a mask."""
    return int(place.nonzero()[:, 1].max())
