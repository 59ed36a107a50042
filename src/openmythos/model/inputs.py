"""Validate forward() arguments; compute positions and masks."""

import operator
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Literal, SupportsIndex, TypedDict

import torch
from torch import Tensor

from openmythos.config import require_int
from openmythos.inference.generation import check_are_ids
from openmythos.kernels.cross_entropy import IGNORE
from openmythos.model.config import MythosConfig
from openmythos.nn.cache import KVCache
from openmythos.nn.layout import AttentionContext, TokenLayout, attention_context
from openmythos.nn.value_embedding import NoValueEmbeddings
from openmythos.nn.view import KVView, LayerView
from openmythos.recurrence.exit_rules import ExitTracker
from openmythos.recurrence.loop_sampling import MOST_LOOPS
from openmythos.recurrence.schedule import LoopPlan
from openmythos.types import LoopCounts, Mask, TokenIds


def whole_number(value: Any) -> Any:
    """value as an int if it is an integer of any library; anything else is returned unchanged."""
    if isinstance(value, bool):
        return value
    if isinstance(value, Tensor) and (value.ndim or value.dtype == torch.bool):
        return value
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):
        return value


CollectLoops = Collection[int] | Literal["all"]


class PassOptions(TypedDict, total=False):
    """Options of a forward pass.

    num_loops: one number, or one per sequence [batch]; default: the config's.
    backprop_loops: how many last loops of each sequence carry gradient (0: all).
    attention_mask: [batch, seq], False at padding; left padding where a cache is used.
    documents: [batch, seq] document numbers of packed rows; attention stays inside each.
    cache: appended to but not advanced; call `cache.advance(seq)` after the pass. A pass with a
        cache is inference, whatever mode the module is in.
    collect_loops: loop counts after which to keep states and logits: (1, 2, 4), or "all".
    initial_state: h_0 [batch, seq, dim] of these tokens, in place of the model's own.
    """

    num_loops: SupportsIndex | LoopCounts | None
    backprop_loops: int
    attention_mask: Mask | None
    documents: Tensor | None
    cache: KVCache | None
    collect_loops: CollectLoops
    initial_state: Tensor | None


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """The checked arguments of one pass, with the positions and masks for its layers."""

    tokens: TokenIds
    layout: TokenLayout
    context: AttentionContext
    num_loops: int | LoopCounts
    backprop_loops: int
    collect: Collection[int]
    cache: KVCache | None
    initial_state: Tensor | None
    training: bool

    @classmethod
    def check(  # noqa: PLR0913
        cls,
        config: MythosConfig,
        tokens: Tensor,
        in_training: bool,
        *,
        num_loops: SupportsIndex | Tensor | None = None,
        backprop_loops: int = 0,
        collect_loops: CollectLoops = (),
        attention_mask: Tensor | None = None,
        documents: Tensor | None = None,
        cache: KVCache | None = None,
        initial_state: Tensor | None = None,
        has_exits: bool = False,
    ) -> "ModelInputs":
        """Check the options (see `PassOptions`); a ValueError names the invalid argument."""
        layout = token_layout(config, tokens, attention_mask, documents, cache)
        training = in_training and cache is None  # with a cache it is inference
        if has_exits and training:
            raise ValueError("exit_rule: is for inference; call model.eval() first")
        loops = config.num_loops if num_loops is None else num_loops
        loops = _check_loops(loops, tokens, cache, has_exits=has_exits)
        require_int("backprop_loops", backprop_loops, minimum=0)
        shape = (*tokens.shape, config.dim)
        if initial_state is not None and initial_state.shape != shape:
            raise ValueError(
                f"initial_state: has shape {list(initial_state.shape)}, must be {list(shape)}"
            )
        return cls(
            tokens=tokens,
            layout=layout,
            context=_context(config, layout, tokens),
            num_loops=loops,
            backprop_loops=backprop_loops,
            collect=_check_collected(collect_loops, loops),
            cache=cache,
            initial_state=initial_state,
            training=training,
        )

    @classmethod
    def decoding(
        cls,
        config: MythosConfig,
        tokens: Tensor,
        attention_mask: Tensor | None,
        num_loops: int,
        cache: KVCache,
    ) -> "ModelInputs":
        """Inputs of a decoding step; its tokens and mask are already checked."""
        cache.check_room(tokens.shape[1], len(tokens))
        if attention_mask is not None:
            cache.mark_padding(attention_mask)
        seq, valid = tokens.shape[1], None
        if cache.padded:
            valid = cache.valid[:, : cache.length + seq]
        layout = TokenLayout(seq, cache.length, tokens.device, valid)
        return cls(
            tokens=tokens,
            layout=layout,
            context=_context(config, layout, tokens),
            num_loops=num_loops,
            backprop_loops=0,
            collect=(),
            cache=cache,
            initial_state=None,
            training=False,
        )

    def view(self, kv: KVView, *, collects: bool = True) -> LayerView:
        """What a layer outside the loop sees; in training it may collect router statistics."""
        return LayerView(self.context, kv, collects=collects and self.training)

    def loop_plan(self, exits: ExitTracker | None) -> LoopPlan:
        return LoopPlan(
            num_loops=self.num_loops,
            backprop_loops=self.backprop_loops,
            cache=self.cache,
            exits=exits,
            collect=self.collect,
            initial_state=self.initial_state,
        )

    def sorted_rows(self, order: Tensor | None) -> "ModelInputs":
        """The inputs with the rows in this order (None: unchanged)."""
        return self if order is None else replace(self, context=self.context.select(order))

    def rows(self, count: int) -> "ModelInputs":
        """The inputs of the first `count` rows."""
        return replace(self, context=self.context.rows(0, count))


