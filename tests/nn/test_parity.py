"""Our layers, given the weights of a transformers model, give its logits and its gradients.

The reference runs with eager attention and a Python loop over experts, so that no kernel is shared.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from openmythos.model.config import MythosConfig
from openmythos.model.mythos import OpenMythos
from openmythos.nn.block import Attention, Block, FeedForward, NormPlace
from openmythos.nn.cache import ExactCache, KVCache
from openmythos.nn.feed_forward import SwiGLU
from openmythos.nn.grouped_query import GroupedQueryAttention
from openmythos.nn.latent_attention import LatentAttention
from openmythos.nn.layout import TokenLayout, attention_context
from openmythos.nn.moe import MoE
from openmythos.nn.norm import RMSNorm
from openmythos.nn.rope_scaling import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling
from openmythos.nn.view import LayerView, NoCache
from openmythos.recurrence.initial_state import EncodedState
from openmythos.recurrence.injections import NoInjection
from openmythos.recurrence.loop_lora import NoLoopLoRA

Weights = dict[str, Tensor]

VOCAB, DIM, EPS = 61, 64, 1e-6
BATCH, SEQ, PREFILL = 3, 11, 6
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": DIM,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": EPS,
    "attn_implementation": "eager",
}
DENSE: dict[str, Any] = COMMON | {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
}
DEEPSEEK: dict[str, Any] = COMMON | {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_mtp_layers": 0,
    "experts_implementation": "eager",
}

SWIGLU = SwiGLU(hidden_dim=40)
GROUPED = GroupedQueryAttention(num_heads=4, num_kv_heads=2)
LATENT = LatentAttention(
    num_heads=4,
    kv_latent_dim=16,
    q_latent_dim=32,
    nope_head_dim=16,
    rope_head_dim=8,
    value_head_dim=12,
)
MOE = MoE(num_experts=8, top_k=2, expert_dim=24, num_shared_experts=1, route_scale=2.5)


class PlainTransformer(nn.Module):
    """Our blocks, each run once: embedding, blocks, norm, head."""

    def __init__(
        self,
        attention: Attention,
        feed_forwards: list[FeedForward],
        norms: tuple[NormPlace, ...] = ("input",),
    ) -> None:
        super().__init__()
        self.attention = attention
        self.embed = nn.Embedding(VOCAB, DIM)
        self.blocks = nn.ModuleList(Block(DIM, attention, ff, EPS, norms) for ff in feed_forwards)
        self.norm = RMSNorm(DIM, EPS)
        self.head = nn.Linear(DIM, VOCAB, bias=False)

    def forward(
        self, tokens: Tensor, mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        start = 0 if cache is None else cache.length
        layout = TokenLayout(tokens.shape[1], start, tokens.device, mask)
        context = attention_context(layout, self.attention, DIM)
        x = self.embed(tokens)
        for index, block in enumerate(self.blocks):
            kv = NoCache() if cache is None else cache.views("prelude", tokens.shape[1])[index]
            x, _ = block(x, LayerView(context, kv))
        if cache is not None:
            cache.advance(tokens.shape[1])
        return self.head(self.norm(x))

    def new_cache(self) -> KVCache:
        return KVCache(
            layers=(len(self.blocks), 0, 0),
            kv_width=self.attention.kv_width(DIM),
            batch=BATCH,
            capacity=SEQ,
            num_loops=1,
            prefill=ExactCache(),
            decode=ExactCache(),
            like=self.head.weight,
        )


def llama_weights(source: Weights, num_layers: int) -> Weights:
    """Llama's names to ours; the same map holds for gradients."""
    out = {
        "embed.weight": source["model.embed_tokens.weight"],
        "norm.weight": source["model.norm.weight"],
        "head.weight": source["lm_head.weight"],
    }
    names = {
        "attention_norm.weight": "input_layernorm.weight",
        "feed_forward_norm.weight": "post_attention_layernorm.weight",
        "attention.query.weight": "self_attn.q_proj.weight",
        "attention.key.weight": "self_attn.k_proj.weight",
        "attention.value.weight": "self_attn.v_proj.weight",
        "attention.output.weight": "self_attn.o_proj.weight",
        "attention.query_norm.weight": "self_attn.q_norm.weight",
        "attention.key_norm.weight": "self_attn.k_norm.weight",
        "feed_forward.down.weight": "mlp.down_proj.weight",
    }
    for layer in range(num_layers):
        there, here = f"model.layers.{layer}.", f"blocks.{layer}."
        for ours, theirs in names.items():
            if there + theirs in source:
                out[here + ours] = source[there + theirs]
        out[here + "feed_forward.gate_up.weight"] = _gate_up(source, there + "mlp.")
    return out


