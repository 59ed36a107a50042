"""Decoding with a cache: prefill the prompt, then one token at a time. Token ids only, no text."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from openmythos.config import require_int
from openmythos.inference.contrast import Contrast
from openmythos.inference.sampling import Sampling, sample
from openmythos.nn.cache import CachePolicy, ExactCache, KVCache
from openmythos.recurrence.exit_rules import ExitRule, FixedExit
from openmythos.recurrence.loop_sampling import MOST_LOOPS
from openmythos.types import LoopCounts, Mask, NextLogits, NextTokenIds, TokenIds


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to generate and how.

    `prefill` and `decode` choose how the loops share a cache; `prefill_chunk` > 0 feeds the prompt
    in pieces of that many tokens. Generation of a row ends at any of `stop_ids`. `latent_steps`
    positions between the prompt and the first new token have the model's last hidden state as their
    input (arXiv 2412.06769); a model must have been trained for that.
    """

    max_new_tokens: int = 64
    num_loops: int = 4
    sampling: Sampling = field(default_factory=Sampling)
    exit_rule: ExitRule = field(default_factory=FixedExit)
    prefill: CachePolicy = field(default_factory=ExactCache)
    decode: CachePolicy = field(default_factory=ExactCache)
    prefill_chunk: int = 0
    latent_steps: int = 0
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require_int("max_new_tokens", self.max_new_tokens, minimum=0)
        require_int("num_loops", self.num_loops, minimum=1, maximum=MOST_LOOPS)
        for name in ("prefill_chunk", "latent_steps"):
            require_int(name, getattr(self, name), minimum=0)
        self.sampling.contrast.early_loops(self.num_loops)  # refuses one that does not fit


