"""The measured defects of open-mythos 0.5.0 (kyegomez/OpenMythos 8c68c1f), each as a test.

Letters as in the review of the reference: a router balance, b cache size, c halting, d depth,
e decoding, f expert loop, g chunked prefill, h dtypes and tooling, i input validation.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from variants import (
    SEQ,
    VARIANT_IDS,
    VARIANTS,
    VOCAB,
    members,
    name_of,
    random_tokens,
    tiny_config,
    tiny_model,
)

from openmythos.config import ConfigError, from_dict
from openmythos.inference.generation import Request, stream
from openmythos.inference.sampling import Sampling
from openmythos.model.config import MythosConfig
from openmythos.model.mythos import OpenMythos
from openmythos.nn.block import Attention
from openmythos.nn.cache import LastLoopCache
from openmythos.nn.grouped_query import GroupedQueryAttention
from openmythos.nn.latent_attention import LatentAttention
from openmythos.nn.moe import MoE
from openmythos.recurrence.halting import ACT, NoHalting
from openmythos.recurrence.initial_state import NormalState
from openmythos.recurrence.injection import LTI
from openmythos.recurrence.loop_embedding import LoopEmbedding
from openmythos.recurrence.loop_lora import LoopLoRA

CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-4}


def test_a_router_bias_is_updated_and_revives_dead_experts() -> None:
    """Reference: router_bias never moves; the fullest of 16 experts gets 6 to 7 times the mean."""
    experts = MoE(num_experts=16, top_k=2, expert_dim=8, bias_rate=0.02)
    model = OpenMythos(tiny_config(recurrent_feed_forward=experts), seed=0).train()
    with torch.no_grad():
        model.recurrent.layers[0].feed_forward.router.weight[:3] += 0.2
        model.embed.weight += 0.05
    tokens, history = random_tokens(8), []
    for _ in range(40):
        stats = model(tokens, num_loops=2).router["recurrent.layers.0"]
        history.append((stats.max_violation().item(), int((stats.counts == 0).sum())))
        model.update_router_bias({"recurrent.layers.0": stats.counts})
    assert history[0][0] > 5 and history[0][1] >= 4
    assert history[-1][0] < 1 and history[-1][1] == 0


@torch.no_grad()
def test_a_tokens_stay_apart_when_they_enter_the_loop() -> None:
    """Reference: a loop embedding of amplitude 1 on states of 0.02; mean cosine 0.95."""
    config = tiny_config(loop_embedding=LoopEmbedding(num_loops=4), zero_init_outputs=True)
    model, entered = OpenMythos(config, seed=0).eval(), []
    model.recurrent.layers[0].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    model(torch.arange(SEQ)[None], num_loops=4)
    for u in entered:
        directions = nn.functional.normalize(u[0], dim=-1)
        cosine = (directions @ directions.T)[~torch.eye(SEQ, dtype=torch.bool)]
        assert cosine.mean() < 0.3


def test_b_the_cache_holds_one_rotary_key_per_token() -> None:
    """Reference: one per head, 2.4 to 8.5 times DeepSeek-V2's kv_latent_dim + rope_head_dim."""
    attention = LatentAttention(num_heads=8, kv_latent_dim=8, rope_head_dim=4)
    model = OpenMythos(tiny_config(attention=attention))
    layers = model.config.effective_depth(4)
    assert model.new_cache(1, 10, num_loops=4).nbytes == layers * 10 * (8 + 4) * 4


@torch.no_grad()
def test_b_looping_can_save_cache() -> None:
    """Reference: the cache grows with every loop, as if the layers were not shared."""
    model = tiny_model(tiny_config())
    shared, policy = [], LastLoopCache()
    for num_loops in (1, 4, 16):
        cache = model.new_cache(1, SEQ, num_loops=num_loops, prefill=policy, decode=policy)
        shared.append(cache.nbytes)
        assert torch.isfinite(
            model(random_tokens(1), num_loops=num_loops, cache=cache).logits
        ).all()
    assert shared[0] == shared[1] == shared[2]


