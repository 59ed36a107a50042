"""Validate forward() arguments; compute positions and masks."""

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, SupportsIndex, TypedDict

import torch
from torch import Tensor

from openmythos.config import require, require_int
from openmythos.inference.generation import check_are_ids
from openmythos.model.config import MythosConfig
from openmythos.nn.cache import KVCache, Part
from openmythos.nn.layout import AttentionContext, TokenLayout, attention_context
from openmythos.nn.value_embedding import NoValueEmbeddings
from openmythos.nn.view import KVView, LayerView, NoCache
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
    latents: [batch, seq], True where the last hidden state of the position before takes the place
        of the token's embedding (see `model.latents`); a pass more per latent.
    """

    num_loops: SupportsIndex | LoopCounts | None
    backprop_loops: int
    attention_mask: Mask | None
    documents: Tensor | None
    cache: KVCache | None
    collect_loops: CollectLoops
    initial_state: Tensor | None
    latents: Mask | None


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """The checked arguments of one pass, with the positions and masks for its layers."""

    tokens: TokenIds
    layout: TokenLayout
    context: AttentionContext
    plan: LoopPlan
    training: bool
    latents: Mask | None = None

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
        latents: Tensor | None = None,
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
        plan = LoopPlan(
            num_loops=loops,
            backprop_loops=backprop_loops,
            cache=cache,
            collect=_check_collected(collect_loops, loops) if len(collect_loops) else (),
            initial_state=initial_state,
        )
        context = attention_context(layout, config.attention, config.dim, tokens)
        if latents is not None:
            _check_latents(config, latents, layout, cache)
        return cls(
            tokens=tokens,
            layout=layout,
            context=context,
            plan=plan,
            training=training,
            latents=latents,
        )

    @classmethod
    def decoding(
        cls,
        config: MythosConfig,
        tokens: Tensor,
        attention_mask: Tensor | None,
        num_loops: int,
        cache: KVCache,
        collect: Collection[int] = (),
    ) -> "ModelInputs":
        """Inputs of a decoding step; its tokens and mask are already checked."""
        layout = cache.place(tokens, attention_mask)
        context = attention_context(layout, config.attention, config.dim, tokens)
        plan = LoopPlan(num_loops=num_loops, cache=cache, collect=collect)
        return cls(tokens=tokens, layout=layout, context=context, plan=plan, training=False)

    def views(self, part: Part, layers: int, loop: int = 0, *, collects: bool) -> list[LayerView]:
        """What each layer of a part sees; in training it may collect router statistics."""
        cache, seq = self.plan.cache, self.layout.seq
        kv: Sequence[KVView] = [NoCache()] * layers
        if cache is not None:
            kv = cache.views(part, seq, loop)
        return [LayerView(self.context, x, collects=collects and self.training) for x in kv]

    def prefix(self, config: MythosConfig, end: int) -> "ModelInputs":
        """The inputs of the first `end` columns of a pass without a cache."""
        layout, given, tokens = self.layout, self.plan.initial_state, self.tokens[:, :end]
        valid, documents = (
            None if x is None else x[:, :end] for x in (layout.valid, layout.documents)
        )
        layout = TokenLayout(end, 0, layout.device, valid, documents)
        context = attention_context(layout, config.attention, config.dim, tokens)
        given = None if given is None else given[:, :end]
        plan = replace(self.plan, collect=(), initial_state=given)
        return ModelInputs(
            tokens=tokens, layout=layout, context=context, plan=plan, training=self.training
        )

    def rows(self, order: Tensor | None, count: int) -> "ModelInputs":
        """The inputs of the first `count` rows, in this order (None: unchanged)."""
        rows = slice(0, count) if order is None else order[:count]
        return replace(self, context=self.context.select(rows))


def _check_latents(
    config: MythosConfig, latents: Tensor, layout: TokenLayout, cache: KVCache | None
) -> None:
    """Raise a ValueError unless these positions [batch, seq] can be latents."""
    if latents.ndim != 2 or latents.shape[1] != layout.seq or latents.dtype != torch.bool:
        raise ValueError(
            f"latents: is {latents.dtype} {list(latents.shape)}, must be a mask [batch, seq]"
        )
    if cache is not None:
        raise ValueError("latents: with a cache, Request(latent_steps=...) takes them one by one")
    if (latents & (layout.positions() == 0)).any():
        raise ValueError("latents: a latent must follow another position of its document")
    refuse_value_embeddings(config)


def refuse_value_embeddings(config: MythosConfig) -> None:
    """Raise a ConfigError for a model whose later layers look up tokens: a latent has none."""
    own = config.value_embeddings
    plain = isinstance(own, NoValueEmbeddings)
    require(plain, "value_embeddings.kind", own.kind, "must be none where latents are used")


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
    if cache is not None:
        cache.check_loops(loops)
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
    check_ids("tokens", tokens, config.vocab_size)
    if tokens.ndim != 2:
        raise ValueError(f"tokens: has shape {list(tokens.shape)}, must be [batch, seq]")
    if tokens.numel() == 0:
        raise ValueError("tokens: is empty; start with at least one token")
    for name, given in (("attention_mask", attention_mask), ("documents", documents)):
        if given is not None and given.shape != tokens.shape:
            raise ValueError(
                f"{name}: has shape {list(given.shape)}, the tokens have {list(tokens.shape)}"
            )
    if documents is not None and (documents.is_floating_point() or documents.is_complex()):
        raise ValueError(f"documents: must hold whole numbers, holds {documents.dtype}")
    if documents is not None and cache is not None:
        raise ValueError("documents: packed rows and a cache do not go together")
    mask = None if attention_mask is None else attention_mask.bool()
    layout = TokenLayout(tokens.shape[1], 0, tokens.device, mask, documents)
    end = tokens.shape[1] + (0 if cache is None else cache.length)
    if documents is not None and end > config.context:
        end = int(layout.positions().max()) + 1  # a packed row may be longer than its documents
    if end > config.context:
        raise ValueError(f"tokens: {end} tokens are longer than the context of {config.context}")
    return layout if cache is None else cache.place(tokens, mask)


def check_ids(name: str, ids: Tensor, vocab_size: int, *, ignored: int | None = None) -> None:
    """Raise a ValueError unless `ids` are token ids, or `ignored`.

    On an accelerator their range is not checked: it would synchronise.
    """
    check_are_ids(name, ids)
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or ids.numel() == 0:
        return
    low, high = map(int, torch.aminmax(ids if ignored is None else ids.where(ids != ignored, 0)))
    if low < 0 or high >= vocab_size:
        place = "outside" if ignored is None else f"neither {ignored} (not counted) nor in"
        found = low if low < 0 else high
        raise ValueError(f"{name}: id {found} is {place} the vocabulary of {vocab_size} tokens")