@runtime_checkable
class DecodableModel(Protocol):
    """What decoding needs of a model: sizes, a cache, and the logits that follow some tokens."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def context(self) -> int:
        """The longest sequence, in tokens."""

    @property
    def device(self) -> torch.device: ...

    def new_cache(
        self,
        batch: int,
        capacity: int,
        *,
        num_loops: int,
        prefill: CachePolicy,
        decode: CachePolicy,
    ) -> KVCache:
        """An empty cache for `batch` sequences of up to `capacity` tokens."""

    def next_logits(
        self,
        tokens: TokenIds,
        *,
        num_loops: int,
        exit_rule: ExitRule,
        attention_mask: Mask | None,
        cache: KVCache,
        contrast: Contrast,
        latent: bool = False,
    ) -> tuple[NextLogits, LoopCounts]:
        """(logits after the last token, loops it ran); the tokens are appended to the cache.

        With a `contrast`, the logits that it adjusts. `latent`: the input of these tokens, one per
        row, is the last hidden state of the position before.
        """


class DecodeStep(NamedTuple):
    """One new token of every row; rows that have ended repeat their stop token."""

    tokens: NextTokenIds
    loops_used: Tensor  # [batch], loops run for the logits of this token


def stream(
    model: DecodableModel, prompt: TokenIds, request: Request, attention_mask: Tensor | None = None
) -> Iterator[DecodeStep]:
    """Check the request now, then yield a DecodeStep per new token."""
    check_are_ids("prompt", prompt)
    if prompt.ndim != 2:
        raise ValueError(f"prompt: has shape {list(prompt.shape)}, must be [batch, seq]")
    seq = prompt.shape[1]
    new = request.latent_steps + request.max_new_tokens
    if seq + new > model.context:
        raise ValueError(
            f"prompt: {seq} tokens and {new} new ones are longer than the context of "
            f"{model.context}"
        )
    if prompt.numel() == 0:
        raise ValueError("prompt: is empty; start with at least one token")
    if int(prompt.min()) < 0 or int(prompt.max()) >= model.vocab_size:
        raise ValueError(
            f"prompt: holds a token id outside the vocabulary of {model.vocab_size} tokens"
        )
    if attention_mask is not None and attention_mask.shape != prompt.shape:
        raise ValueError(
            f"attention_mask: has shape {list(attention_mask.shape)}, "
            f"the prompt has {list(prompt.shape)}"
        )
    if attention_mask is not None:
        _check_padding(attention_mask.bool())
    request.sampling.check(model.vocab_size)
    for stop_id in request.stop_ids:
        require_int("stop_ids", stop_id, minimum=0, maximum=model.vocab_size - 1)
    return _stream(model, prompt, request, attention_mask)


def prefill(
    model: DecodableModel,
    prompt: TokenIds,
    request: Request,
    cache: KVCache,
    attention_mask: Mask | None = None,
) -> tuple[NextLogits, LoopCounts]:
    """Feed a prompt to an empty cache; returns `next_logits` of its last token."""
    seq = prompt.shape[1]
    chunk = request.prefill_chunk or seq
    for start in range(0, seq, chunk):
        mask = None if attention_mask is None else attention_mask[:, start : start + chunk]
        last = _next(model, prompt[:, start : start + chunk], request, cache, mask)
    cache.begin_decode()
    return last


def decode_one_token(
    model: DecodableModel, tokens: NextTokenIds, request: Request, cache: KVCache
) -> tuple[NextLogits, LoopCounts]:
    """Append a token to every row; returns `next_logits` of that token."""
    return _next(model, tokens[:, None], request, cache)


def latent_step(
    model: DecodableModel, request: Request, cache: KVCache
) -> tuple[NextLogits, LoopCounts]:
    """Append a latent position to every row; returns `next_logits` of that position."""
    no_token = torch.zeros(cache.batch, 1, dtype=torch.long, device=model.device)
    return _next(model, no_token, request, cache, latent=True)


def _next(
    model: DecodableModel,
    tokens: TokenIds,
    request: Request,
    cache: KVCache,
    mask: Mask | None = None,
    *,
    latent: bool = False,
) -> tuple[NextLogits, LoopCounts]:
    return model.next_logits(
        tokens,
        num_loops=request.num_loops,
        exit_rule=request.exit_rule,
        attention_mask=mask,
        cache=cache,
        contrast=request.sampling.contrast,
        latent=latent,
    )


def check_are_ids(name: str, ids: object) -> None:
    """Raise a ValueError unless `ids` is a tensor of token ids."""
    if not isinstance(ids, Tensor):
        raise ValueError(f"{name}: must be a tensor [batch, seq], is a {type(ids).__name__}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name}: must hold int64 or int32 ids, holds {ids.dtype}")


def _check_padding(mask: Tensor) -> None:
    """New tokens follow the last column, so padding must come before the prompt."""
    if not mask[:, -1].all() or (mask[:, 1:] < mask[:, :-1]).any():
        raise ValueError(
            "attention_mask: pad on the left: every row must end in a token, with no padding after "
            "its first one"
        )


@torch.no_grad()
def _stream(
    model: DecodableModel, prompt: Tensor, request: Request, attention_mask: Tensor | None
) -> Iterator[DecodeStep]:
    if request.max_new_tokens == 0:
        return
    # A cache means inference. train() and eval() are not called: other threads may be using the
    # model.
    device = model.device
    prompt = prompt.to(device)
    if attention_mask is not None:
        attention_mask = attention_mask.to(device)
    batch, seq = prompt.shape
    cache = model.new_cache(
        batch,
        seq + request.latent_steps + request.max_new_tokens,
        num_loops=request.num_loops,
        prefill=request.prefill,
        decode=request.decode,
    )
    # Sampling and the check for stop tokens run on the CPU.
    generator = torch.Generator("cpu").manual_seed(request.sampling.seed)
    stop_ids = torch.tensor(request.stop_ids, dtype=torch.long, device="cpu")
    ended = torch.zeros(batch, dtype=torch.bool, device="cpu")
    drawn = torch.zeros(batch, dtype=torch.long, device="cpu")

    # Only the model runs in inference mode: what is yielded may be used in training.
    with torch.inference_mode():
        logits, loops = prefill(model, prompt, request, cache, attention_mask)
        for _ in range(request.latent_steps):
            logits, loops = latent_step(model, request, cache)
    for index in range(request.max_new_tokens):
        drawn = torch.where(ended, drawn, sample(logits, request.sampling, generator))
        ended = ended | torch.isin(drawn, stop_ids)
        tokens = drawn.to(device)
        yield DecodeStep(tokens, loops.clone())
        if bool(ended.all()) or index + 1 == request.max_new_tokens:
            return
        with torch.inference_mode():
            logits, loops = decode_one_token(model, tokens, request, cache)
