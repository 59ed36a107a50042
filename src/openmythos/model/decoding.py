"""The model's decoding interface: KV cache, next-token logits, exit rules that read logits.

Such an exit rule computes a loop's logits with the coda. Without a cache the coda attends to all
earlier tokens in their state after that loop. Cached decoding must match, so the cache keeps the
coda's keys and values of every loop: the probes.
"""

from abc import ABC, abstractmethod
from typing import SupportsIndex

import torch
from torch import Tensor, nn

import openmythos.nn.few_rows  # noqa: F401  lets `Layers` decode natively; exports do without
from openmythos.config import require
from openmythos.inference import generation
from openmythos.inference.contrast import Contrast
from openmythos.inference.native_step import native_step
from openmythos.inference.sampling import Sampling
from openmythos.kernels.linear import linear
from openmythos.model.config import MythosConfig
from openmythos.model.inputs import ModelInputs, refuse_value_embeddings, whole_number
from openmythos.model.stages import Stages
from openmythos.nn.block import Attention, Layers, LayerStats
from openmythos.nn.cache import CachePolicy, ExactCache, KVCache, Part
from openmythos.recurrence.exit_rules import EarlyExit, ExitRule, ExitTracker, FixedExit
from openmythos.recurrence.loop import RecurrentBlock
from openmythos.recurrence.trace import RecurrentOutput
from openmythos.types import Hidden, Logits, LoopCounts, Mask, NextLogits, TokenIds


def exit_tracker(model: "Decodable", rule: EarlyExit, inputs: ModelInputs) -> ExitTracker:
    """What applies the rule to the loops of a pass."""
    layout, cache = inputs.layout, inputs.plan.cache
    if cache is not None and rule.needs_logits and len(model.coda):
        cache.keep_probes()

    def readout(state: Hidden, loop: int) -> Logits:
        return model.logits(model.hidden(state, inputs, part="probe", loop=loop))

    if layout.valid is None:
        valid = torch.ones(1, layout.seq, dtype=torch.bool, device=layout.device)
    else:
        valid = layout.valid[:, layout.start :]
    not_before = cache.exit_loop if cache is not None and cache.length else None
    return ExitTracker(rule, readout, valid, not_before)


def probe_unrun_loops(
    model: "Decodable", state: Hidden, inputs: ModelInputs, tracker: ExitTracker
) -> None:
    """Fill the coda's keys and values for the loops that none of these tokens ran.

    The state of these tokens is final, but the K/V of a second coda layer also depend on earlier
    tokens, which may have run more loops.
    """
    cache, probed = inputs.plan.cache, tracker.loops_run
    if cache is None or not tracker.rule.needs_logits:
        return
    if len(model.coda) > 1 and cache.length:
        probed = max(probed, int(cache.exit_loop.max()))
    for loop in range(tracker.loops_run, probed):
        model.hidden(state, inputs, part="probe", loop=loop)
    cache.fill_probes(probed, state.shape[1])