def deepseek_weights(source: Weights, num_layers: int, interleaved: bool) -> Weights:
    """DeepSeek-V3's names to ours, rotary rows put in half-split order if they are interleaved."""
    out = {
        "embed.weight": source["model.embed_tokens.weight"],
        "norm.weight": source["model.norm.weight"],
        "head.weight": source["lm_head.weight"],
    }
    names = {
        "attention_norm.weight": "input_layernorm.weight",
        "feed_forward_norm.weight": "post_attention_layernorm.weight",
        "attention.query_down.weight": "self_attn.q_a_proj.weight",
        "attention.query_latent_norm.weight": "self_attn.q_a_layernorm.weight",
        "attention.query_up.weight": "self_attn.q_b_proj.weight",
        "attention.query.weight": "self_attn.q_proj.weight",
        "attention.kv_down.weight": "self_attn.kv_a_proj_with_mqa.weight",
        "attention.kv_latent_norm.weight": "self_attn.kv_a_layernorm.weight",
        "attention.kv_up.weight": "self_attn.kv_b_proj.weight",
        "attention.output.weight": "self_attn.o_proj.weight",
        "feed_forward.down.weight": "mlp.down_proj.weight",
        "feed_forward.router.weight": "mlp.gate.weight",
        "feed_forward.router.router_bias": "mlp.gate.e_score_correction_bias",
        "feed_forward.experts.gate_up": "mlp.experts.gate_up_proj",
        "feed_forward.experts.down": "mlp.experts.down_proj",
        "feed_forward.shared_expert.down.weight": "mlp.shared_experts.down_proj.weight",
    }
    for layer in range(num_layers):
        there, here = f"model.layers.{layer}.", f"blocks.{layer}."
        for ours, theirs in names.items():
            if there + theirs in source:
                out[here + ours] = source[there + theirs]
        if there + "mlp.gate.weight" in source:
            shared = _gate_up(source, there + "mlp.shared_experts.")
            out[here + "feed_forward.shared_expert.gate_up.weight"] = shared
        else:
            out[here + "feed_forward.gate_up.weight"] = _gate_up(source, there + "mlp.")
        if interleaved:
            for name in ("query_up", "query", "kv_down"):
                key = f"{here}attention.{name}.weight"
                if key in out:
                    out[key] = _half_split(out[key], 1 if name == "kv_down" else 4)
    return out


def _gate_up(source: Weights, prefix: str) -> Tensor:
    return torch.cat((source[prefix + "gate_proj.weight"], source[prefix + "up_proj.weight"]))


def _half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows (x0, x1), (x2, x3) ... of each head's last 8 to x0, x2, ... x1, x3, ..."""
    per_head = weight.view(heads, -1, weight.shape[-1])
    plain, rotary = per_head[:, :-8], per_head[:, -8:]
    rotary = torch.cat((rotary[:, 0::2], rotary[:, 1::2]), dim=1)
    return torch.cat((plain, rotary), dim=1).view_as(weight)


@dataclass(frozen=True)
class Case:
    config: PreTrainedConfig
    model: type[PreTrainedModel]
    attention: Attention
    feed_forwards: tuple[FeedForward, ...]
    convert: Callable[[Weights], Weights]
    norms: tuple[NormPlace, ...] = ("input",)


def _dense(config: PreTrainedConfig, model: type[PreTrainedModel], attention: Attention) -> Case:
    return Case(config, model, attention, (SWIGLU, SWIGLU), lambda w: llama_weights(w, 2))


def _deepseek(attention: Attention, interleaved: bool, **changes: Any) -> Case:
    return Case(
        DeepseekV3Config(**DEEPSEEK | {"rope_interleave": interleaved} | changes),
        DeepseekV3ForCausalLM,
        attention,
        (replace(SWIGLU, hidden_dim=48), MOE, MOE),
        lambda w: deepseek_weights(w, 3, interleaved),
    )


def _olmo2(weights: Weights) -> Weights:
    """Norms on the branches' outputs; Llama's other name for one of them is in the way."""
    source = {name.replace("post_attention_layernorm", "a"): w for name, w in weights.items()}
    out = llama_weights(source, 2)
    for layer in range(2):
        there, here = f"model.layers.{layer}.", f"blocks.{layer}."
        out[here + "attention_branch_norm.weight"] = source[there + "a.weight"]
        theirs = there + "post_feedforward_layernorm.weight"
        out[here + "feed_forward_branch_norm.weight"] = source[theirs]
    return out


def _scaled(rope: dict[str, Any], scaling: RopeScaling) -> Case:
    rope = {"rope_theta": 10_000.0} | rope
    config = LlamaConfig(**DENSE | {"max_position_embeddings": 4096}, rope_parameters=rope)
    return _dense(config, LlamaForCausalLM, replace(GROUPED, rope_scaling=scaling))


