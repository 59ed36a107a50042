"""Held-out likelihood of text: bits per byte and perplexity."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from openmythos.data.loader import evaluation_windows
from openmythos.data.shards import TokenShards
from openmythos.inference.generation import Request, decode_one_token, prefill
from openmythos.machine import autocast, choose_precision
from openmythos.model.mythos import OpenMythos
from openmythos.nn.cache import CachePolicy
from openmythos.types import Logits, TokenIds


@dataclass(frozen=True)
class Likelihood:
    """`bits_per_byte` counts the UTF-8 bytes of the text, so tokenizers can be compared."""

    nats_per_token: float
    bits_per_byte: float
    perplexity: float
    tokens: int
    num_bytes: int


@torch.no_grad()
def depth_sweep(
    model: OpenMythos,
    shards: TokenShards,
    loops: Sequence[int],
    *,
    seq_len: int,
    batch_size: int = 8,
    precision: str = "fp32",
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> dict[int, Likelihood]:
    """The likelihood at each number of loops, all from one pass at the largest.

    Every token but the first is scored once, in windows of seq_len tokens that do not overlap; a
    token early in a window has little context, so this is an upper bound of the model's loss.
    `progress` is called with the numbers of tokens scored so far and in total.
    """
    was_training = model.training
    model.eval()
    device = model.device
    chosen = choose_precision(precision, device)
    totals, tokens = dict.fromkeys(sorted(loops), 0.0), 0
    try:
        for batch in evaluation_windows(shards, seq_len, batch_size=batch_size):
            targets = batch.targets.flatten().to(device)
            with autocast(chosen, device):
                by_loops = logits_by_loops(model, batch.tokens.to(device), loops)
            for num_loops, logits in by_loops.items():
                losses = F.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="none")
                totals[num_loops] += float((losses.cpu() * batch.weights.flatten()).sum())
            tokens += int(batch.weights.sum())
            progress(tokens, len(shards) - 1)
    finally:
        model.train(was_training)
    return {loop: _likelihood(total, tokens, shards) for loop, total in totals.items()}


def logits_by_loops(
    model: OpenMythos, tokens: TokenIds, loops: Sequence[int], *, last_only: bool = False
) -> dict[int, Logits]:
    """Logits after each number of loops, all from one pass at the largest; see `forward`."""
    out = model(tokens, num_loops=max(loops), collect_loops=tuple(loops), last_only=last_only)
    return {loop: out.loop_logits[loop] for loop in loops}


@torch.no_grad()
def decoded_loss(
    model: OpenMythos,
    shards: TokenShards,
    policy: CachePolicy,
    *,
    num_loops: int,
    window: int,
    windows: int,
) -> float:
    """Mean nats per token over the second half of each window, decoded token by token.

    The first half is the prompt, cached with the same `policy`.
    """
    half = window // 2
    batch = next(iter(evaluation_windows(shards, window, batch_size=windows)))
    tokens, targets = batch.tokens.to(model.device), batch.targets.to(model.device)
    cache = model.new_cache(len(tokens), window, num_loops=num_loops, prefill=policy, decode=policy)
    request = Request(num_loops=num_loops)
    prefill(model, tokens[:, :half], request, cache)
    total = 0.0
    for column in range(half, window):
        logits, _ = decode_one_token(model, tokens[:, column], request, cache)
        total += float(F.cross_entropy(logits, targets[:, column]))
    return total / half


def _likelihood(total: float, tokens: int, shards: TokenShards) -> Likelihood:
    nats = total / tokens
    return Likelihood(
        nats_per_token=nats,
        bits_per_byte=total / math.log(2) / shards.num_bytes,
        perplexity=math.exp(min(nats, 700.0)),
        tokens=tokens,
        num_bytes=shards.num_bytes,
    )
