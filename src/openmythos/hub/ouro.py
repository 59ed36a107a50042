"""Ouro (arXiv 2510.25741) and Nanbeige 4.2 share a shape: a whole transformer looped, no injection.

    h = embed(x);  repeat: h = norm(layers(h));  logits of h

Ouro has norms on both sides of every branch, and a gate that gives every loop an exit probability.
"""

from typing import Any

from openmythos.hub.fields import Fields
from openmythos.hub.format import (
    Format,
    full_attention,
    model_type,
    read_attention,
)
from openmythos.hub.llama import plain_rules, read_plain, write_plain
from openmythos.hub.rules import Rule, fused, same
from openmythos.model.config import MythosConfig
from openmythos.recurrence.halting import ExitGate

_NORMS = {
    "input_layernorm.weight": "attention_norm.weight",
    "input_layernorm_2.weight": "attention_branch_norm.weight",
    "post_attention_layernorm.weight": "feed_forward_norm.weight",
    "post_attention_layernorm_2.weight": "feed_forward_branch_norm.weight",
}


def _read(fields: Fields) -> MythosConfig:
    parts = read_plain(fields)
    attention = read_attention(fields)
    full_attention(fields)
    fields.off("early_exit_step", "use_weighted_exit", "exit_at_step")
    threshold = fields.number("early_exit_threshold", 1.0)
    return MythosConfig(
        attention=attention,
        **parts
        | {
            "num_loops": fields.integer("total_ut_steps", 4),
            "block_norms": ("input", "branch"),
            "loop_norm": "weighted",
            "final_norm": False,
            "halting": ExitGate(threshold=threshold),
        },
    )


def _rules(config: MythosConfig) -> list[Rule]:
    gate = "model.early_exit_gate"
    weight = fused(f"{gate}.weight", ["recurrent.halting.weight"], (1,))
    return [
        *plain_rules(config, _NORMS, same("model.norm.weight", "recurrent.loop_norm.weight")),
        weight.then(lambda x: [x[0][0]], lambda x: [x[0][None]]),
        same(f"{gate}.bias", "recurrent.halting.bias"),
    ]


def _write(config: MythosConfig) -> dict[str, Any]:
    halting = config.halting
    assert isinstance(halting, ExitGate)
    found = write_plain(config, "ouro", "OuroForCausalLM")
    loops = {"total_ut_steps": config.num_loops, "early_exit_threshold": halting.threshold}
    return found | loops


OURO = Format(
    name="ouro",
    family="Ouro (arXiv 2510.25741)",
    recognises=model_type("ouro"),
    read=_read,
    rules=_rules,
    write=_write,
    exits="its own gate: halting.threshold below 1, readout select (theirs), freeze or expected",
)
