"""The model: embed -> prelude -> recurrent block, looped -> coda -> norm -> head."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, SupportsIndex

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openmythos.config import require_int
from openmythos.inference import generation
from openmythos.inference.sampling import Sampling
from openmythos.kernels.cross_entropy import linear_cross_entropy
from openmythos.machine import choose_device
from openmythos.model import storage
from openmythos.model.config import MythosConfig
from openmythos.model.init import init_weights
from openmythos.model.inputs import (
    check_collected,
    check_loops,
    check_targets,
    token_layout,
    whole_number,
)
from openmythos.nn.block import Block
from openmythos.nn.cache import CachePolicy, CacheSlot, ExactCache, KVCache
from openmythos.nn.layout import AttentionContext, TokenLayout, attention_context
from openmythos.nn.moe import MoELayer, RouterStats
from openmythos.nn.norm import RMSNorm
from openmythos.recurrence.exit_rules import ExitRule, ExitTracker, FixedExit
from openmythos.recurrence.recurrent_block import RecurrentBlock, RecurrentOutput
from openmythos.types import Hidden, Logits, LoopCounts, Mask, NextLogits, Scalar, TokenIds


@dataclass(frozen=True)
class MythosOutput:
    """Logits of every position, and how the loops went.

    `loop_logits` holds the logits after the loops that were asked for, as if the model had stopped
    there (see RecurrentOutput for rows that ran different numbers of loops). `router` has the MoE
    statistics by layer name, in training.
    """

    logits: Logits
    recurrence: RecurrentOutput
    router: Mapping[str, RouterStats]
    loop_logits: list[Tensor]


@dataclass(frozen=True)
class MythosLosses:
    """Mean cross-entropy after the last loop, and after each loop that was asked for.

    In nats per token. Where sequences ran different numbers of loops, an entry of `by_loop` is
    the mean over those that ran that loop.
    """

    cross_entropy: Scalar
    by_loop: list[Tensor]
    recurrence: RecurrentOutput
    router: Mapping[str, RouterStats]


class _Run(NamedTuple):
    """The model up to its readout."""

    recurrence: RecurrentOutput
    context: AttentionContext
    router: dict[str, RouterStats]


CollectLoops = Collection[int] | Literal["all"]


class OpenMythos(nn.Module):
    """A recurrent-depth transformer: p(next token | tokens, num_loops).

    logits = head(norm(coda(h_T))),  h_T from `RecurrentBlock` on the prelude's output.
    """

    def __init__(self, config: MythosConfig, *, seed: int | None = None) -> None:
        """Build and initialise; `seed` makes the weights independent of torch's global state."""
        if not isinstance(config, MythosConfig):
            raise TypeError(
                f"config: must be a MythosConfig, is a {type(config).__name__}; of a dict, "
                "openmythos.config.from_dict(MythosConfig, ...) makes one"
            )
        super().__init__()
        self.config = config
        c = config
        self.embed = nn.Embedding(c.vocab_size, c.dim)

        def dense_layers(count: int) -> nn.ModuleList:
            return nn.ModuleList(
                Block(c.dim, c.attention, c.feed_forward, c.norm_eps) for _ in range(count)
            )

        self.prelude = dense_layers(c.prelude_layers)
        self.recurrent = RecurrentBlock(config)
        self.coda = dense_layers(c.coda_layers)
        self.norm = RMSNorm(c.dim, c.norm_eps)
        # A tied head is the embedding itself, not a second name for it in checkpoints.
        self.head = None if c.tie_embeddings else nn.Linear(c.dim, c.vocab_size, bias=False)
        device = self.embed.weight.device
        if device.type != "meta":
            generator = None if seed is None else torch.Generator(device).manual_seed(seed)
            init_weights(self, config, generator)

    @property
    def device(self) -> torch.device:
        """Where the weights are, and where `forward` wants its tokens."""
        return self.embed.weight.device

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def context(self) -> int:
        """The longest sequence, in tokens."""
        return self.config.context

    def forward(  # noqa: PLR0913
        self,
        tokens: TokenIds,
        *,
        num_loops: SupportsIndex | LoopCounts | None = None,
        backprop_loops: int = 0,
        attention_mask: Mask | None = None,
        documents: Tensor | None = None,
        cache: KVCache | None = None,
        exit_rule: ExitRule | None = None,
        collect_loops: CollectLoops = (),
        last_only: bool = False,
    ) -> MythosOutput:
        """Run tokens [batch, seq] through num_loops loops (one number, or one per sequence).

        backprop_loops: loops of each sequence, counted from its last, that carry gradient (0: all).
        attention_mask: False at padding; left padding where a cache is used.
        documents: [batch, seq] document numbers of packed rows; attention stays inside each.
        cache: appended to but not advanced; call `cache.advance(seq)` after the forward pass. With
            one the pass is inference, whatever mode the module is in.
        exit_rule: inference only, lets positions stop before num_loops.
        collect_loops: loop counts after which to keep states and logits too: (1, 2, 4), or "all".
        last_only: logits of the last position alone, [batch, 1, vocab], which spares the head and
            the last coda layer all others.
        """
        run = self._run(
            tokens,
            num_loops=num_loops,
            backprop_loops=backprop_loops,
            attention_mask=attention_mask,
            documents=documents,
            cache=cache,
            exit_rule=exit_rule,
            collect_loops=collect_loops,
        )
        loop_logits = [
            self._logits(state, context, cache, last_only=last_only)
            for state, context in self._collected(run)
        ]
        hidden = self._hidden(
            run.recurrence.state, run.context, cache, run.router, last_only=last_only
        )
        if cache is not None:
            cache.note_exits(run.recurrence.loops_used)
        return MythosOutput(self._head(hidden), run.recurrence, run.router, loop_logits)

    def losses(
        self,
        tokens: TokenIds,
        targets: TokenIds,
        *,
        num_loops: SupportsIndex | LoopCounts | None = None,
        backprop_loops: int = 0,
        documents: Tensor | None = None,
        collect_loops: CollectLoops = (),
    ) -> MythosLosses:
        """Cross-entropy against targets [batch, seq]; a target of IGNORE = -100 does not count.

        The arguments are those of `forward`, the losses those of its logits, but the logits of all
        tokens are never in memory at once.
        """
        if targets.shape != tokens.shape:
            raise ValueError(
                f"targets: has shape {list(targets.shape)}, the tokens have {list(tokens.shape)}"
            )
        check_targets(targets, self.config.vocab_size)
        run = self._run(
            tokens,
            num_loops=num_loops,
            backprop_loops=backprop_loops,
            documents=documents,
            collect_loops=collect_loops,
        )
        order = run.recurrence.order
        ordered = targets if order is None else targets[order]
        by_loop = [
            self._cross_entropy(self._hidden(state, context), ordered[: len(state)])
            for state, context in self._collected(run)
        ]
        hidden = self._hidden(run.recurrence.state, run.context, router=run.router)
        loss = self._cross_entropy(hidden, targets)
        return MythosLosses(loss, by_loop, run.recurrence, run.router)

    def _run(
        self,
        tokens: Tensor,
        *,
        num_loops: SupportsIndex | Tensor | None,
        backprop_loops: int,
        documents: Tensor | None,
        collect_loops: CollectLoops,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        exit_rule: ExitRule | None = None,
    ) -> _Run:
        """Embedding, prelude and loops."""
        layout = token_layout(self.config, tokens, attention_mask, documents, cache)
        loops = check_loops(
            self.config.num_loops if num_loops is None else num_loops,
            tokens,
            cache,
            exit_rule,
            training=self.training and cache is None,
        )
        require_int("backprop_loops", backprop_loops, minimum=0)
        attention = self.config.attention
        context = attention_context(
            layout, attention.rotary_dim(self.config.dim), attention.rope_base, attention.window
        )
        router: dict[str, RouterStats] = {}
        x = self.embed(tokens)
        for index, layer in enumerate(self.prelude):
            slot = None if cache is None else cache.prelude_slot(index)
            x = self._layer(f"prelude.{index}", layer, x, context, slot, router)
        tracker = self._tracker(exit_rule, layout, context, cache)
        recurrence = self.recurrent(
            x,
            context,
            layout.positions(),
            num_loops=loops,
            backprop_loops=backprop_loops,
            cache=cache,
            tracker=tracker,
            collect=check_collected(collect_loops, loops),
        )
        if cache is not None and tracker is not None and tracker.rule.needs_logits:
            self._probe_unrun_loops(recurrence.state, context, cache, tracker.loops_run)
        for index, stats in enumerate(recurrence.router):
            if stats is not None:
                router[f"recurrent.layers.{index}"] = stats
        return _Run(recurrence, context, router)

    def _layer(
        self,
        name: str,
        layer: nn.Module,
        x: Hidden,
        context: AttentionContext,
        slot: CacheSlot | None,
        router: dict[str, RouterStats] | None,
        *,
        last_only: bool = False,
    ) -> Tensor:
        out = layer(x, context, slot=slot, last_only=last_only)
        if router is not None and out.router is not None:
            router[name] = out.router
        return out.x

    def _hidden(
        self,
        state: Hidden,
        context: AttentionContext,
        cache: KVCache | None = None,
        router: dict[str, RouterStats] | None = None,
        *,
        last_only: bool = False,
        probed_loop: int | None = None,
    ) -> Tensor:
        """Coda and norm on a state: what the head reads.

        `probed_loop`: only to see what the model would say after that loop, for an exit rule.
        """
        x = state
        for index, layer in enumerate(self.coda):
            slot = None
            if cache is not None and probed_loop is not None:
                slot = cache.probe_slot(index, probed_loop)
            elif cache is not None:
                slot = cache.coda_slot(index)
            last = last_only and index + 1 == len(self.coda)
            x = self._layer(f"coda.{index}", layer, x, context, slot, router, last_only=last)
        return self.norm(x[:, -1:] if last_only else x)

    def _head(self, hidden: Hidden) -> Logits:
        return F.linear(hidden, self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """[vocab_size, dim], the embedding's where they are tied."""
        return self.embed.weight if self.head is None else self.head.weight

    def _cross_entropy(self, hidden: Hidden, targets: TokenIds) -> Scalar:
        return linear_cross_entropy(hidden, self.head_weight, targets)

    def _logits(
        self,
        state: Hidden,
        context: AttentionContext,
        cache: KVCache | None,
        *,
        last_only: bool = False,
    ) -> Tensor:
        return self._head(self._hidden(state, context, cache, last_only=last_only))

    def _collected(self, run: _Run) -> Iterator[tuple[Hidden, AttentionContext]]:
        """Each collected output with the context of its rows."""
        order = run.recurrence.order
        context = run.context if order is None else run.context.select(order)
        for state in run.recurrence.outputs:
            yield state, context.rows(0, len(state))

    def _tracker(
        self,
        rule: ExitRule | None,
        layout: TokenLayout,
        context: AttentionContext,
        cache: KVCache | None,
    ) -> ExitTracker | None:
        if rule is None or isinstance(rule, FixedExit):
            return None
        shape = (1 if layout.valid is None else layout.valid.shape[0], layout.seq)
        valid = torch.ones(shape, dtype=torch.bool, device=layout.device)
        if layout.valid is not None:
            valid = layout.valid[:, layout.start :]
        if cache is not None and rule.needs_logits and len(self.coda):
            cache.keep_probes()

        def readout(state: Hidden, loop: int) -> Logits:
            return self._head(self._hidden(state, context, cache, probed_loop=loop))

        not_before = cache.exit_loop if cache is not None and cache.length else None
        return ExitTracker(rule, readout, valid, not_before)

    def _probe_unrun_loops(
        self, state: Hidden, context: AttentionContext, cache: KVCache, loops_run: int
    ) -> None:
        """The coda's keys and values in the loops that none of these tokens ran.

        Their state is final, but what a second coda layer makes of it also depends on earlier
        tokens, which may have looped on.
        """
        probed = loops_run
        if len(self.coda) > 1 and cache.length:
            probed = max(loops_run, int(cache.exit_loop.max()))
        for loop in range(loops_run, probed):
            self._hidden(state, context, cache, probed_loop=loop)
        cache.fill_probes(probed, state.shape[1])

    def compile_layers(self, **options: Any) -> None:
        """torch.compile all layers, the shared ones once for all loops; options are its own."""
        self.recurrent.compile_layers(**options)
        for layer in (*self.prelude, *self.coda):
            layer.compile(**options)

    def new_cache(
        self,
        batch: int,
        capacity: int,
        *,
        num_loops: int | None = None,
        prefill: CachePolicy | None = None,
        decode: CachePolicy | None = None,
        dtype: torch.dtype | None = None,
    ) -> KVCache:
        """A cache for `capacity` tokens and up to num_loops loops; policies default to exact."""
        c = self.config
        return KVCache(
            layers=(c.prelude_layers, c.recurrent_layers, c.coda_layers),
            kv_width=c.attention.kv_width(c.dim),
            batch=batch,
            capacity=capacity,
            num_loops=c.num_loops if num_loops is None else num_loops,
            prefill=ExactCache() if prefill is None else prefill,
            decode=ExactCache() if decode is None else decode,
            like=self.embed.weight.new_empty(0, dtype=dtype),
        )

    def next_logits(
        self,
        tokens: TokenIds,
        *,
        num_loops: int,
        exit_rule: ExitRule,
        attention_mask: Mask | None,
        cache: KVCache,
    ) -> tuple[NextLogits, LoopCounts]:
        """(logits after the last token, loops it ran); the tokens are appended to the cache."""
        out = self(
            tokens,
            num_loops=num_loops,
            exit_rule=exit_rule,
            attention_mask=attention_mask,
            cache=cache,
            last_only=True,
        )
        cache.advance(tokens.shape[1])
        return out.logits[:, 0], out.recurrence.loops_used[:, -1]

    @torch.no_grad()
    def update_router_bias(self, counts: Mapping[str, Tensor]) -> None:
        """Move every router's bias by the expert counts of a whole step, by layer name."""
        for name, count in counts.items():
            layer = self.get_submodule(name)
            assert isinstance(layer, Block) and isinstance(layer.feed_forward, MoELayer)
            layer.feed_forward.update_router_bias(count)

    def generate(
        self,
        prompt: TokenIds,
        *,
        max_new_tokens: int,
        num_loops: SupportsIndex | None = None,
        sampling: Sampling | None = None,
        exit_rule: ExitRule | None = None,
        attention_mask: Mask | None = None,
        stop_id: int | None = None,
    ) -> Tensor:
        """Continue prompt [batch, seq]; returns [batch, new tokens]. See `generation.stream`."""
        steps = self.stream(
            prompt,
            max_new_tokens=max_new_tokens,
            num_loops=num_loops,
            sampling=sampling,
            exit_rule=exit_rule,
            attention_mask=attention_mask,
            stop_id=stop_id,
        )
        tokens = [step.tokens for step in steps]
        return torch.stack(tokens, dim=1) if tokens else prompt.new_zeros(len(prompt), 0)

    def stream(
        self,
        prompt: TokenIds,
        *,
        max_new_tokens: int,
        num_loops: SupportsIndex | None = None,
        sampling: Sampling | None = None,
        exit_rule: ExitRule | None = None,
        attention_mask: Mask | None = None,
        stop_id: int | None = None,
    ) -> Iterator[generation.DecodeStep]:
        """Like `generate`, yielding each new token [batch] with the loops that it used."""
        request = generation.Request(
            max_new_tokens=max_new_tokens,
            num_loops=self.config.num_loops if num_loops is None else whole_number(num_loops),
            sampling=Sampling() if sampling is None else sampling,
            exit_rule=FixedExit() if exit_rule is None else exit_rule,
            stop_ids=() if stop_id is None else (stop_id,),
        )
        return generation.stream(self, prompt, request, attention_mask)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, each replaced as a whole."""
        storage.save(Path(folder), self.config, self.state_dict())

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, device: str | torch.device = "cpu"
    ) -> "OpenMythos":
        """Load what `save_pretrained` wrote onto a device; "auto" is the accelerator, if any.

        A file that does not fit, or a device that is not there, raises a ConfigError.
        """
        chosen = choose_device(device)
        config = storage.load_config(Path(folder))
        with torch.device("meta"):
            model = cls(config)
        weights = storage.load_weights(Path(folder), model.state_dict())
        model.load_state_dict(weights, assign=True)
        return model.to(chosen).eval()