CASES = {
    "llama": _dense(LlamaConfig(**DENSE), LlamaForCausalLM, GROUPED),
    "mistral_window": _dense(
        MistralConfig(**DENSE, sliding_window=4), MistralForCausalLM, replace(GROUPED, window=4)
    ),
    "qwen3_qk_norm": _dense(Qwen3Config(**DENSE), Qwen3ForCausalLM, replace(GROUPED, qk_norm=True)),
    "qwen3_wide_heads": _dense(
        Qwen3Config(**DENSE | {"head_dim": 24}),
        Qwen3ForCausalLM,
        replace(GROUPED, qk_norm=True, head_dim=24),
    ),
    "olmo2": Case(
        Olmo2Config(**{k: v for k, v in DENSE.items() if k != "head_dim"}),
        Olmo2ForCausalLM,
        replace(GROUPED, qk_norm=True, qk_norm_kind="width"),
        (SWIGLU, SWIGLU),
        _olmo2,
        norms=("branch",),
    ),
    "rope_linear": _scaled({"rope_type": "linear", "factor": 4.0}, LinearScaling(factor=4.0)),
    "rope_llama3": _scaled(
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        Llama3Scaling(original_context=64),
    ),
    "rope_yarn": _scaled(
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512},
        YarnScaling(factor=8.0, original_context=512),
    ),
    "deepseek_interleaved": _deepseek(LATENT, True),
    "deepseek_half_split": _deepseek(LATENT, False),
    "deepseek_direct_query": _deepseek(replace(LATENT, q_latent_dim=0), True, q_lora_rank=None),
}


@torch.no_grad()
def reference(case: Case) -> PreTrainedModel:
    """The transformers model with weights, norms and router biases far from their first values."""
    model = case.model(case.config).eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("e_score_correction_bias"):
            tensor.normal_(std=0.3)
        elif "norm" in name:
            tensor.normal_(mean=1.0, std=0.2)
        elif not name.endswith("inv_freq"):
            tensor.normal_(std=tensor.shape[-1] ** -0.5)
    return model


def plain(case: Case, model: PreTrainedModel) -> PlainTransformer:
    ours = PlainTransformer(case.attention, list(case.feed_forwards), case.norms)
    ours.load_state_dict(case.convert(dict(model.state_dict())))
    return ours.eval()


def both(name: str) -> tuple[PreTrainedModel, PlainTransformer]:
    model = reference(CASES[name])
    return model, plain(CASES[name], model)


