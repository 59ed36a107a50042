"""Llama (SmolLM2, TinyLlama, Llama 3.x) and Mistral: plain transformers, as one loop."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from openmythos.hub.fields import Fields
from openmythos.hub.format import (
    BARE,
    ONE_LOOP,
    Format,
    attention_sizes,
    full_attention,
    model_type,
    read_attention,
    write_attention,
)
from openmythos.hub.rules import Rule, same, stacked, tied, under
from openmythos.model.config import MythosConfig
from openmythos.nn.feed_forward import GeGLU, SwiGLU

NORMS = {
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "feed_forward_norm.weight",
}


def read_plain(
    fields: Fields,
    *,
    layer: type[SwiGLU | GeGLU] = SwiGLU,
    activations: tuple[str, ...] = ("silu", "swish"),
    tied: bool = False,
) -> dict[str, Any]:
    """The fields that transformers' plain models have in common, but attention.

    `tied`: whether the head is the embedding where the config does not say.
    """
    fields.fixed("hidden_act", *activations)
    feed_forward = layer(hidden_dim=fields.integer("intermediate_size"))
    fields.fixed("pretraining_tp", 1)
    fields.off("mlp_bias")
    return BARE | {
        "vocab_size": fields.integer("vocab_size"),
        "dim": fields.integer("hidden_size"),
        "context": fields.integer("max_position_embeddings"),
        "prelude_layers": 0,
        "recurrent_layers": fields.integer("num_hidden_layers"),
        "coda_layers": 0,
        "num_loops": 1,
        "tie_embeddings": fields.flag("tie_word_embeddings", tied),
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "feed_forward": feed_forward,
        "recurrent_feed_forward": feed_forward,
    }


def write_plain(config: MythosConfig, kind: str, architecture: str) -> dict[str, Any]:
    """The keys that `read_plain` and `read_attention` read."""
    attention, _, _ = attention_sizes(config)
    feed_forward = config.recurrent_feed_forward
    assert isinstance(feed_forward, SwiGLU | GeGLU)
    return {
        "model_type": kind,
        "architectures": [architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": feed_forward.hidden_dim,
        "num_hidden_layers": config.recurrent_layers,
        "max_position_embeddings": config.context,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        **write_attention(attention, config.dim),
    }


def attention_rules(attention: str = "self_attn.", mlp: str = "mlp.") -> Sequence[tuple[str, str]]:
    """(their name, ours) of the maps of one layer that only change their names."""
    return [
        *((f"{attention}{x[0]}_proj.weight", f"attention.{x}.weight") for x in _MAPS),
        (f"{mlp}down_proj.weight", "feed_forward.down.weight"),
    ]


_MAPS = ("query", "key", "value", "output")


def layer_rules(config: MythosConfig, norms: dict[str, str]) -> list[Rule]:
    """The rules of one layer of a model whose maps have Llama's names."""
    feed_forward = config.recurrent_feed_forward
    assert isinstance(feed_forward, SwiGLU | GeGLU)
    halves = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
    sizes = [feed_forward.hidden_dim] * 2
    return [
        *(same(theirs, ours) for theirs, ours in (*attention_rules(), *norms.items())),
        stacked(halves, "feed_forward.gate_up.weight", sizes),
    ]


def plain_rules(config: MythosConfig, norms: dict[str, str], last_norm: Rule) -> list[Rule]:
    """All rules of a model with Llama's names and num_loops = 1."""
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    return [
        same(embed, "embed.weight"),
        *(
            rule
            for i in range(config.recurrent_layers)
            for rule in under(
                f"model.layers.{i}.", f"recurrent.layers.{i}.", layer_rules(config, norms)
            )
        ),
        last_norm,
        tied(head, embed) if config.tie_embeddings else same(head, "head.weight"),
    ]


def _read(fields: Fields) -> MythosConfig:
    parts = read_plain(fields)
    attention = read_attention(fields)
    if fields.data["model_type"] == "mistral":
        attention = replace(attention, window=fields.integer("sliding_window", 0))
    else:
        full_attention(fields)
    return MythosConfig(attention=attention, **parts)


def _rules(config: MythosConfig) -> list[Rule]:
    return plain_rules(config, NORMS, same("model.norm.weight", "norm.weight"))


def _write(config: MythosConfig) -> dict[str, Any]:
    attention, _, _ = attention_sizes(config)
    if attention.window:
        found = write_plain(config, "mistral", "MistralForCausalLM")
        return found | {"sliding_window": attention.window}
    return write_plain(config, "llama", "LlamaForCausalLM")


LLAMA = Format(
    name="llama",
    family="Llama, Mistral (SmolLM2, TinyLlama): one loop",
    recognises=model_type("llama", "mistral"),
    read=_read,
    rules=_rules,
    write=_write,
    exits=ONE_LOOP,
)
