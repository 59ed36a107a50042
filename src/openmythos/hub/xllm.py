"""xLLM-Loop, Parts I and II: one config for plain, looped and Huginn-like transformers.

Code: ifm-ai/xllm-loop. The config has no context; Part II was trained on 8192 tokens. Models with
two states (huginn_hierarchical_state) and unrolled controls with an injection are refused.
"""

from collections.abc import Mapping
from typing import Any

import torch

from openmythos.hub.fields import Fields
from openmythos.hub.format import Format, attention_sizes
from openmythos.hub.rules import (
    Rule,
    constant,
    fused,
    interleaved,
    layers,
    plus_one,
    same,
    stacked,
    under,
)
from openmythos.model.config import MythosConfig
from openmythos.nn.feed_forward import SwiGLU
from openmythos.nn.grouped_query import GroupedQueryAttention
from openmythos.nn.moe import MoE
from openmythos.recurrence.initial_state import EncodedState, SineHashState, StateInit, ZeroState
from openmythos.recurrence.injection import LTI
from openmythos.recurrence.injections import Concat, Injection, NoInjection
from openmythos.recurrence.loop_lora import NoLoopLoRA

CONTEXT = 8192
# Training, execution and kernels, and sizes of parts that are switched off.
_UNRELATED = (
    *("recompute_*", "init_*", "*_backend", "fused_*", "chunk_size", "layerwise_ckpt"),
    *("memory_efficient_norm", "timenorm_*", "layernorm_eps", "causal_conv_*", "attn_gate_func"),
    *("*_dt_init", "*_a_init", "huginn_sampling_*", "huginn_antithetic_*", "huginn_poisson_*"),
    *("huginn_backprop_depth", "huginn_depth_*", "huginn_hierarchical_*_cycles", "vocab_size"),
    *(
        "apply_bias_term",
        "huginn_split_module_repeats",
        "moe_router_bias_update_rate",
        "dense_prelude_source_layer",
    ),
)
_STATES: dict[str, StateInit] = {
    "zero": ZeroState(),
    "input": EncodedState(),
    "normal": SineHashState(),
}


def _recognises(data: Mapping[str, Any]) -> bool:
    model = data.get("model")
    return isinstance(model, Mapping) and "model_dim" in model and "num_layers" in model