@torch.no_grad()
def test_c_halting_weights_sum_to_one_when_the_loops_run_out() -> None:
    """Reference: with one loop they sum to 0.79 on average, 0.30 at the least."""
    model = tiny_model(tiny_config(halting=ACT(bias_init=-4.0)))
    for num_loops in (1, 2, 4):
        out = model(random_tokens(3), num_loops=num_loops, collect_loops=range(1, num_loops + 1))
        total = torch.stack([*out.recurrence.halt_weights.values()]).sum(0)
        torch.testing.assert_close(total, torch.ones(3, SEQ), atol=1e-6, rtol=0)


def test_c_halting_has_a_price_and_does_not_start_at_two_loops() -> None:
    """Reference: no ponder loss anywhere, and positions halt in loop 2 of 4 or of 16."""
    model = OpenMythos(tiny_config(halting=ACT()), seed=0).train()
    out = model(random_tokens(3), num_loops=16)
    assert out.recurrence.loops_used.float().mean() > 6
    assert out.recurrence.ponder_cost is not None
    out.recurrence.ponder_cost.backward()
    halting = model.recurrent.halting
    assert halting.bias.grad < 0 and halting.weight.grad.any()


def test_c_every_loops_lora_learns() -> None:
    """Reference: rows of loops >= 3 get no gradient, since all positions have halted."""
    parts = {"loop_lora": LoopLoRA(num_loops=8), "zero_init_outputs": False}
    for halting in (NoHalting(), ACT()):
        model = OpenMythos(tiny_config(halting=halting, **parts), seed=0).train()
        model(random_tokens(3), num_loops=8).logits.square().sum().backward()
        for up in model.recurrent.conditioning.lora.up.values():
            assert (up.grad.flatten(1).abs().sum(1) > 0).all()


@torch.no_grad()
def test_c_halted_tokens_cost_nothing_with_a_cache() -> None:
    """Reference: 64 loops take 15 times as long as 4 and give the same logits to the bit."""
    model, calls = tiny_model(tiny_config(halting=ACT(bias_init=0.0)), scale=0.02), []
    model.recurrent.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    tokens, logits, counts = random_tokens(1), [], []
    for num_loops in (8, 64):
        cache = model.new_cache(1, SEQ, num_loops=num_loops)
        model(tokens[:, :-1], num_loops=num_loops, cache=cache)
        cache.advance(SEQ - 1)
        calls.clear()
        out = model(tokens[:, -1:], num_loops=num_loops, cache=cache)
        logits.append(out.logits)
        counts.append(len(calls))
        assert len(calls) == int(out.recurrence.loops_used.max()) < 8
    assert counts[0] == counts[1]
    assert torch.equal(logits[0], logits[1])


def test_c_in_training_the_loops_do_not_depend_on_the_data() -> None:
    """Reference: ranks whose positions halt in other loops abort in a collective operation."""
    model, calls = tiny_model(tiny_config(halting=ACT(bias_init=8.0))).train(), []
    model.recurrent.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    out = model(random_tokens(2), num_loops=5)
    assert (out.recurrence.loops_used < 5).all()
    assert len(calls) == 5
    out.logits.sum().backward()
    # Plain data parallelism waits for a gradient of every parameter, unused experts included.
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_c_halting_keeps_the_dtype(dtype: torch.dtype) -> None:
    """Reference: fp32 halting sums promote the state, and bf16 weights crash after the loop."""
    out = tiny_model(tiny_config(halting=ACT())).to(dtype)(random_tokens(2))
    assert out.logits.dtype == out.recurrence.state.dtype == dtype


@torch.no_grad()
def test_d_depth_beyond_training_is_used_and_stays_finite() -> None:
    """Reference: the output is frozen from loop 5 to 128, because halting cuts it off."""
    model = tiny_model(tiny_config())
    logits = [model(random_tokens(2), num_loops=n).logits for n in (1, 2, 4, 16, 128)]
    assert all(torch.isfinite(x).all() for x in logits)
    for one, more in pairwise(logits[:4]):
        assert (one - more).abs().max() > 1e-3