def left_padded() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, mask and positions of rows with 0, 2 and 4 tokens of padding."""
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ))
    mask = torch.arange(SEQ) >= torch.tensor([0, 2, 4])[:, None]
    return tokens, mask, (mask.long().cumsum(1) - 1).clamp_min(0)


@pytest.mark.parametrize("name", CASES)
def test_logits_and_every_gradient_equal_transformers(name: str) -> None:
    theirs, ours = both(name)
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ))
    expected, logits = theirs(tokens).logits, ours(tokens)
    assert expected.std() > 0.5  # or any model would be close
    torch.testing.assert_close(logits, expected, **TOLERANCE)

    direction = torch.randn_like(logits)
    (expected * direction).sum().backward()
    (logits * direction).sum().backward()
    source = {key: p.grad for key, p in theirs.named_parameters()}
    source |= {key: torch.zeros_like(b) for key, b in theirs.named_buffers()}
    wanted = CASES[name].convert(source)
    for key, parameter in ours.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), key
        # By norm: single entries of a sum over all tokens round by more than the sums differ.
        error = float((parameter.grad - wanted[key]).norm())
        assert error <= 1e-4 * float(wanted[key].norm()), (key, error)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_left_padded_rows_equal_transformers(name: str) -> None:
    theirs, ours = both(name)
    tokens, mask, positions = left_padded()
    expected = theirs(tokens, attention_mask=mask.long(), position_ids=positions).logits
    torch.testing.assert_close(ours(tokens, mask)[mask], expected[mask], **TOLERANCE)


def cache_name(model: nn.Module) -> str:
    """What transformers calls its cache: it changed with 5.24."""
    known = inspect.signature(model.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_cached_decoding_equals_transformers(name: str, padded: bool) -> None:
    theirs, ours = both(name)
    tokens, mask, positions = left_padded()
    if not padded:
        mask = torch.ones_like(mask)
        positions = torch.arange(SEQ).expand(BATCH, SEQ)
    cache, past = ours.new_cache(), None
    whole = ours(tokens, mask)
    for start, end in [(0, PREFILL), *((i, i + 1) for i in range(PREFILL, SEQ))]:
        expected = theirs(
            tokens[:, start:end],
            attention_mask=mask[:, :end].long(),
            position_ids=positions[:, start:end],
            use_cache=True,
            **{cache_name(theirs): past},
        )
        past = expected[cache_name(theirs)]
        logits = ours(tokens[:, start:end], mask[:, :end] if padded else None, cache)
        valid = mask[:, start:end]
        torch.testing.assert_close(logits[valid], expected.logits[valid], **TOLERANCE)
        torch.testing.assert_close(logits[valid], whole[:, start:end][valid], **TOLERANCE)


@torch.no_grad()
def test_the_router_bias_of_the_reference_matters() -> None:
    theirs, ours = both("deepseek_half_split")
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ))
    before = ours(tokens)
    for block in ours.blocks[1:]:
        block.feed_forward.router.router_bias.zero_()
    assert not torch.allclose(ours(tokens), before, atol=0.1)
    for layer in theirs.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.zero_()
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, **TOLERANCE)


@torch.no_grad()
def test_interleaved_rows_must_be_permuted() -> None:
    case = CASES["deepseek_interleaved"]
    theirs = reference(case)
    unpermuted = replace(case, convert=lambda w: deepseek_weights(w, 3, interleaved=False))
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ))
    ours = plain(unpermuted, theirs)(tokens)
    assert not torch.allclose(ours, theirs(tokens).logits, atol=0.1)


def looped(attention: Attention, recurrent: FeedForward, prelude: int, coda: int) -> OpenMythos:
    """A model that has nothing of a loop but the loop."""
    config = MythosConfig(
        vocab_size=VOCAB,
        dim=DIM,
        context=64,
        prelude_layers=prelude,
        recurrent_layers=1,
        coda_layers=coda,
        attention=attention,
        feed_forward=SWIGLU,
        recurrent_feed_forward=recurrent,
        injection=NoInjection(),
        loop_lora=NoLoopLoRA(),
        state_init=EncodedState(),
        prelude_norm=False,
        tie_embeddings=False,
        zero_init_outputs=False,
        norm_eps=EPS,
    )
    return OpenMythos(config, seed=0)


def in_loop_names(weights: Weights, prelude: int) -> Weights:
    """Names of a plain stack to those of `looped`, layer `prelude` being the recurrent one."""
    out = {}
    for name, tensor in weights.items():
        parts = name.split(".")
        if parts[0] == "blocks":
            layer = int(parts[1])
            part = "prelude" if layer < prelude else "coda"
            new = [part, str(layer if layer < prelude else layer - prelude - 1)]
            parts[:2] = ["recurrent", "layers", "0"] if layer == prelude else new
        out[".".join(parts)] = tensor
    return out


@pytest.mark.parametrize("num_loops", [1, 3])
@pytest.mark.parametrize("recurrent", [SWIGLU, MOE], ids=["swiglu", "moe"])
@pytest.mark.parametrize("attention", [GROUPED, LATENT], ids=["grouped_query", "latent"])
def test_a_bare_loop_is_a_plain_transformer(
    attention: Attention, recurrent: FeedForward, num_loops: int
) -> None:
    """With num_loops > 1, one whose middle layers happen to have the same weights."""
    model = looped(attention, recurrent, prelude=2, coda=1)
    stack = PlainTransformer(attention, [SWIGLU, SWIGLU, recurrent, SWIGLU])
    state = in_loop_names(dict(stack.state_dict()), prelude=2)
    stack.load_state_dict(
        {name: model.state_dict()[key] for key, name in zip(state, stack.state_dict(), strict=True)}
    )
    # A module listed twice shares its weights and sums its gradients.
    blocks = list(stack.blocks)
    stack.blocks = nn.ModuleList([*blocks[:2], *[blocks[2]] * num_loops, blocks[3]])
    tokens = torch.randint(0, VOCAB, (2, SEQ))
    logits, expected = model(tokens, num_loops=num_loops).logits, stack(tokens)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)

    direction = torch.randn_like(logits)
    (logits * direction).sum().backward()
    (expected * direction).sum().backward()
    stack.blocks = nn.ModuleList(blocks)
    wanted = in_loop_names({key: p.grad for key, p in stack.named_parameters()}, prelude=2)
    assert wanted.keys() == dict(model.named_parameters()).keys()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), key
        torch.testing.assert_close(parameter.grad, wanted[key], atol=1e-4, rtol=1e-4)


def test_one_bare_loop_equals_transformers() -> None:
    """The whole model, not only its layers: Llama's second layer is the recurrent one."""
    theirs = reference(CASES["llama"])
    model = looped(GROUPED, SWIGLU, prelude=1, coda=0)
    weights = llama_weights(dict(theirs.state_dict()), 2)
    model.load_state_dict(in_loop_names(weights, prelude=1))
    tokens, mask, positions = left_padded()
    expected = theirs(tokens, attention_mask=mask.long(), position_ids=positions).logits
    logits = model(tokens, num_loops=1, attention_mask=mask).logits
    torch.testing.assert_close(logits[mask], expected[mask], **TOLERANCE)
