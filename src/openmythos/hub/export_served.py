"""An exported model inside vLLM, which runs it by its backend for models of transformers.

vLLM keeps keys and values itself. It makes a cache for every module that has a `layer_idx` and
whose `forward` calls what it finds in ALL_ATTENTION_FUNCTIONS; it reads the source to see that. So
there is such a module, without parameters, for every layer in every loop.

vLLM also replaces linear maps by its own, whose `forward` takes no deltas. They are hidden from it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from openmythos.config import require
from openmythos.hub.export_config import OpenMythosConfig
from openmythos.model.config import MythosConfig
from openmythos.model.inputs import ModelInputs
from openmythos.model.mythos import OpenMythos
from openmythos.nn.latent_attention import LatentAttention
from openmythos.nn.layout import AttentionContext, TokenLayout, rope_tables
from openmythos.recurrence.halting import NoHalting
from openmythos.recurrence.schedule import LoopPlan
from openmythos.types import Hidden, TokenIds

IMPLEMENTATION = "vllm"  # what vLLM calls its attention among those of transformers


class AttentionSlot(nn.Module):
    """Attention of one layer in one loop, on keys and values that vLLM keeps."""

    is_causal = True

    def __init__(self, config: OpenMythosConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Output [1, heads, tokens, value_dim] for query [1, heads, tokens, head_dim].

        Keys and values are those of the same tokens; they may have fewer heads.
        """
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, _ = attend(self, query, key, value, None)
        return out.view(query.shape[2], query.shape[1], -1).transpose(0, 1)[None]


@dataclass(frozen=True, kw_only=True)
class SlotContext(AttentionContext):
    """Positions of one pass. Each call of `attend` takes the next slot: layers run in order."""

    slots: Iterator[Any]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        # vLLM's scale is head_dim^-0.5, which is that of both kinds of attention.
        out: Tensor = next(self.slots)(query, key, value)
        return out


def attention_slots(model: OpenMythos, config: OpenMythosConfig) -> nn.ModuleList:
    """If vLLM builds the model, a slot per layer and loop, in the order they run; else none."""
    if config._attn_implementation != IMPLEMENTATION:
        return nn.ModuleList()
    _check(model.config)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    hidden = {kind: _hidden(kind) for kind in {type(module) for module in linear}}
    for module in linear:
        module.__class__ = hidden[type(module)]  # type: ignore[assignment]
    return nn.ModuleList(AttentionSlot(config, i) for i in range(config.num_hidden_layers))


def hidden_states(
    model: OpenMythos, slots: nn.ModuleList, tokens: TokenIds, positions: Tensor
) -> Hidden:
    """The head's input [1, seq, dim] for tokens [1, seq] of several requests, one after another.

    positions [1, seq] are those in each request.
    """
    c, cos, sin = model.config, None, None
    attention = c.attention
    if width := attention.rotary_dim(c.dim):
        cos, sin = rope_tables(
            positions[:, None], width, attention.rope_base, attention.rope_scaling
        )
    context = SlotContext(
        positions, cos, sin, mask=None, is_causal=True, tokens=tokens, slots=iter(slots)
    )
    layout = TokenLayout(tokens.shape[1], 0, tokens.device)
    plan = LoopPlan(num_loops=c.num_loops)
    inputs = ModelInputs(tokens=tokens, layout=layout, context=context, plan=plan, training=False)
    recurrence, _ = model.run(inputs)
    return model.hidden(recurrence.state, inputs)


def _hidden(kind: type[nn.Linear]) -> type[nn.Module]:
    """The same class, but not derived from `nn.Linear`, by which vLLM knows what to replace."""
    parents = [parent for parent in reversed(kind.__mro__) if issubclass(parent, nn.Linear)]
    own = {name: x for parent in parents for name, x in vars(parent).items()}
    return type(kind.__name__, (nn.Module,), own)


def _check(c: MythosConfig) -> None:
    """Raise a ConfigError for a model that vLLM would compute wrongly, or not at all."""
    kind, text = c.halting.kind, "must be 'none' in vLLM, which runs all loops at all positions"
    require(isinstance(c.halting, NoHalting), "halting", kind, text)
    if isinstance(c.attention, LatentAttention):
        a, most = c.attention, c.attention.nope_head_dim + c.attention.rope_head_dim
        text = f"must be at most nope_head_dim + rope_head_dim = {most} in vLLM"
        require(a.value_head_dim <= most, "value_head_dim", a.value_head_dim, text)
    text = "must be 0 in vLLM if logit_scale is not 1: vLLM applies the two in the other order"
    in_order = not c.logit_softcap or c.logit_scale == 1
    require(in_order, "logit_softcap", c.logit_softcap, text)
