"""What a format of checkpoints is, and what many of them share: RoPE, grouped-query attention."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openmythos.hub.fields import Fields
from openmythos.hub.rules import Rule
from openmythos.model.config import MythosConfig
from openmythos.nn.feed_forward import SwiGLU
from openmythos.nn.grouped_query import GroupedQueryAttention
from openmythos.nn.rope_scaling import (
    LinearScaling,
    Llama3Scaling,
    NoScaling,
    RopeScaling,
    YarnScaling,
)
from openmythos.recurrence.initial_state import EncodedState
from openmythos.recurrence.injections import NoInjection
from openmythos.recurrence.loop_lora import NoLoopLoRA


@dataclass(frozen=True, kw_only=True)
class Format:
    """One format of checkpoints: how it is recognised, its config and its tensors, both ways.

    `write` returns the config.json of a model; None: the format is only read. `ignored` are
    patterns of tensors that are never read. `exits` says which exit rules suit such a model.
    """

    name: str
    family: str
    recognises: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Fields], MythosConfig]
    rules: Callable[[MythosConfig], Sequence[Rule]]
    write: Callable[[MythosConfig], dict[str, Any]] | None = None
    ignored: tuple[str, ...] = ("*rotary_emb.inv_freq",)
    exits: str = "kl or argmax: they read logits, so they need no training"


ONE_LOOP = "none: the model runs each layer once"

# The parts of a plain or looped transformer that has nothing else between its layers.
BARE: dict[str, Any] = {
    "injection": NoInjection(),
    "state_init": EncodedState(),
    "loop_lora": NoLoopLoRA(),
    "prelude_norm": False,
}


def model_type(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    """Recognises a config.json by its model_type."""
    return lambda data: data.get("model_type") in names


def swiglu(width: int) -> dict[str, Any]:
    """The same SwiGLU inside and outside the loop."""
    return {
        "feed_forward": SwiGLU(hidden_dim=width),
        "recurrent_feed_forward": SwiGLU(hidden_dim=width),
    }


def read_attention(fields: Fields, **options: Any) -> GroupedQueryAttention:
    """Grouped-query attention in the keys of Llama."""
    heads = fields.integer("num_attention_heads")
    fields.off("attention_bias", "qkv_bias")
    return GroupedQueryAttention(
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=fields.integer("head_dim", 0),
        **read_rope(fields),
        **options,
    )


def write_attention(attention: GroupedQueryAttention, dim: int) -> dict[str, Any]:
    """The keys that `read_attention` reads."""
    head_dim = {"head_dim": attention.head_dim} if attention.head_dim else {}
    return {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        **head_dim,
        **write_rope(attention),
    }


def read_rope(fields: Fields) -> dict[str, Any]:
    """rope_base, rope_scaling and rope_dim, from transformers' keys of any version."""
    new = dict(fields.table("rope_parameters"))
    old = dict(fields.table("rope_scaling"))
    table = {key: value for key, value in (old | new).items() if value is not None}
    given = (fields.get("rope_theta", None), table.pop("rope_theta", None))
    bases = {float(base) for base in given if base is not None}
    if len(bases) > 1:
        raise fields.error("rope_theta", f"differs from rope_parameters.rope_theta = {given[1]!r}")
    kinds = [table.pop(key) for key in ("rope_type", "type") if key in table]
    kind = kinds[0] if kinds else "default"
    found = {
        "rope_base": bases.pop() if bases else 10_000.0,
        "rope_scaling": _read_scaling(fields, kind, table),
    }
    share = (table.pop("partial_rotary_factor", 1), fields.get("partial_rotary_factor", 1))
    if any(value != 1 for value in share):
        raise fields.error("partial_rotary_factor", "is not implemented, only 1")
    for key in table:
        raise fields.error("rope_parameters", f"{key} is not implemented for rope_type {kind!r}")
    return found


def _read_scaling(fields: Fields, kind: str, table: dict[str, Any]) -> RopeScaling:
    """The scaling of a rope_type; takes its keys out of the table."""

    def take(key: str, default: Any = None) -> Any:
        value = table.pop(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise fields.error("rope_parameters", f"{key} = {value!r}: must be a number")
        return value

    original = "original_max_position_embeddings"
    if kind == "default":
        return NoScaling()
    if kind == "linear":
        return LinearScaling(factor=take("factor"))
    if kind == "llama3":
        return Llama3Scaling(
            factor=take("factor"),
            low_frequency=take("low_freq_factor"),
            high_frequency=take("high_freq_factor"),
            original_context=int(take(original)),
        )
    if kind == "yarn":
        return YarnScaling(
            factor=take("factor"),
            fast=take("beta_fast", 32.0),
            slow=take("beta_slow", 1.0),
            original_context=int(take(original)),
        )
    raise fields.error("rope_scaling", "is not implemented, only default, linear, llama3, yarn")


def write_rope(attention: GroupedQueryAttention) -> dict[str, Any]:
    """The keys that `read_rope` reads, in the spelling of transformers 5."""
    scaling, table = attention.rope_scaling, {"rope_theta": attention.rope_base}
    kind: dict[str, Any] = {"rope_type": "default"}
    if isinstance(scaling, LinearScaling):
        kind = {"rope_type": "linear", "factor": scaling.factor}
    elif isinstance(scaling, Llama3Scaling):
        kind = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency,
            "high_freq_factor": scaling.high_frequency,
            "original_max_position_embeddings": scaling.original_context,
        }
    elif isinstance(scaling, YarnScaling):
        kind = {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "beta_fast": scaling.fast,
            "beta_slow": scaling.slow,
            "original_max_position_embeddings": scaling.original_context,
        }
    return {**table, "rope_parameters": table | kind}


def full_attention(fields: Fields) -> None:
    """Refuse sliding windows; keys about them are ignored where they are switched off."""
    fields.off("use_sliding_window")
    fields.unrelated("sliding_window", "max_window_layers")
    kinds = fields.get("layer_types", [])
    if any(kind != "full_attention" for kind in kinds):
        raise fields.error("layer_types", "is not implemented, only full_attention")


def attention_sizes(config: MythosConfig) -> tuple[GroupedQueryAttention, int, int]:
    """(attention, rows of the query map, rows of the key map)."""
    attention = config.attention
    assert isinstance(attention, GroupedQueryAttention)
    head_dim = attention.size(config.dim)
    return attention, attention.num_heads * head_dim, attention.num_kv_heads * head_dim
