"""Retrofitted recurrence (arXiv 2511.07384): pretrained Llama or OLMo 2 layers, made to loop.

    e = prelude(embed(x));  h_0 ~ truncated normal;  h = layers(W [h; e]);  logits of norm(coda(h))

Code: mcleish7/retrofitting-recurrence. model_type is Huginn's; the layers are the base model's.
"""

from collections.abc import Mapping
from typing import Any

from openmythos.hub.fields import Fields
from openmythos.hub.format import Format, attention_sizes, read_rope, swiglu, write_rope
from openmythos.hub.huginn import (
    MODEL_TYPE,
    adapter,
    all_layers,
    head_rules,
    layer_rules,
    read_heads,
    read_shape,
    write_shape,
)
from openmythos.hub.rules import Rule, same
from openmythos.model.config import MythosConfig
from openmythos.nn.block import NormPlace
from openmythos.nn.feed_forward import SwiGLU
from openmythos.nn.grouped_query import GroupedQueryAttention
from openmythos.recurrence.initial_state import EncodedState, NormalState, StateInit
from openmythos.recurrence.injections import Concat

# Norms of a layer by its class, and the base model.
_LLAMA: tuple[NormPlace, ...] = ("input",)
_OLMO: tuple[NormPlace, ...] = ("branch",)


def _base(data: Mapping[str, Any]) -> str:
    """The base model, which only the names of classes tell: "llama", "olmo" or ""."""
    named = f"{data.get('block_class_name', '')} {data.get('auto_map', '')}".lower()
    return next((base for base in ("olmo", "llama") if base in named), "")


def _recognises(data: Mapping[str, Any]) -> bool:
    block = data.get("block_class_name", "SandwichBlock")
    return data.get("model_type") == MODEL_TYPE and (bool(_base(data)) or block != "SandwichBlock")


def _read(fields: Fields) -> MythosConfig:
    heads, base = read_heads(fields), _base(fields.data)
    if not base:
        raise fields.error("block_class_name", "is not implemented: neither Llama's nor OLMo 2's")
    fields.unrelated("block_class_name", "rope_base", "mlp_class_name", "norm_class_name")
    fields.fixed("nonlin_name", "SiLU")
    fields.fixed("injection_type", "linear")
    fields.fixed("qk_bias", False)
    shape, rope = read_shape(fields), read_rope(fields)
    scales = fields.table("init_values")
    tied = fields.flag("tie_embeddings", False)
    fields.fixed("tie_word_embeddings", tied)
    fields.fixed("initial_state_mode", "random", "embed-init")
    state: StateInit = NormalState(truncate=3.0)
    if fields.get("initial_state_mode", "random") == "embed-init":
        state = EncodedState()
    return MythosConfig(
        attention=GroupedQueryAttention(
            num_heads=heads,
            num_kv_heads=fields.integer("num_key_value_heads", heads),
            qk_norm=base == "olmo",
            qk_norm_kind="width" if base == "olmo" else "head",
            **rope,
        ),
        injection=Concat(),
        state_init=state,
        prelude_norm=False,
        block_norms=_OLMO if base == "olmo" else _LLAMA,
        embed_scale=float(scales.get("embed_scale", 1.0)),
        tie_embeddings=tied,
        norm_eps=fields.number("norm_eps", 1e-6),
        **swiglu(fields.integer("intermediate_size")),
        **shape,
    )


def _rules(config: MythosConfig) -> list[Rule]:
    attention, _, _ = attention_sizes(config)
    place = "" if config.block_norms == _LLAMA else "branch_"
    norms = {
        "norm_1.weight": f"attention_{place}norm.weight",
        "norm_2.weight": f"feed_forward_{place}norm.weight",
    }
    if attention.qk_norm:
        norms |= {"attn.q_norm.weight": "attention.query_norm.weight"}
        norms |= {"attn.k_norm.weight": "attention.key_norm.weight"}
    return [
        *head_rules(config),
        *all_layers(config, layer_rules(config, norms, half_split=True)),
        adapter(config),
        same("transformer.ln_f.weight", "norm.weight"),
    ]


def _write(config: MythosConfig) -> dict[str, Any]:
    attention, _, _ = attention_sizes(config)
    feed_forward = config.feed_forward
    assert isinstance(feed_forward, SwiGLU)
    name = "Llama" if config.block_norms == _LLAMA else "Olmo"
    random = isinstance(config.state_init, NormalState)
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["RavenForCausalLM"],
        **write_shape(config),
        "block_class_name": f"{name}DecoderLayer",
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        **write_rope(attention),
        "qk_bias": False,
        "injection_type": "linear",
        "initial_state_mode": "random" if random else "embed-init",
        "nonlin_name": "SiLU",
        "intermediate_size": feed_forward.hidden_dim,
        "norm_eps": config.norm_eps,
        "init_values": {"embed_scale": config.embed_scale},
        "tie_embeddings": config.tie_embeddings,
        "tie_word_embeddings": config.tie_embeddings,
    }


RETROFIT = Format(
    name="retrofit",
    family="Retrofitted recurrence (arXiv 2511.07384): Llama, OLMo 2",
    recognises=_recognises,
    read=_read,
    rules=_rules,
    write=_write,
    ignored=("freqs_cis", "*rotary_emb.inv_freq"),
    exits="kl or argmax; no rule was published for these models",
)
