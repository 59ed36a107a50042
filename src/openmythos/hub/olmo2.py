"""OLMo 2: norms on the outputs of the branches, QK-norm over the whole width; as one loop."""

from typing import Any

from openmythos.hub.fields import Fields
from openmythos.hub.format import ONE_LOOP, Format, full_attention, model_type, read_attention
from openmythos.hub.llama import plain_rules, read_plain, write_plain
from openmythos.hub.qwen3 import QK_NORMS
from openmythos.hub.rules import Rule, same
from openmythos.model.config import MythosConfig

_NORMS = {
    "post_attention_layernorm.weight": "attention_branch_norm.weight",
    "post_feedforward_layernorm.weight": "feed_forward_branch_norm.weight",
}


def _read(fields: Fields) -> MythosConfig:
    full_attention(fields)
    attention = read_attention(fields, qk_norm=True, qk_norm_kind="width")
    return MythosConfig(attention=attention, block_norms=("branch",), **read_plain(fields))


def _rules(config: MythosConfig) -> list[Rule]:
    return plain_rules(config, _NORMS | QK_NORMS, same("model.norm.weight", "norm.weight"))


def _write(config: MythosConfig) -> dict[str, Any]:
    return write_plain(config, "olmo2", "Olmo2ForCausalLM")


OLMO2 = Format(
    name="olmo2",
    family="OLMo 2: one loop",
    recognises=model_type("olmo2"),
    read=_read,
    rules=_rules,
    write=_write,
    exits=ONE_LOOP,
)