def _read(fields: Fields) -> MythosConfig:
    model = fields.inner("model")
    fields.unrelated("tokenizer")
    model.unrelated(*_UNRELATED)
    model.fixed("arch", "transformer", "huginn")
    for key in ("swiglu", "apply_rmsnorm", "norm_affine"):
        model.fixed(key, True)
    model.fixed("layernorm_num_groups", 1)
    model.fixed("attn_act_func", "softmax")
    model.fixed("residual_func", "base", "add")
    model.fixed("output_size", -1)
    model.off("qknorm", "apply_attn_gate", "scale_emb", "num_values", "num_activated_values")
    model.off("dense_prelude_input_injection", "dense_prelude_input_layers", "residual_heads")
    model.off("huginn_hierarchical_state", "moe_router_bias", "num_shared_experts")
    model.off("num_dense_layers")
    heads = model.integer("num_heads")
    size = model.integer("head_dim", model.integer("model_dim") // heads)
    model.fixed("rope_head_dim", size)
    model.fixed("v_head_dim", size)
    if "swiglu" not in model or "apply_rmsnorm" not in model:
        raise fields.error("model", "must have swiglu and apply_rmsnorm: they are off by default")
    feed_forward = _feed_forward(model)
    parts = _huginn(model) if model.get("arch", "") == "huginn" else _transformer(model)
    return MythosConfig(
        vocab_size=model.integer("vocab_size"),
        dim=model.integer("model_dim"),
        context=CONTEXT,
        num_loops=model.integer("loop_times", 1),
        attention=GroupedQueryAttention(
            num_heads=heads,
            num_kv_heads=model.integer("num_kv_heads", heads),
            head_dim=size,
            rope_base=model.number("rope_base", 100_000.0),
        ),
        feed_forward=feed_forward,
        recurrent_feed_forward=feed_forward,
        loop_lora=NoLoopLoRA(),
        tie_embeddings=False,
        norm_eps=model.number("rmsnorm_eps", 1e-6),
        **parts,
    )


def _feed_forward(model: Fields) -> SwiGLU | MoE:
    number, width = model.integer("num_experts", 0), model.integer("ffn_hidden_dim", 2048)
    score = model.get("moe_router_score_func", "sigmoid")
    model.unrelated("num_activated_experts", "expert_inter_dim", "moe_router_scaling_factor")
    if not number:
        return SwiGLU(hidden_dim=width)
    if score not in ("sigmoid", "softmax"):
        raise model.error("moe_router_score_func", "must be sigmoid or softmax")
    return MoE(
        num_experts=number,
        top_k=model.integer("num_activated_experts"),
        expert_dim=model.integer("expert_inter_dim"),
        num_shared_experts=0,
        score=score,
        route_scale=model.number("moe_router_scaling_factor", 1.0),
    )


def _transformer(model: Fields) -> dict[str, Any]:
    """Layers [loop_start_layer, loop_end_layers) are the loop, from the state that enters them."""
    number = model.integer("num_layers")
    start, end = model.integer("loop_start_layer", 0), model.integer("loop_end_layers", number)
    model.fixed("loop_input_injection", "none", "diagonal")
    model.unrelated("huginn_*")
    injected = model.get("loop_input_injection", "none") == "diagonal"
    if injected and start:
        raise model.error("loop_start_layer", "must be 0 with loop_input_injection")
    injection: Injection = NoInjection()
    if injected:
        injection = LTI(discretization="euler", input_map="dense", max_decay=1.0)
    return {
        "prelude_layers": start,
        "recurrent_layers": end - start,
        "coda_layers": number - end,
        "injection": injection,
        "state_init": EncodedState(),
        "prelude_norm": False,
    }


def _huginn(model: Fields) -> dict[str, Any]:
    number = model.integer("num_layers")
    prelude, coda = (model.integer(f"huginn_{part}_layers", 1) for part in ("prelude", "coda"))
    recurrent = model.integer("huginn_recurrent_layers", number - prelude - coda)
    if prelude < 1 or prelude + recurrent + coda != number:
        raise model.error("num_layers", "must be the sum of prelude (>= 1), recurrent and coda")
    model.unrelated("loop_*")
    model.fixed("huginn_state_init", *_STATES)
    model.fixed("huginn_input_injection", "diagonal", "none", "linear")
    model.fixed("huginn_prelude_norm", "none", "rms")
    model.fixed("huginn_recurrent_exit_norm", "none", "parameterless_rms")
    model.fixed("huginn_ortho_projection_eps", 1e-6)
    orthogonal = model.flag("huginn_prelude_orthogonal", False)
    kind = model.get("huginn_input_injection", "diagonal")
    bias = model.flag("apply_bias_term", False)
    injection: Injection = NoInjection()
    if kind == "linear":
        injection = Concat(bias=bias)
    elif kind == "diagonal":
        injection = LTI(
            discretization="euler", input_map="dense", max_decay=1.0, orthogonal=orthogonal
        )
    exit_norm = model.get("huginn_recurrent_exit_norm", "none")
    return {
        "prelude_layers": prelude,
        "recurrent_layers": recurrent,
        "coda_layers": coda,
        "injection": injection,
        "state_init": _STATES[model.get("huginn_state_init", "zero")],
        "prelude_norm": model.get("huginn_prelude_norm", "none") == "rms",
        "loop_norm": "none" if exit_norm == "none" else "plain",
    }


def _layer(config: MythosConfig) -> list[Rule]:
    attention, _, _ = attention_sizes(config)
    head_dim = attention.size(config.dim)
    maps = {
        part: same(f"attention.w{part[0]}.weight", f"attention.{part}.weight") for part in _MAPS
    }
    feed_forward = config.feed_forward
    rules = [
        plus_one("attention.norm.weight", "attention_norm.weight"),
        *(interleaved(maps[part], head_dim) for part in ("query", "key")),
        *(maps[part] for part in ("value", "output")),
    ]
    if isinstance(feed_forward, MoE):
        return [*rules, *_experts(config.dim, feed_forward)]
    assert isinstance(feed_forward, SwiGLU)
    halves = ("nffn.fc1.weight", "nffn.fc3.weight")
    return [
        *rules,
        plus_one("nffn.norm.weight", "feed_forward_norm.weight"),
        stacked(halves, "feed_forward.gate_up.weight", [feed_forward.hidden_dim] * 2),
        same("nffn.fc2.weight", "feed_forward.down.weight"),
    ]


_MAPS = ("query", "key", "value", "output")


def _experts(dim: int, moe: MoE) -> list[Rule]:
    """Their stacks have the experts' rows one after the other: weight1 [experts * width, dim]."""
    number, width = moe.num_experts, moe.expert_dim
    gate_up = Rule(
        ("moe.experts.weight1", "moe.experts.weight3"),
        ("feed_forward.experts.gate_up",),
        lambda x: [torch.cat([part.reshape(number, width, dim) for part in x], dim=1)],
        lambda x: [part.reshape(-1, dim) for part in torch.chunk(x[0], 2, dim=1)],
    )
    down = same("moe.experts.weight2", "feed_forward.experts.down").then(
        lambda x: [x[0].reshape(number, dim, width)], lambda x: [x[0].reshape(-1, width)]
    )
    return [
        plus_one("moe.norm.weight", "feed_forward_norm.weight"),
        same("moe.router.weight", "feed_forward.router.weight"),
        constant("feed_forward.router.router_bias", (number,), 0.0),
        gate_up,
        down,
    ]


def _injection(config: MythosConfig) -> list[Rule]:
    ours = "recurrent.injection."
    if isinstance(config.injection, Concat):
        maps = [f"{ours}{part}_map.weight" for part in ("state", "input")]
        found = [fused("input_injection.adapter.weight", maps, (config.dim, config.dim), dim=1)]
        if config.injection.bias:
            found.append(same("input_injection.adapter.bias", f"{ours}input_map.bias"))
        return found
    if isinstance(config.injection, NoInjection):
        return []
    names = {
        "input_adapter.weight": "input_map",
        "A_log": "log_rate",
        "dt_bias": "raw_step_size",
    }
    module = "input_injection" if config.prelude_layers else "loop_input_injection_module"
    return under(f"{module}.", ours, [same(theirs, mine) for theirs, mine in names.items()])


def _rules(config: MythosConfig) -> list[Rule]:
    found = [
        same("embed.weight", "embed.weight"),
        same("output.output.weight", "head.weight"),
        plus_one("output.final_norm.weight", "norm.weight"),
        *_injection(config),
    ]
    if config.prelude_norm:
        theirs = "huginn_prelude_norm_module.weight"
        found.append(plus_one(theirs, "recurrent.prelude_norm.weight"))
    for number, (ours, _) in enumerate(layers(config)):
        found += under(f"layers.{number}.", ours, _layer(config))
    return found


XLLM = Format(
    name="xllm",
    family="xLLM-Loop, Parts I and II",
    recognises=_recognises,
    read=_read,
    rules=_rules,
    exits="kl or argmax; none was published. Part II decodes with decode=last",
)
