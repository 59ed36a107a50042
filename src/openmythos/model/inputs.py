"""What a call of the model is given: refused where it cannot be run, placed where it stands."""

import torch
from torch import Tensor

from openmythos.model.config import MythosConfig
from openmythos.nn.attention import TokenLayout
from openmythos.nn.cache import KVCache
from openmythos.recurrence.halting import ExitRule


def check_loops(
    num_loops: int | Tensor,
    tokens: Tensor,
    cache: KVCache | None,
    exit_rule: ExitRule | None,
    *,
    training: bool,
) -> int | Tensor:
    """num_loops, if these tokens [batch, seq] can be run through so many."""
    loops = num_loops
    if isinstance(loops, Tensor):
        whole = not loops.is_floating_point() and loops.dtype != torch.bool
        if loops.shape != tokens.shape[:1] or not whole or loops.min() < 1:
            raise ValueError(
                f"num_loops = {loops.tolist()}: must be one whole number >= 1 for each of the "
                f"{tokens.shape[0]} sequences"
            )
        if cache is not None or exit_rule is not None:
            raise ValueError(
                "num_loops: one number per sequence goes with neither a cache nor an exit rule"
            )
        return loops
    if isinstance(loops, bool) or not isinstance(loops, int) or loops < 1:
        raise ValueError(f"num_loops = {loops!r}: must be a whole number >= 1")
    if cache is not None and loops > cache.num_loops:
        raise ValueError(
            f"num_loops = {loops}: the cache was made for at most {cache.num_loops} loops"
        )
    if exit_rule is not None and training:
        raise ValueError("exit_rule: is for inference; call model.eval() first")
    return loops


def token_layout(
    config: MythosConfig,
    tokens: Tensor,
    attention_mask: Tensor | None,
    documents: Tensor | None,
    cache: KVCache | None,
) -> TokenLayout:
    """Where the tokens [batch, seq] stand; a cache is told which of them are padding."""
    if tokens.ndim != 2:
        raise ValueError(f"tokens: has shape {list(tokens.shape)}, must be [batch, seq]")
    if tokens.numel() == 0:
        raise ValueError("tokens: is empty; start with at least one token")
    if attention_mask is not None:
        if attention_mask.shape != tokens.shape:
            raise ValueError(
                f"attention_mask: has shape {list(attention_mask.shape)}, "
                f"the tokens have {list(tokens.shape)}"
            )
        attention_mask = attention_mask.bool()
    batch, seq = tokens.shape
    start = 0 if cache is None else cache.length
    if start + seq > config.context:
        raise ValueError(
            f"tokens: {start + seq} tokens are longer than the context of {config.context}"
        )
    _check_ids(tokens, config.vocab_size)
    if cache is None:
        return TokenLayout(seq, 0, tokens.device, attention_mask, documents)
    if documents is not None:
        raise ValueError("documents: packed rows and a cache do not go together")
    cache.check_room(seq, batch)
    if attention_mask is not None:
        cache.mark_padding(attention_mask)
    valid = cache.valid[:, : start + seq] if cache.padded else None
    return TokenLayout(seq, start, tokens.device, valid)


def _check_ids(tokens: Tensor, vocab_size: int) -> None:
    # On an accelerator the check would wait for the device; ids are checked where they enter.
    if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = map(int, torch.aminmax(tokens))
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"tokens: id {low if low < 0 else high} is outside the vocabulary of "
                f"{vocab_size} tokens"
            )
