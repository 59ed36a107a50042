"""From next-token logits to a token: pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from openmythos.config import require_int, require_number
from openmythos.inference.contrast import Contrast, NoContrast
from openmythos.types import NextLogits, NextTokenIds


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw the next token; temperature 0 is greedy.

    top_k keeps the k most likely tokens (0: all), top_p the smallest set of probability >= top_p,
    min_p those at least min_p times as likely as the most likely. Filters apply in this order, to
    the probabilities at the given temperature. `contrast` changes the logits before all that.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    contrast: Contrast = field(default_factory=NoContrast)

    def __post_init__(self) -> None:
        require_number("temperature", self.temperature, at_least=0)
        require_int("top_k", self.top_k, minimum=0)
        require_number("top_p", self.top_p, above=0, at_most=1)
        require_number("min_p", self.min_p, at_least=0, at_most=1)
        require_int("seed", self.seed, minimum=0, maximum=2**63 - 1)

    def check(self, vocab_size: int) -> None:
        require_int("top_k", self.top_k, minimum=0, maximum=vocab_size)


def filtered_logits(logits: NextLogits, sampling: Sampling) -> NextLogits:
    """Logits / temperature; -inf for the tokens that the filters drop."""
    # Shift the maximum to 0: dividing by a small temperature then cannot give +inf. A temperature
    # below the smallest fp32 number would be rounded to 0.
    logits = logits.float()
    temperature = max(sampling.temperature, torch.finfo(torch.float32).tiny)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    if sampling.top_k:
        smallest = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if sampling.top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
        dropped = torch.zeros_like(logits, dtype=torch.bool)
        dropped = dropped.scatter(1, index, before >= sampling.top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    if sampling.min_p > 0:
        probability = logits.softmax(dim=-1)
        smallest = sampling.min_p * probability.amax(dim=-1, keepdim=True)
        logits = logits.masked_fill(probability < smallest, -torch.inf)
    return logits


def sample(logits: NextLogits, sampling: Sampling, generator: torch.Generator) -> NextTokenIds:
    """One token per row, drawn on the CPU: one device sync; seeds work alike on all devices.

    Raises a ValueError where the logits are not finite.
    """
    if sampling.temperature == 0:
        return _most_likely(logits)
    probability = probabilities(logits, sampling)
    _check_finite(probability)
    return draw(probability, generator)


def _most_likely(logits: NextLogits) -> NextTokenIds:
    # Maximum and its index in one transfer: fp64 represents ids and logits exactly.
    highest, place = logits.max(dim=-1)
    score, token = torch.stack((highest.double(), place.double())).cpu()
    _check_finite(score)
    return token.long()


def probabilities(logits: NextLogits, sampling: Sampling) -> Tensor:
    """What `sample` draws from at a temperature above 0, [batch, vocab] on the CPU."""
    return filtered_logits(logits, sampling).softmax(dim=-1).cpu()


def draw(probability: Tensor, generator: torch.Generator) -> NextTokenIds:
    """One token per row of probabilities [batch, vocab]."""
    return torch.multinomial(probability, 1, generator=generator).squeeze(1)


def sample_rows(
    logits: NextLogits, how: Sequence[tuple[Sampling, torch.Generator]]
) -> list[int | None]:
    """What `sample` draws from each row alone, with its own settings and generator.

    None for a row whose logits are not finite. Rows with the same settings are filtered together.
    """
    groups: dict[Any, list[int]] = {}
    for index, (sampling, _) in enumerate(how):
        settings = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
        groups.setdefault(settings if sampling.temperature else 0, []).append(index)
    found: list[int | None] = [None] * len(how)
    for places in groups.values():
        sampling = how[places[0]][0]
        rows = logits if len(places) == len(how) else logits[places]
        if sampling.temperature == 0:
            highest, token = rows.max(dim=-1)
            finite, tokens = highest.isfinite().tolist(), token.tolist()
        else:
            probability = probabilities(rows, sampling)
            finite = probability.isfinite().all(dim=-1).tolist()
            tokens = [
                int(draw(probability[i : i + 1], how[place][1])) if finite[i] else 0
                for i, place in enumerate(places)
            ]
        for place, token, is_finite in zip(places, tokens, finite, strict=True):
            found[place] = token if is_finite else None
    return found


@dataclass(frozen=True)
class TokenLogprobs:
    """The log-probability of a token, and the most likely tokens with theirs, best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def logprobs(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprobs]:
    """The log-probability of each token under its row of logits [rows, vocab], and `top` more."""
    rows = logits.double().log_softmax(dim=-1)
    values, ids = rows.topk(top, dim=-1)
    own = rows.gather(1, torch.tensor(tokens, device=rows.device, dtype=torch.long)[:, None])[:, 0]
    return [
        TokenLogprobs(each, tuple(zip(best, scores, strict=True)))
        for each, best, scores in zip(own.tolist(), ids.tolist(), values.tolist(), strict=True)
    ]


def _check_finite(x: Tensor) -> None:
    if not x.isfinite().all():
        raise ValueError("logits: are not finite; the model's weights are damaged or diverged")
