"""Nanbeige 4.2 (arXiv 2607.22083): a Llama whose layers run twice, with a norm after each loop."""

from typing import Any

from openmythos.hub.fields import Fields
from openmythos.hub.format import Format, full_attention, model_type, read_attention
from openmythos.hub.llama import NORMS, plain_rules, read_plain, write_plain
from openmythos.hub.rules import Rule, same
from openmythos.model.config import MythosConfig


def _read(fields: Fields) -> MythosConfig:
    parts = read_plain(fields)
    attention = read_attention(fields)
    full_attention(fields)
    fields.off("qk_layernorm", "emb_neighbor_num", "insert_ngram_layer_idx", "loop_share_kv")
    fields.off("ngram_insert_all_layers", "enable_double_loop_split", "loop_middle_layers")
    fields.off("enable_hyper_connection", "enable_mhc", "enable_h_res_identity")
    fields.off("enable_depth_attention")
    fields.fixed("kv_channels", attention.size(parts["dim"]))
    weights = fields.get("loop_loss_weights", [])
    num_loops = fields.integer("num_loops", len(weights) + 1 if weights else 1)
    if weights and len(weights) + 1 != num_loops:
        raise fields.error("loop_loss_weights", f"does not fit num_loops = {num_loops}")
    # Without the norm between loops the same weight is the norm before the head.
    skips = fields.flag("skip_loop_final_norm", False)
    parts |= {"num_loops": num_loops, "final_norm": skips}
    return MythosConfig(attention=attention, loop_norm="none" if skips else "weighted", **parts)


def _rules(config: MythosConfig) -> list[Rule]:
    norm = "norm.weight" if config.final_norm else "recurrent.loop_norm.weight"
    return plain_rules(config, NORMS, same("model.norm.weight", norm))


def _write(config: MythosConfig) -> dict[str, Any]:
    found = write_plain(config, "nanbeige", "NanbeigeForCausalLM")
    return found | {"num_loops": config.num_loops, "skip_loop_final_norm": config.final_norm}


NANBEIGE = Format(
    name="nanbeige",
    family="Nanbeige 4.2 (arXiv 2607.22083)",
    recognises=model_type("nanbeige"),
    read=_read,
    rules=_rules,
    write=_write,
    exits="kl or argmax; none was published",
)
