"""The model: embed -> prelude -> recurrent block, looped -> coda -> norm -> head."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from openmythos.kernels.cross_entropy import IGNORE
from openmythos.model.config import MythosConfig
from openmythos.model.decoding import Decodable, exit_tracker, probe_unrun_loops
from openmythos.model.head import loss_of, weighted_sum
from openmythos.model.init import init_weights
from openmythos.model.inputs import ModelInputs, PassOptions, check_targets
from openmythos.model.outputs import MythosLosses, MythosOutput, without_none
from openmythos.model.storage import Pretrained
from openmythos.nn.block import Block, FeedForward
from openmythos.nn.feed_forward import RouterStats
from openmythos.nn.linear import ReadoutMap
from openmythos.nn.norm import RMSNorm
from openmythos.nn.view import KVView, NoCache
from openmythos.recurrence import schedule
from openmythos.recurrence.conditioning import Conditioning
from openmythos.recurrence.exit_rules import ExitRule
from openmythos.recurrence.loop import RecurrentBlock
from openmythos.recurrence.trace import RecurrentOutput
from openmythos.types import Hidden, TokenIds


class OpenMythos(Decodable, Pretrained):
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
        self.config = c = config

        def block(feed_forward: FeedForward) -> Block:
            return Block(c.dim, c.attention, feed_forward, c.norm_eps, c.block_norms)

        def norm(wanted: bool, *, weighted: bool = True) -> nn.Module:
            return RMSNorm(c.dim, c.norm_eps, weighted=weighted) if wanted else nn.Identity()

        self.embed = nn.Embedding(c.vocab_size, c.dim)
        self.prelude = nn.ModuleList(block(c.feed_forward) for _ in range(c.prelude_layers))
        self.recurrent = RecurrentBlock(
            [block(c.recurrent_feed_forward) for _ in range(c.recurrent_layers)],
            norm=norm(c.prelude_norm),
            initial_state=c.state_init,
            injection=c.injection.build(c.dim),
            conditioning=lambda layers: Conditioning(c.dim, layers, c.loop_embedding, c.loop_lora),
            halting=c.halting.build(c.dim),
            loop_norm=norm(c.loop_norm != "none", weighted=c.loop_norm == "weighted"),
            readout_norm=norm(c.readout_norm),
            readout_map=ReadoutMap(c.dim) if c.readout_map else nn.Identity(),
        )
        self.coda = nn.ModuleList(block(c.feed_forward) for _ in range(c.coda_layers))
        for layers in (self.prelude, self.recurrent.layers, self.coda):
            c.value_embeddings.add_to(layers, c.vocab_size)
        self.norm = norm(c.final_norm)
        # A tied head is the embedding itself, not a second name for it in checkpoints.
        self.head = None if c.tie_embeddings else nn.Linear(c.dim, c.vocab_size, bias=False)
        device = self.embed.weight.device
        if device.type != "meta":
            generator = None if seed is None else torch.Generator(device).manual_seed(seed)
            init_weights(self, zero_outputs=config.zero_init_outputs, generator=generator)

    def forward(
        self,
        tokens: TokenIds,
        *,
        exit_rule: ExitRule | None = None,
        last_only: bool = False,
        **options: Unpack[PassOptions],
    ) -> MythosOutput:
        """Run tokens [batch, seq] through num_loops loops; `PassOptions` has all options.

        exit_rule: inference only, lets positions stop before num_loops. last_only: head and last
        coda layer run only at the last position; logits are [batch, 1, vocab].
        """
        inputs = ModelInputs.check(
            self.config, tokens, self.training, has_exits=exit_rule is not None, **options
        )
        recurrence, router = self.run(inputs, exit_rule)
        ordered = inputs.sorted_rows(recurrence.order)
        loop_logits = {
            loops: self.logits(self.hidden(state, ordered.rows(len(state)), last_only=last_only))
            for loops, state in recurrence.outputs.items()
        }
        hidden = self.hidden(recurrence.state, inputs, router, last_only=last_only)
        if inputs.cache is not None:
            inputs.cache.note_exits(recurrence.loops_used)
        return MythosOutput(self.logits(hidden), recurrence, without_none(router), loop_logits)

    def losses(
        self,
        tokens: TokenIds,
        targets: TokenIds,
        *,
        by_halting: bool = False,
        **options: Unpack[PassOptions],
    ) -> MythosLosses:
        """Cross-entropy against targets [batch, seq]; a target of IGNORE = -100 does not count.

        Equal to the loss of the logits of `forward`, but without the logits of all tokens in memory
        at once. by_halting: `by_loop` has, for each loop, the mean over all targets of loss times
        halting weight. The entries sum to the expected loss; all logits of one loop are in memory
        then.
        """
        check_targets(targets, tokens, self.config.vocab_size)
        inputs = ModelInputs.check(self.config, tokens, self.training, **options)
        recurrence, router = self.run(inputs)
        ordered, sorted_targets = inputs.sorted_rows(recurrence.order), targets
        if recurrence.order is not None:
            sorted_targets = targets[recurrence.order]
        loss = partial(loss_of, self.config, weight=self.head_weight)
        by_loop = {}
        for loops, state in recurrence.outputs.items():
            hidden = self.hidden(state, ordered.rows(len(state)))
            some = sorted_targets[: len(state)]
            if by_halting:
                weighted = weighted_sum(self.logits(hidden), some, recurrence.halt_weights[loops])
                by_loop[loops] = weighted / (targets != IGNORE).sum()
            else:
                by_loop[loops] = loss(hidden=hidden, targets=some)
        final = loss(hidden=self.hidden(recurrence.state, inputs, router), targets=targets)
        return MythosLosses(final, by_loop, recurrence, without_none(router))

    def run(
        self, inputs: ModelInputs, exit_rule: ExitRule | None = None
    ) -> tuple[RecurrentOutput, dict[str, RouterStats | None]]:
        """Run embedding, prelude and loops; also returns router statistics by layer name."""
        router: dict[str, RouterStats | None] = {}
        x = self.embed(inputs.tokens)
        if self.config.embed_scale != 1:
            x = x * self.config.embed_scale
        for index, layer in enumerate(self.prelude):
            kv = NoCache() if inputs.cache is None else inputs.cache.prelude(index, x.shape[1])
            x, router[f"prelude.{index}"] = layer(x, inputs.view(kv))
        tracker = exit_tracker(self, exit_rule, inputs)
        recurrence = self.recurrent.scheduled(
            schedule.run,
            self.recurrent,
            x,
            inputs.context,
            inputs.layout.positions(),
            inputs.loop_plan(tracker),
        )
        if tracker is not None:
            probe_unrun_loops(self, recurrence.state, inputs, tracker)
        for index, stats in enumerate(recurrence.router):
            router[f"recurrent.layers.{index}"] = stats
        return recurrence, router

    def hidden(
        self,
        state: Hidden,
        inputs: ModelInputs,
        router: dict[str, RouterStats | None] | None = None,
        *,
        last_only: bool = False,
        probed_loop: int | None = None,
    ) -> Tensor:
        """Apply coda and final norm to a state: the head's input; see `Decodable`."""
        x, cache, seq = state, inputs.cache, state.shape[1]
        for index, layer in enumerate(self.coda):
            kv: KVView = NoCache()
            if cache is not None and probed_loop is not None:
                kv = cache.probe(index, seq, probed_loop)
            elif cache is not None:
                kv = cache.coda(index, seq)
            last = last_only and index + 1 == len(self.coda)
            x, stats = layer(x, inputs.view(kv, collects=router is not None), last_only=last)
            if router is not None:
                router[f"coda.{index}"] = stats
        return self.norm(x[:, -1:] if last_only else x)

    def compile_layers(self, **options: Any) -> None:
        """torch.compile all layers, the shared ones once for all loops; with torch's options."""
        # `Module.compile` does not affect copies: a copy runs its own weights, eagerly.
        block = self.recurrent
        for part in (*self.prelude, block.entry, block.layers, *self.coda):
            part.compile(**options)

    @torch.no_grad()
    def update_router_bias(self, counts: Mapping[str, Tensor]) -> None:
        """Update every router's bias from the expert counts of a step, by layer name."""
        for name, count in counts.items():
            layer = self.get_submodule(name)
            assert isinstance(layer, Block)
            layer.feed_forward.update_router_bias(count)
