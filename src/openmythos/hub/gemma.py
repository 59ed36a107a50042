"""Gemma (the first): GeGLU, scaled embeddings, norm weights stored without their 1; as one loop.

Gemma 2 and 3 are refused: their attention has a softcap, and windows in some of its layers.
"""

import math
from typing import Any

from openmythos.hub.fields import Fields
from openmythos.hub.format import ONE_LOOP, Format, model_type, read_attention
from openmythos.hub.llama import NORMS, plain_rules, read_plain, write_plain
from openmythos.hub.rules import Rule, plus_one
from openmythos.model.config import MythosConfig
from openmythos.nn.feed_forward import GeGLU

_ACTIVATIONS = ("gelu_pytorch_tanh",)


def _read(fields: Fields) -> MythosConfig:
    fields.fixed("hidden_activation", *_ACTIVATIONS)
    fields.off("use_bidirectional_attention")
    # The first releases say "gelu" and mean the approximation.
    named = (*_ACTIVATIONS, "gelu")
    parts = read_plain(fields, layer=GeGLU, activations=named, tied=True)
    parts["embed_scale"] = math.sqrt(parts["dim"])
    return MythosConfig(attention=read_attention(fields), **parts)


def _rules(config: MythosConfig) -> list[Rule]:
    found = plain_rules(config, NORMS, plus_one("model.norm.weight", "norm.weight"))
    norms = tuple(NORMS)
    return [
        plus_one(rule.theirs[0], rule.ours[0]) if rule.theirs[0].endswith(norms) else rule
        for rule in found
    ]


def _write(config: MythosConfig) -> dict[str, Any]:
    found = write_plain(config, "gemma", "GemmaForCausalLM")
    return found | {"hidden_act": _ACTIVATIONS[0], "hidden_activation": _ACTIVATIONS[0]}


GEMMA = Format(
    name="gemma",
    family="Gemma (the first): one loop",
    recognises=model_type("gemma"),
    read=_read,
    rules=_rules,
    write=_write,
    exits=ONE_LOOP,
)
