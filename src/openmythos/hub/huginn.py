"""Huginn (arXiv 2502.05171): prelude, recurrent block and coda of sandwich-norm layers.

    e = prelude(embed(x) sqrt(d));  h_0 ~ truncated normal;  h = layers(W [h; e])
    logits of norm(coda(norm(h)))

Code: seal-rg/recurrent-pretraining. The two norms after the loop are one tensor there.
"""

import math
from collections.abc import Mapping
from typing import Any

from openmythos.hub.fields import Fields
from openmythos.hub.format import Format, attention_sizes, swiglu
from openmythos.hub.rules import Rule, copies, fused, interleaved, layers, same, tied, under
from openmythos.model.config import MythosConfig
from openmythos.nn.feed_forward import SwiGLU
from openmythos.nn.grouped_query import GroupedQueryAttention
from openmythos.recurrence.initial_state import NormalState
from openmythos.recurrence.injections import Concat
from openmythos.recurrence.loop_lora import NoLoopLoRA

PARTS = {"prelude": "prelude", "recurrent.layers": "core_block", "coda": "coda"}
MODEL_TYPE = "huginn_raven"
EMBED, HEAD = "transformer.wte.weight", "lm_head.weight"


def read_shape(fields: Fields) -> dict[str, Any]:
    """What Huginn, the retrofitted models and Parcae have in common."""
    fields.unrelated("mean_backprop_depth", "sampling_scheme", "init_*", "padding_multiple")
    fields.unrelated("activation_checkpoint_impl", "architecture_class_name", "model_class_name")
    fields.unrelated("n_layers", "num_hidden_layers", "effective_expected_depth", "head_dim")
    fields.unrelated("test_time_noise_type", "padded_vocab_size", "use_fused_head")
    fields.fixed("bias", False)
    fields.fixed("state_init", "like-init")
    fields.off("test_time_noise", "clip_qkv", "logit_softcap")
    return {
        "vocab_size": fields.integer("padded_vocab_size", fields.integer("vocab_size", 0)),
        "dim": fields.integer("n_embd"),
        "context": fields.integer("block_size"),
        "prelude_layers": fields.integer("n_layers_in_prelude"),
        "recurrent_layers": fields.integer("n_layers_in_recurrent_block"),
        "coda_layers": fields.integer("n_layers_in_coda"),
        "num_loops": fields.integer("mean_recurrence"),
        "loop_lora": NoLoopLoRA(),
    }


def write_shape(config: MythosConfig) -> dict[str, Any]:
    """The keys that `read_shape` reads."""
    return {
        "vocab_size": config.vocab_size,
        "padded_vocab_size": config.vocab_size,
        "n_embd": config.dim,
        "block_size": config.context,
        "n_layers": config.effective_depth(1),
        "n_layers_in_prelude": config.prelude_layers,
        "n_layers_in_recurrent_block": config.recurrent_layers,
        "n_layers_in_coda": config.coda_layers,
        "mean_recurrence": config.num_loops,
        "state_init": "like-init",
        "bias": False,
    }


def read_heads(fields: Fields) -> int:
    """The number of heads, under either of its names."""
    return fields.integer("num_attention_heads", fields.integer("n_heads", 0))


def _recognises(data: Mapping[str, Any]) -> bool:
    sandwich = data.get("block_class_name", "SandwichBlock") == "SandwichBlock"
    return data.get("model_type") == MODEL_TYPE and sandwich


def _read(fields: Fields) -> MythosConfig:
    heads = read_heads(fields)
    fields.fixed("block_class_name", "SandwichBlock")
    fields.fixed("mlp_class_name", "GatedMLP")
    fields.fixed("nonlin_name", "SiLU")
    fields.fixed("norm_class_name", "RMSNorm_llama", "RMSNorm")
    fields.fixed("injection_type", "linear")
    fields.fixed("num_key_value_heads", heads)
    fields.fixed("qk_bias", True, False)
    shape = read_shape(fields)
    tied = fields.flag("tie_embeddings", True)
    fields.fixed("tie_word_embeddings", tied)
    scales = fields.table("init_values")
    return MythosConfig(
        attention=GroupedQueryAttention(
            num_heads=heads,
            num_kv_heads=heads,
            rope_base=fields.number("rope_base", 50_000.0),
            qk_bias=fields.flag("qk_bias", True),
        ),
        injection=Concat(),
        # The published standard deviation 2 / (5 dim) is multiplied by the scale of embeddings.
        state_init=NormalState(scale=float(shape["dim"]), truncate=3.0),
        prelude_norm=False,
        block_norms=("input", "sum"),
        readout_norm=True,
        embed_scale=float(scales.get("embed_scale", math.sqrt(shape["dim"]))),
        tie_embeddings=tied,
        norm_eps=fields.number("norm_eps", 1e-6),
        **swiglu(fields.integer("intermediate_size")),
        **shape,
    )