def test_d_decay_is_below_one_in_floating_point() -> None:
    """Reference: A = exp(-exp(-20)) is 1.0 in fp32, in bf16 from -8 on, and cannot come back."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        injection = LTI().build(3)
        with torch.no_grad():
            injection.log_rate.copy_(torch.tensor([-8.0, -12.0, -1000.0]))
            injection.raw_step_size.copy_(torch.tensor([0.0, -9.0, -1000.0]))
            injection.input_map.fill_(1)
        drive = injection.to(dtype).prepare(torch.ones(1, 1, 3, dtype=dtype))
        assert (drive.decay < 1).all()
    injection.discretize()[0].sum().backward()
    assert injection.log_rate.grad[0] < 0


@pytest.mark.parametrize("attention", members(Attention), ids=name_of)
@torch.no_grad()
def test_e_left_padding_does_not_shift_the_logits(attention: Attention) -> None:
    """Reference: there is no attention mask, and padding shifts logits by half a deviation."""
    model, tokens = tiny_model(tiny_config(attention=attention)), random_tokens(1)
    padded = torch.cat((torch.zeros(1, 5, dtype=torch.long), tokens), dim=1)
    mask = torch.arange(SEQ + 5)[None] >= 5
    ours = model(padded, attention_mask=mask).logits[:, 5:]
    torch.testing.assert_close(ours, model(tokens).logits, **CLOSE)


@torch.no_grad()
def test_e_prefill_with_fewer_loops_keeps_the_tokens_in_every_loops_cache() -> None:
    """Reference: without an error, later loops see a cache of one token."""
    model, tokens = tiny_model(tiny_config()), random_tokens(1)
    cache = model.new_cache(1, SEQ, num_loops=4)
    model(tokens[:, :8], num_loops=2, cache=cache)
    cache.advance(8)
    for loop in range(4):
        slot = cache.views("recurrent", 1, loop)[0]
        assert slot.start == 8 and slot.storage[:, :8].any(dim=-1).all()
    leaf = [cache.views("recurrent", 1, loop)[0].storage for loop in range(4)]
    before = model(tokens[:, 8:9], num_loops=4, cache=cache).logits
    leaf[3][:, :8] += 0.5
    assert not torch.equal(model(tokens[:, 8:9], num_loops=4, cache=cache).logits, before)


@torch.no_grad()
def test_e_positions_come_from_the_cache() -> None:
    """Reference: decoding without start_pos silently puts every token at position 0."""
    model, tokens = tiny_model(tiny_config()), random_tokens(1)
    cache, full = model.new_cache(1, SEQ), model(tokens).logits
    for i in range(SEQ):
        logits = model(tokens[:, i : i + 1], cache=cache).logits
        torch.testing.assert_close(logits[:, 0], full[:, i], **CLOSE)
        cache.advance(1)


class CountOperators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_f_more_experts_are_not_more_operations() -> None:
    """Reference: a Python loop over top_k x num_experts, 2048 synchronisations per token."""
    counts = []
    for num_experts, top_k in ((4, 2), (32, 2), (32, 8)):
        moe = MoE(num_experts=num_experts, top_k=top_k, expert_dim=8)
        model = tiny_model(tiny_config(recurrent_feed_forward=moe))
        with CountOperators() as counter:
            model(random_tokens(2))
        counts.append(counter.calls)
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize("attention", members(Attention), ids=name_of)
@torch.no_grad()
def test_g_prefill_in_chunks(attention: Attention) -> None:
    """Reference: more than one token on a cache that is not empty is a RuntimeError."""
    model, tokens = tiny_model(tiny_config(attention=attention)), random_tokens(2)
    cache, parts = model.new_cache(2, SEQ), []
    for start, stop in ((0, 5), (5, 7), (7, 12)):
        parts.append(model(tokens[:, start:stop], cache=cache).logits)
        cache.advance(stop - start)
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens).logits, **CLOSE)


@pytest.mark.parametrize("attention", members(Attention), ids=name_of)
@torch.no_grad()
def test_h_casting_keeps_the_positions(attention: Attention) -> None:
    """Reference: `.to(dtype)` drops the imaginary part of the rotary table, with a warning."""
    model, tokens = tiny_model(tiny_config(attention=attention)), random_tokens(2)
    before = model(tokens).logits
    assert not any(tensor.is_complex() for tensor in model.state_dict().values())
    assert torch.equal(model.to(torch.float32)(tokens).logits, before)
    # There and back: what is lost is the rounding of the weights, not the order of the tokens.
    model.to(torch.bfloat16).to(torch.float32)
    assert (model(tokens).logits - before).abs().mean() < 0.1 * before.std()
    swapped = tokens[:, [1, 0, *range(2, SEQ)]]
    assert not torch.allclose(model(swapped).logits[:, -1], model(tokens).logits[:, -1], **CLOSE)


@pytest.mark.parametrize(
    "cast",
    [nn.Module.bfloat16, nn.Module.half, lambda m: m.to(torch.bfloat16)],
    ids=["bfloat16", "half", "to"],
)
@pytest.mark.parametrize("halting", [NoHalting(), ACT()], ids=name_of)
def test_h_reduced_precision_weights_run_train_and_generate(
    halting: Any, cast: Callable[[nn.Module], OpenMythos]
) -> None:
    """Reference: forward, training and generation all crash."""
    model = cast(tiny_model(tiny_config(halting=halting))).train()
    logits = model(random_tokens(2)).logits
    assert logits.dtype == next(model.parameters()).dtype != torch.float32
    logits.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert model.generate(random_tokens(2), max_new_tokens=2).shape == (2, 2)


def test_h_activation_checkpointing_is_an_option() -> None:
    """Reference: there is none."""
    model, tokens = tiny_model(tiny_config()), random_tokens(2)
    gradients: list[list[Tensor]] = []
    for model.recurrent.checkpoint_loops in (False, True):
        model.zero_grad()
        model(tokens).logits.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_h_checkpoints_hold_no_tables_and_load_with_another_context(tmp_path: Path) -> None:
    """Reference: rotary tables are saved, up to 732 MiB, and another length does not load."""
    model, tokens = tiny_model(tiny_config()), random_tokens(2)
    model.save_pretrained(tmp_path)
    learned = {name for name, _ in model.named_parameters()}
    assert {name for name in model.state_dict() if name not in learned} == {
        "recurrent.layers.0.feed_forward.router.router_bias"
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"context": 100}))
    longer = OpenMythos.from_pretrained(tmp_path)
    assert torch.equal(longer(tokens).logits, model(tokens).logits)
    assert longer(random_tokens(1, 90)).logits.shape == (1, 90, VOCAB)


def test_h_tied_weights_can_be_saved(tmp_path: Path) -> None:
    """Reference: safetensors refuses the two names of one tensor."""
    model = tiny_model(tiny_config(tie_embeddings=True))
    model.save_pretrained(tmp_path)
    assert torch.equal(OpenMythos.from_pretrained(tmp_path).embed.weight, model.embed.weight)


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_i_ids_outside_the_vocabulary(token: int) -> None:
    """Reference: "index out of range in self"."""
    with pytest.raises(ValueError, match=f"id {token} is outside the vocabulary of {VOCAB}"):
        tiny_model(tiny_config())(torch.full((1, 3), token))


def test_i_text_beyond_the_context() -> None:
    """Reference: a shape mismatch, or generation that dies half-way and loses its tokens."""
    model = tiny_model(tiny_config(context=SEQ))
    with pytest.raises(ValueError, match=f"longer than the context of {SEQ}"):
        model(random_tokens(1, SEQ + 1))
    with pytest.raises(ValueError, match=f"longer than the context of {SEQ}"):
        stream(model, random_tokens(1), Request(max_new_tokens=1))


@pytest.mark.parametrize("num_loops", [0, -1, 2.5, True])
def test_i_impossible_loop_counts(num_loops: Any) -> None:
    """Reference: 0 runs the default, -1 gives logits of zero, 2.5 is a TypeError."""
    model = tiny_model(tiny_config())
    with pytest.raises(ValueError):
        model(random_tokens(1), num_loops=num_loops)
    with pytest.raises(ValueError):
        model.generate(random_tokens(1), max_new_tokens=1, num_loops=num_loops)
    with pytest.raises(ConfigError):
        replace(model.config, num_loops=num_loops)


def test_i_empty_prompt() -> None:
    """Reference: "cannot reshape tensor of 0 elements"."""
    with pytest.raises(ValueError, match="prompt: is empty; start with at least one token"):
        tiny_model(tiny_config()).generate(random_tokens(1, 0), max_new_tokens=1)


def test_i_sampling_limits() -> None:
    """Reference: "selected index k out of range"; temperature 0 crashes and -1 is accepted."""
    model = tiny_model(tiny_config())
    with pytest.raises(ConfigError, match=f"top_k = {VOCAB + 1}: must be .* at most {VOCAB}"):
        model.generate(random_tokens(1), max_new_tokens=1, sampling=Sampling(top_k=VOCAB + 1))
    with pytest.raises(ConfigError, match=r"temperature = -1\.0: must be a number, at least 0"):
        Sampling(temperature=-1.0)
    greedy = model.generate(random_tokens(2), max_new_tokens=1, sampling=Sampling(temperature=0.0))
    assert torch.equal(greedy[:, 0], model(random_tokens(2)).logits[:, -1].argmax(-1))


def test_i_generation_can_stop_and_be_repeated() -> None:
    """Reference: no end-of-text, no top-p, no seed."""
    model, sampling = tiny_model(tiny_config()), Sampling(temperature=1.0, top_p=0.9, seed=3)
    one, two = (
        model.generate(random_tokens(1), max_new_tokens=6, sampling=sampling) for _ in range(2)
    )
    assert torch.equal(one, two)
    stop = int(one[0, 3])
    stopped = model.generate(random_tokens(1), max_new_tokens=6, sampling=sampling, stop_id=stop)
    assert stopped[0].tolist() == one[0, : one[0].tolist().index(stop) + 1].tolist()


def test_i_generation_in_training_mode() -> None:
    """Reference: what is random in training stays random in generation."""
    model = tiny_model(tiny_config(state_init=NormalState())).train()
    one, two = (model.generate(random_tokens(2), max_new_tokens=5) for _ in range(2))
    assert torch.equal(one, two) and model.training


def test_i_misspelt_and_impossible_attention() -> None:
    """Reference: any typo builds GQA; heads that do not divide fail in the first forward pass."""
    for kind in ("MLA", "latnet", "gqa", ""):
        with pytest.raises(ConfigError, match=r"attention\.kind = .*: unknown kind"):
            from_dict(MythosConfig, {"attention": {"kind": kind}})
    with pytest.raises(ConfigError, match="num_kv_heads = 3: must divide num_heads = 8"):
        GroupedQueryAttention(num_heads=8, num_kv_heads=3)
    with pytest.raises(ConfigError, match="num_heads = 5: must divide dim = 32"):
        tiny_config(attention=GroupedQueryAttention(num_heads=5, num_kv_heads=5))


@pytest.mark.parametrize("config", VARIANTS[::5], ids=VARIANT_IDS[::5])
@torch.no_grad()
def test_logits_do_not_depend_on_the_batch(config: MythosConfig) -> None:
    """The reference has this right; so must we."""
    model, tokens = tiny_model(config), random_tokens(4)
    together = model(tokens).logits
    for row in range(4):
        alone = model(tokens[row : row + 1]).logits
        torch.testing.assert_close(alone[0], together[row], **CLOSE)
