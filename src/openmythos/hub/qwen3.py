"""Qwen3 (dense): Llama with QK-norm per head, as one loop."""

from typing import Any

from openmythos.hub.fields import Fields
from openmythos.hub.format import ONE_LOOP, Format, full_attention, model_type, read_attention
from openmythos.hub.llama import NORMS, plain_rules, read_plain, write_plain
from openmythos.hub.rules import Rule, same
from openmythos.model.config import MythosConfig

QK_NORMS = {f"self_attn.{x[0]}_norm.weight": f"attention.{x}_norm.weight" for x in ("query", "key")}


def _read(fields: Fields) -> MythosConfig:
    full_attention(fields)
    return MythosConfig(attention=read_attention(fields, qk_norm=True), **read_plain(fields))


def _rules(config: MythosConfig) -> list[Rule]:
    return plain_rules(config, NORMS | QK_NORMS, same("model.norm.weight", "norm.weight"))


def _write(config: MythosConfig) -> dict[str, Any]:
    return write_plain(config, "qwen3", "Qwen3ForCausalLM")


QWEN3 = Format(
    name="qwen3",
    family="Qwen3 (dense): one loop",
    recognises=model_type("qwen3"),
    read=_read,
    rules=_rules,
    write=_write,
    exits=ONE_LOOP,
)
