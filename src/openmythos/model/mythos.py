"""The model: embed -> prelude -> recurrent block, looped -> coda -> norm -> head."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openmythos.kernels.cross_entropy import IGNORE, linear_cross_entropy
from openmythos.kernels.precision import at_least_fp32
from openmythos.model import latents
from openmythos.model.config import MythosConfig
from openmythos.model.decoding import Decodable, exit_tracker, probe_unrun_loops
from openmythos.model.init import init_weights
from openmythos.model.inputs import ModelInputs, PassOptions, check_ids
from openmythos.model.outputs import MythosLosses, MythosOutput, by_layer
from openmythos.model.storage import Pretrained
from openmythos.nn.block import Block, FeedForward, Layers, LayerStats
from openmythos.nn.cache import Part
from openmythos.nn.linear import ReadoutMap
from openmythos.nn.norm import RMSNorm
from openmythos.recurrence import schedule
from openmythos.recurrence.conditioning import Conditioning
from openmythos.recurrence.exit_rules import ExitRule, FixedExit
from openmythos.recurrence.loop import RecurrentBlock
from openmythos.recurrence.trace import RecurrentOutput
from openmythos.types import Hidden, Scalar, TokenIds


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
        self.prelude = Layers(block(c.feed_forward) for _ in range(c.prelude_layers))
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
        self.coda = Layers(block(c.feed_forward) for _ in range(c.coda_layers))
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
        loop_logits = {}
        for loops, state in recurrence.outputs.items():
            rows = inputs.rows(recurrence.order, len(state))
            loop_logits[loops] = self.logits(self.hidden(state, rows, last_only=last_only))
        hidden = self.hidden(recurrence.state, inputs, router, last_only=last_only)
        return MythosOutput(self.logits(hidden), recurrence, by_layer(router), loop_logits)

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
        if targets.shape != tokens.shape:
            raise ValueError(
                f"targets: has shape {list(targets.shape)}, the tokens have {list(tokens.shape)}"
            )
        check_ids("targets", targets, self.config.vocab_size, ignored=IGNORE)
        inputs = ModelInputs.check(self.config, tokens, self.training, **options)
        recurrence, router = self.run(inputs)
        by_loop, order = {}, recurrence.order
        for loops, state in recurrence.outputs.items():
            hidden = self.hidden(state, inputs.rows(order, len(state)))
            some = (targets if order is None else targets[order])[: len(state)]
            if by_halting:
                rows = at_least_fp32(self.logits(hidden)).flatten(0, 1)
                each = F.cross_entropy(rows, some.flatten(), ignore_index=IGNORE, reduction="none")
                weighted = each * recurrence.halt_weights[loops].flatten()
                by_loop[loops] = weighted.sum() / (targets != IGNORE).sum()
            else:
                by_loop[loops] = self._loss(hidden, some)
        final = self._loss(self.hidden(recurrence.state, inputs, router), targets)
        return MythosLosses(final, by_loop, recurrence, by_layer(router))

    def _loss(self, hidden: Hidden, targets: TokenIds) -> Scalar:
        """Mean cross-entropy in nats over the targets that are not IGNORE.

        Without a softcap the logits of all tokens are never in memory at once.
        """
        if self.config.logit_softcap:
            logits = at_least_fp32(self.logits(hidden)).flatten(0, 1)
            return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE)
        if self.config.logit_scale != 1:
            hidden = hidden * self.config.logit_scale
        return linear_cross_entropy(hidden, self.head_weight, targets)

    def run(
        self,
        inputs: ModelInputs,
        exit_rule: ExitRule | None = None,
        embedded: Hidden | None = None,
    ) -> tuple[RecurrentOutput, dict[str, LayerStats]]:
        """Run embedding, prelude and loops; see `Decodable`."""
        plan, tracker = inputs.plan, None
        x = self.embedded(inputs.tokens) if embedded is None else embedded
        if inputs.latents is not None:
            x = latents.filled(self, x, inputs, exit_rule)
        x, router = self.prelude(x, inputs.views("prelude", len(self.prelude), collects=True))
        if exit_rule is not None and not isinstance(exit_rule, FixedExit):
            tracker = exit_tracker(self, exit_rule, inputs)
            plan = replace(plan, exits=tracker)
        recurrence = self.recurrent.scheduled(schedule.run, self.recurrent, x, inputs.context, plan)
        if tracker is not None:
            probe_unrun_loops(self, recurrence.state, inputs, tracker)
        return recurrence, {"prelude": router, "recurrent.layers": list(recurrence.router)}

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
        """Apply coda and final norm to a state: the head's input; see `Decodable`."""
        views = inputs.views(part, len(self.coda), loop, collects=router is not None)
        if last_only and views and state.shape[1] > 1:
            views[-1] = replace(views[-1], last_only=True)
        x, stats = self.coda(state, views)
        if router is not None:
            router["coda"] = stats
        return self.norm(x[:, -1:] if last_only else x)

    def compile_layers(self, **options: Any) -> None:
        """torch.compile all layers, the shared ones once for all loops; with torch's options."""
        # `Module.compile` does not affect copies: a copy runs its own weights, eagerly.
        block = self.recurrent
        for part in (*self.prelude, block.layers, *self.coda):
            part.compile(**options)

    @torch.no_grad()
    def update_router_bias(self, counts: Mapping[str, Tensor], scale: float = 1.0) -> None:
        """Update every router's bias from the expert counts of a step, by layer name.

        `scale`: the learning rate of this step / its highest value.
        """
        for name, count in counts.items():
            layer = self.get_submodule(name)
            assert isinstance(layer, Block)
            layer.feed_forward.update_router_bias(count, scale)