class Decodable(nn.Module, ABC):
    """The part of the model that decoding calls: see `inference.generation.DecodableModel`."""

    config: MythosConfig
    embed: nn.Embedding
    prelude: Layers
    recurrent: RecurrentBlock
    coda: Layers
    norm: nn.Module
    head: nn.Linear | None

    @abstractmethod
    def run(
        self,
        inputs: ModelInputs,
        exit_rule: ExitRule | None = None,
        embedded: Hidden | None = None,
    ) -> tuple[RecurrentOutput, dict[str, LayerStats]]:
        """Run embedding, prelude and loops; also returns the router statistics of each part.

        `embedded`: input embeddings [batch, seq, dim] in place of those of the tokens.
        """

    @abstractmethod
    def hidden(
        self,
        state: Hidden,
        inputs: ModelInputs,
        router: dict[str, LayerStats] | None = None,
        *,
        last_only: bool = False,
        part: Part = "coda",
        loop: int = 0,
    ) -> Tensor:
        """Apply coda and final norm to a state: the head's input [batch, seq or 1, dim].

        `router`, if given, receives the coda's statistics. `part` and `loop`: where the cache keeps
        the coda's keys and values for this state, if it is not the last loop's.
        """

    def logits(self, hidden: Hidden, head: nn.Module | None = None) -> Logits:
        """Logits [batch, seq, vocab] from the output of `hidden`: scaled, then softcapped.

        `head` takes the place of the model's own.
        """
        logits = linear(hidden, self.head_weight) if head is None else head(hidden)
        cap = self.config.logit_softcap
        if self.config.logit_scale != 1:
            logits = logits * self.config.logit_scale
        return cap * torch.tanh(logits / cap) if cap else logits

    def embedded(self, tokens: TokenIds) -> Hidden:
        """The prelude's input [batch, seq, dim]."""
        x: Tensor = self.embed(tokens)
        return x if self.config.embed_scale == 1 else x * self.config.embed_scale

    @property
    def attention(self) -> Attention:
        """The config of every attention layer."""
        return self.config.attention

    @property
    def width(self) -> int:
        return self.config.dim

    @property
    def head_weight(self) -> Tensor:
        """[vocab_size, dim]; the embedding's weight if tied."""
        return self.embed.weight if self.head is None else self.head.weight

    @property
    def device(self) -> torch.device:
        """The device of the weights; `forward` needs its tokens there."""
        return self.embed.weight.device

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def context(self) -> int:
        """The longest sequence, in tokens."""
        return self.config.context

    def stages(self) -> Stages:
        """The parts of a pass, for rows in different loops: what an engine runs."""
        return Stages(self)

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
        contrast: Contrast,
        latent: bool = False,
    ) -> tuple[NextLogits, LoopCounts]:
        """(logits after the last token, loops it ran); the tokens are appended to the cache.

        Tokens and mask are not checked here: `inference.generation` did, once for all steps.
        """
        cache.check_loops(num_loops)
        if latent:
            require(cache.length > 0, "cache.length", 0, "must be more: a latent follows a token")
            refuse_value_embeddings(self.config)
        if cache.length and tokens.shape[1] == 1 and attention_mask is None and not latent:
            step = native_step(self, cache, num_loops, exit_rule, contrast)
            if step is not None:
                return step(tokens, exit_rule, cache)
        early = contrast.early_loops(num_loops)
        collect = (early,) if early else ()
        inputs = ModelInputs.decoding(
            self.config, tokens, attention_mask, num_loops, cache, collect
        )
        with Layers.unchanged():
            recurrence, _ = self.run(inputs, exit_rule, cache.hidden if latent else None)
            cache.hidden = self.hidden(recurrence.state, inputs, last_only=True)
        logits = self.logits(cache.hidden)
        if early:
            logits = contrast.adjusted(logits, self._early_logits(recurrence, inputs, cache, early))
        cache.advance(tokens.shape[1])
        return logits[:, 0], recurrence.loops_used[:, -1]

    def _early_logits(
        self, recurrence: RecurrentOutput, inputs: ModelInputs, cache: KVCache, loops: int
    ) -> Logits:
        """Logits [batch, 1, vocab] after so many loops; where a position ran fewer, its last."""
        cache.keep_early(loops)
        ran_fewer = (recurrence.loops_used < loops)[..., None]
        state = torch.where(ran_fewer, recurrence.state, recurrence.outputs[loops])
        return self.logits(self.hidden(state, inputs, last_only=True, part="early"))

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
        """Continue prompt [batch, seq]; returns [batch, new tokens].

        `inference.generation.stream` yields them one by one, with the loops that each used.
        """
        request = generation.Request(
            max_new_tokens=max_new_tokens,
            num_loops=self.config.num_loops if num_loops is None else whole_number(num_loops),
            sampling=Sampling() if sampling is None else sampling,
            exit_rule=FixedExit() if exit_rule is None else exit_rule,
            stop_ids=() if stop_id is None else (stop_id,),
        )
        steps = generation.stream(self, prompt, request, attention_mask)
        tokens = [step.tokens for step in steps]
        return torch.stack(tokens, dim=1) if tokens else prompt.new_zeros(len(prompt), 0)