NORMS = {
    "norm_1.weight": "attention_norm.weight",
    "norm_2.weight": "attention_sum_norm.weight",
    "norm_3.weight": "feed_forward_norm.weight",
    "norm_4.weight": "feed_forward_sum_norm.weight",
}


def layer_rules(config: MythosConfig, norms: dict[str, str], *, half_split: bool) -> list[Rule]:
    """One layer with fused Wqkv and fc; `half_split`: rotary pairs (i, i + head_dim / 2)."""
    attention, queries, keys = attention_sizes(config)
    feed_forward, head_dim = config.feed_forward, attention.size(config.dim)
    assert isinstance(feed_forward, SwiGLU)
    maps = [f"attention.{part}.weight" for part in ("query", "key", "value")]
    qkv = fused("attn.Wqkv.weight", maps, (queries, keys, keys))
    biases = fused("attn.qk_bias", ["attention.query_bias", "attention.key_bias"], (1, 1))
    biases = biases.then(
        lambda x: [part.flatten() for part in x],
        lambda x: [part.view(1, 1, -1, head_dim) for part in x],
    )
    if not half_split:
        qkv, biases = (interleaved(rule, head_dim, parts=2) for rule in (qkv, biases))
    return [
        qkv,
        *([biases] if attention.qk_bias else []),
        same("attn.proj.weight", "attention.output.weight"),
        same("mlp.fc.weight", "feed_forward.gate_up.weight"),
        same("mlp.proj.weight", "feed_forward.down.weight"),
        *(same(theirs, ours) for theirs, ours in norms.items()),
    ]


def all_layers(config: MythosConfig, one: list[Rule]) -> list[Rule]:
    """The rules of one layer for every layer of the three parts."""
    found = []
    for ours, index in layers(config):
        part = PARTS[ours.rsplit(".", 2)[0]]
        found += under(f"transformer.{part}.{index}.", ours, one)
    return found


def adapter(config: MythosConfig) -> Rule:
    """The map of [h; e], as two maps."""
    ours = [f"recurrent.injection.{part}_map.weight" for part in ("state", "input")]
    return fused("transformer.adapter.weight", ours, (config.dim, config.dim), dim=1)


def head_rules(config: MythosConfig) -> list[Rule]:
    head = tied(HEAD, EMBED) if config.tie_embeddings else same(HEAD, "head.weight")
    return [same(EMBED, "embed.weight"), head]


def _rules(config: MythosConfig) -> list[Rule]:
    norms = ("norm.weight", "recurrent.readout_norm.weight")
    return [
        *head_rules(config),
        *all_layers(config, layer_rules(config, NORMS, half_split=False)),
        adapter(config),
        copies("transformer.ln_f.weight", *norms),
    ]


def _write(config: MythosConfig) -> dict[str, Any]:
    attention, _, _ = attention_sizes(config)
    feed_forward = config.feed_forward
    assert isinstance(feed_forward, SwiGLU)
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["RavenForCausalLM"],
        **write_shape(config),
        "block_class_name": "SandwichBlock",
        "n_heads": attention.num_heads,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "rope_base": attention.rope_base,
        "qk_bias": attention.qk_bias,
        "injection_type": "linear",
        "mlp_class_name": "GatedMLP",
        "nonlin_name": "SiLU",
        "intermediate_size": feed_forward.hidden_dim,
        "norm_eps": config.norm_eps,
        "init_values": {"embed_scale": config.embed_scale},
        "tie_embeddings": config.tie_embeddings,
        "tie_word_embeddings": config.tie_embeddings,
    }


HUGINN = Format(
    name="huginn",
    family="Huginn (arXiv 2502.05171)",
    recognises=_recognises,
    read=_read,
    rules=_rules,
    write=_write,
    ignored=("freqs_cis",),
    exits="state_change 0.03, kl 5e-4 or argmax: the authors' own, token by token",
)