def _context(config: MythosConfig, layout: TokenLayout, tokens: Tensor) -> AttentionContext:
    attention = config.attention
    context = attention_context(
        layout,
        attention.rotary_dim(config.dim),
        attention.rope_base,
        attention.window,
        attention.rope_scaling,
    )
    if isinstance(config.value_embeddings, NoValueEmbeddings):
        return context
    return replace(context, tokens=tokens)


def _check_loops(
    num_loops: Any, tokens: Tensor, cache: KVCache | None, *, has_exits: bool
) -> int | Tensor:
    """num_loops as an int or [batch]; a ValueError if tokens or cache do not allow it."""
    loops = whole_number(num_loops)
    if isinstance(loops, Tensor):
        whole = not loops.is_floating_point() and loops.dtype != torch.bool
        if loops.shape != tokens.shape[:1] or not whole or loops.min() < 1:
            raise ValueError(
                f"num_loops = {loops.tolist()}: must be one whole number >= 1 for each of the "
                f"{tokens.shape[0]} sequences"
            )
        if cache is not None or has_exits:
            raise ValueError(
                "num_loops: one number per sequence goes with neither a cache nor an exit rule"
            )
        return loops
    if isinstance(loops, bool) or not isinstance(loops, int) or not 1 <= loops <= MOST_LOOPS:
        raise ValueError(f"num_loops = {loops!r}: must be a whole number, 1 to {MOST_LOOPS}")
    if cache is not None and loops > cache.num_loops:
        raise ValueError(
            f"num_loops = {loops}: the cache was made for at most {cache.num_loops} loops"
        )
    return loops


def _check_collected(collect: Any, num_loops: int | Tensor) -> Collection[int]:
    """The loop counts of `collect_loops`; a ValueError unless all are in 1 ... num_loops."""
    if collect == "all":
        return range(1, MOST_LOOPS + 1)
    most = int(num_loops.max()) if isinstance(num_loops, Tensor) and len(collect) else num_loops
    counts = [whole_number(count) for count in collect]
    for count in counts:
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= most:
            raise ValueError(
                f"collect_loops: holds {count!r}, must hold whole numbers from 1 to num_loops = "
                f"{most}"
            )
    return counts


def token_layout(
    config: MythosConfig,
    tokens: Tensor,
    attention_mask: Tensor | None,
    documents: Tensor | None,
    cache: KVCache | None,
) -> TokenLayout:
    """Check tokens [batch, seq] and make their layout; padding is marked in the cache."""
    check_are_ids("tokens", tokens)
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
    _check_documents(documents, tokens)
    if cache is None:
        return TokenLayout(seq, 0, tokens.device, attention_mask, documents)
    if documents is not None:
        raise ValueError("documents: packed rows and a cache do not go together")
    cache.check_room(seq, batch)
    if attention_mask is not None:
        cache.mark_padding(attention_mask)
    valid = cache.valid[:, : start + seq] if cache.padded else None
    return TokenLayout(seq, start, tokens.device, valid)


def _check_documents(documents: Tensor | None, tokens: Tensor) -> None:
    if documents is None:
        return
    if documents.shape != tokens.shape:
        raise ValueError(
            f"documents: has shape {list(documents.shape)}, the tokens have {list(tokens.shape)}"
        )
    if documents.is_floating_point() or documents.is_complex():
        raise ValueError(f"documents: must hold whole numbers, holds {documents.dtype}")


def _outside(ids: Tensor, vocab_size: int) -> int | None:
    """An id outside the vocabulary, or None. Accelerators are not checked: it would synchronise."""
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    low, high = map(int, torch.aminmax(ids))
    return low if low < 0 else high if high >= vocab_size else None


def _check_ids(tokens: Tensor, vocab_size: int) -> None:
    found = _outside(tokens, vocab_size)
    if found is not None:
        raise ValueError(f"tokens: id {found} is outside the vocabulary of {vocab_size} tokens")


def check_targets(targets: Tensor, tokens: Tensor, vocab_size: int) -> None:
    """Raise a ValueError for targets that are neither a token's id nor IGNORE.

    On an accelerator ids are not checked here; the gather of the loss raises a device error.
    """
    if targets.shape != tokens.shape:
        raise ValueError(
            f"targets: has shape {list(targets.shape)}, the tokens have {list(tokens.shape)}"
        )
    check_are_ids("targets", targets)
    found = _outside(targets.where(targets != IGNORE, 0), vocab_size) if len(targets) else None
    if found is not None:
        raise ValueError(
            f"targets: id {found} is neither {IGNORE} (not counted) nor in the vocabulary of "
            f"{vocab_size} tokens"
        )
