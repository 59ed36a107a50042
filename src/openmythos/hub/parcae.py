"""Parcae (arXiv 2604.12946): LTI injection, value embeddings, a linear map after the loops.

    e = norm(prelude(embed(x)));  h = layers(decay h + dt B e);  logits of norm(coda(C h))

Code: sandyresearch/parcae. The weights are pickles, which are read with `weights_only`.
"""

from collections.abc import Mapping
from typing import Any

from openmythos.hub.fields import Fields
from openmythos.hub.format import Format, attention_sizes
from openmythos.hub.huginn import (
    PARTS,
    adapter,
    head_rules,
    read_shape,
    write_shape,
)
from openmythos.hub.rules import Rule, interleaved, layers, same, scaled, under
from openmythos.model.config import MythosConfig
from openmythos.nn.feed_forward import ReLU2
from openmythos.nn.grouped_query import GroupedQueryAttention
from openmythos.nn.value_embedding import GatedValueEmbeddings
from openmythos.recurrence.initial_state import NormalState
from openmythos.recurrence.injection import LTI
from openmythos.recurrence.injections import Add, Concat, Injection

_INJECTIONS: dict[str, Injection] = {
    "diagonal": LTI(discretization="euler", input_map="dense", max_decay=1.0),
    "linear": Concat(),
    "add": Add(),
}
# torch's default, which the code of Parcae leaves to torch.
_QK_NORM_EPS = 2.0**-23


def _recognises(data: Mapping[str, Any]) -> bool:
    return data.get("_class_name") == "ParcaeConfig" or data.get("model_class_name") == "Parcae"


def _read(fields: Fields) -> MythosConfig:
    heads, shape = fields.integer("num_attention_heads"), read_shape(fields)
    width = fields.integer("intermediate_size")
    fields.fixed("num_key_value_heads", heads)
    fields.fixed("recurrent_embedding_dimension", shape["dim"])
    fields.fixed("recurrent_intermediation_embedding_dimension", width)
    fields.fixed("recurrent_num_attention_heads", heads)
    fields.fixed("block_class_name", "TransformerPreNormBlock")
    fields.fixed("norm_class_name", "RMSNorm")
    fields.fixed("mlp_class_name", "BaseMLP")
    fields.fixed("nonlin_name", "ReLU2")
    fields.fixed("qk_norm", True)
    fields.fixed("mup_model_scaling_factor", 1)
    fields.fixed("injection_type", *_INJECTIONS)
    fields.unrelated("recurrent_iteration_method", "emb_scale", "logit_scale")
    fields.off("qk_bias", "randomize_positions_from", "use_abacus")
    rope = dict(fields.table("rope_settings"))
    if not rope.get("use_rope", True) or rope.get("rope_condense_ratio", 1) != 1:
        raise fields.error("rope_settings", "is not implemented, only use_rope without condensing")
    for part in ("prelude_layers", "recurrent_layers", "coda_layers"):
        if shape[part] % 2:  # which layers have tables then depends on more than their index
            raise fields.error(f"n_layers_in_{part}", "is not implemented, must be even")
    feed_forward = ReLU2(hidden_dim=width)
    return MythosConfig(
        attention=GroupedQueryAttention(
            num_heads=heads,
            num_kv_heads=heads,
            rope_base=float(rope.get("rope_base", 50_000.0)),
            qk_norm=True,
            qk_norm_kind="plain",
            qk_norm_eps=_QK_NORM_EPS,
        ),
        value_embeddings=GatedValueEmbeddings(),
        feed_forward=feed_forward,
        recurrent_feed_forward=feed_forward,
        injection=_INJECTIONS[fields.get("injection_type", "diagonal")],
        state_init=NormalState(truncate=3.0),
        prelude_norm=fields.flag("prelude_norm", True),
        readout_map=True,
        embed_scale=fields.number("emb_scale", 1.0),
        logit_scale=fields.number("logit_scale", 1.0),
        tie_embeddings=fields.flag("tie_embeddings", True),
        norm_eps=fields.number("norm_eps", 1e-5),
        **shape,
    )


def _layer(config: MythosConfig) -> list[Rule]:
    attention, _, _ = attention_sizes(config)
    head_dim = attention.size(config.dim)
    query, key = (
        interleaved(same(f"attn.c_{part[0]}.weight", f"attention.{part}.weight"), head_dim)
        for part in ("query", "key")
    )
    return [
        query,
        key,
        same("attn.c_v.weight", "attention.value.weight"),
        same("attn.c_proj.weight", "attention.output.weight"),
        same("mlp.fc.weight", "feed_forward.up.weight"),
        # Their activation is relu(x)^2 / 2.
        scaled(same("mlp.proj.weight", "feed_forward.down.weight"), 0.5),
        same("norm_1.weight", "attention_norm.weight"),
        same("norm_2.weight", "feed_forward_norm.weight"),
    ]


def _injection(config: MythosConfig) -> list[Rule]:
    if isinstance(config.injection, Concat):
        return [adapter(config)]
    if isinstance(config.injection, Add):
        return []
    names = {"A_log": "log_rate", "dt_bias": "raw_step_size", "B": "input_map"}
    pairs = [same(theirs, ours) for theirs, ours in names.items()]
    return under("transformer.adapter.", "recurrent.injection.", pairs)


def _rules(config: MythosConfig) -> list[Rule]:
    found = [*head_rules(config), *_injection(config)]
    for number, (ours, index) in enumerate(layers(config)):
        theirs = f"transformer.{PARTS[ours.rsplit('.', 2)[0]]}.{index}."
        found += under(theirs, ours, _layer(config))
        if index % 2:
            table = f"{ours}attention.value_embedding."
            found.append(same(f"value_embeds.{number}.weight", f"{table}table.weight"))
            found.append(same(f"{theirs}attn.ve_gate.weight", f"{table}gate.weight"))
    if config.prelude_norm:
        found.append(same("transformer.ln_prelude.weight", "recurrent.prelude_norm.weight"))
    found.append(same("transformer.C.weight", "recurrent.readout_map.weight"))
    found.append(same("transformer.ln_f.weight", "norm.weight"))
    return found


def _write(config: MythosConfig) -> dict[str, Any]:
    attention, _, _ = attention_sizes(config)
    feed_forward = config.feed_forward
    assert isinstance(feed_forward, ReLU2)
    kinds = {injection.kind: name for name, injection in _INJECTIONS.items()}
    return {
        "_class_name": "ParcaeConfig",
        **write_shape(config),
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "rope_settings": {"use_rope": True, "rope_base": attention.rope_base},
        "qk_norm": True,
        "qk_bias": False,
        "intermediate_size": feed_forward.hidden_dim,
        "nonlin_name": "ReLU2",
        "injection_type": kinds.get(config.injection.kind, "diagonal"),
        "prelude_norm": config.prelude_norm,
        "emb_scale": config.embed_scale,
        "logit_scale": config.logit_scale,
        "norm_eps": config.norm_eps,
        "tie_embeddings": config.tie_embeddings,
    }


PARCAE = Format(
    name="parcae",
    family="Parcae (arXiv 2604.12946)",
    recognises=_recognises,
    read=_read,
    rules=_rules,
    write=_write,
    ignored=("freqs_cis",),
    exits="kl or argmax; none was published",
)
