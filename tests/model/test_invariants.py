"""What holds for every variant: causality, cached decoding, finite depth, dtypes, saving."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from variants import (
    CACHE_POLICIES,
    COMBINATION_IDS,
    COMBINATIONS,
    EXIT_RULES,
    FEW_VARIANT_IDS,
    FEW_VARIANTS,
    RULE_VARIANT_IDS,
    RULE_VARIANTS,
    SEQ,
    VARIANT_IDS,
    VARIANTS,
    VOCAB,
    assert_gradients_close,
    cover,
    gradients,
    here,
    members,
    name_of,
    random_tokens,
    tiny_config,
    tiny_model,
)

from openmythos.model.config import MythosConfig
from openmythos.model.mythos import OpenMythos
from openmythos.nn.block import Attention
from openmythos.nn.cache import CachePolicy, ExactCache, KVCache
from openmythos.recurrence.exit_rules import ExitRule, KLExit, StateChangeExit
from openmythos.recurrence.halting import Halting
from openmythos.recurrence.loop_embedding import LoopEmbedding
from openmythos.recurrence.loop_lora import LoopLoRA

CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-4}
few_variants = pytest.mark.parametrize("config", FEW_VARIANTS, ids=FEW_VARIANT_IDS)
PADDING = [0, 3, 6]  # left padding of each row
pytestmark = pytest.mark.usefixtures("device")


def left_padded() -> tuple[Tensor, Tensor]:
    tokens = random_tokens(len(PADDING))
    return tokens, torch.arange(SEQ) >= torch.tensor(PADDING)[:, None]


def embedding_gradients(
    model: OpenMythos, num_loops: int, exit_rule: ExitRule | None = None
) -> Tensor:
    """Row b: gradient of random weights on the logits of position b, [seq, seq, dim]."""
    tokens = random_tokens(1).expand(SEQ, SEQ)
    leaf = model.embed(tokens).detach().requires_grad_()
    hook = model.embed.register_forward_hook(lambda *_: leaf)
    logits = model(tokens, num_loops=num_loops, exit_rule=exit_rule).logits
    hook.remove()
    own = logits[torch.arange(SEQ), torch.arange(SEQ)]
    (own * torch.randn_like(own)).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def check_causal(gradient: Tensor, window: int) -> None:
    size = gradient.abs().amax(dim=-1)
    assert torch.isfinite(size).all()
    assert (size.triu(1) == 0).all(), "a position sees a later one"
    seen = size.tril() if not window else size.tril() - size.tril(-window)
    reachable = torch.ones_like(seen).tril()
    if window:
        reachable -= reachable.tril(-window)
    assert (seen[reachable.bool()] > 0).all(), "a position does not see an earlier one"


@pytest.mark.parametrize("config", COMBINATIONS, ids=COMBINATION_IDS)
def test_no_position_sees_a_later_one(config: MythosConfig) -> None:
    check_causal(embedding_gradients(tiny_model(config), 3), config.attention.window)


@few_variants
def test_no_position_sees_a_later_one_in_training(config: MythosConfig) -> None:
    check_causal(embedding_gradients(tiny_model(config).train(), 2), config.attention.window)


@pytest.mark.parametrize("config, rule", RULE_VARIANTS, ids=RULE_VARIANT_IDS)
def test_exit_rules_do_not_look_ahead(config: MythosConfig, rule: ExitRule) -> None:
    check_causal(embedding_gradients(tiny_model(config), 4, rule), config.attention.window)


def decode(model: OpenMythos, tokens: Tensor, chunks: list[int], **options: Any) -> Tensor:
    return decode_with_loops(model, tokens, chunks, **options)[0]


def decode_with_loops(
    model: OpenMythos,
    tokens: Tensor,
    chunks: list[int],
    *,
    num_loops: int,
    mask: Tensor | None = None,
    rule: ExitRule | None = None,
    prefill: CachePolicy | None = None,
    policy: CachePolicy | None = None,
) -> tuple[Tensor, Tensor]:
    """(logits, loops used) of all positions: a prompt in `chunks`, then one token at a time."""
    cache = model.new_cache(
        len(tokens), tokens.shape[1], num_loops=num_loops, prefill=prefill, decode=policy
    )
    start, logits, loops_used = 0, [], []
    for size in [*chunks, *[1] * (tokens.shape[1] - sum(chunks))]:
        if start == sum(chunks):
            cache.begin_decode()
        part = slice(start, start + size)
        chunk_mask = None if mask is None or start >= sum(chunks) else mask[:, part]
        out = model(
            tokens[:, part],
            num_loops=num_loops,
            cache=cache,
            attention_mask=chunk_mask,
            exit_rule=rule,
        )
        cache.advance(size)
        logits.append(out.logits)
        loops_used.append(out.recurrence.loops_used)
        start += size
    return torch.cat(logits, dim=1), torch.cat(loops_used, dim=1)


DEPTHS = [(c, (5, 2, 1)[i % 3]) for i, c in enumerate(VARIANTS)]


@pytest.mark.parametrize("config, num_loops", DEPTHS, ids=VARIANT_IDS)
@torch.no_grad()
def test_cached_decoding_equals_the_full_pass(config: MythosConfig, num_loops: int) -> None:
    model, (tokens, mask) = tiny_model(config), left_padded()
    full = model(tokens, num_loops=num_loops, attention_mask=mask).logits
    assert torch.isfinite(full).all()
    # The first two pieces hold padding, the third does not.
    cached = decode(model, tokens, [5, 3, 2], num_loops=num_loops, mask=mask)
    torch.testing.assert_close(cached[mask], full[mask], **CLOSE)


@pytest.mark.parametrize("halting", members(Halting), ids=name_of)
@pytest.mark.parametrize("attention", members(Attention), ids=name_of)
@settings(max_examples=6)
@given(st.lists(st.integers(1, 5), max_size=4), st.integers(1, 4))
def test_cached_decoding_for_any_chunks(
    attention: Attention, halting: Halting, chunks: list[int], num_loops: int
) -> None:
    chunks = [size for i, size in enumerate(chunks) if sum(chunks[: i + 1]) <= SEQ]
    model = tiny_model(tiny_config(attention=attention, halting=halting))
    tokens = random_tokens(2)
    with torch.no_grad():
        full = model(tokens, num_loops=num_loops).logits
        cached = decode(model, tokens, chunks, num_loops=num_loops)
    torch.testing.assert_close(cached, full, **CLOSE)


@few_variants
@torch.no_grad()
def test_left_padding_and_the_other_rows_change_nothing(config: MythosConfig) -> None:
    model, (tokens, mask) = tiny_model(config), left_padded()
    batch = model(tokens, num_loops=3, attention_mask=mask)
    for row, padding in enumerate(PADDING):
        alone = model(tokens[row : row + 1, padding:], num_loops=3)
        torch.testing.assert_close(batch.logits[row, padding:], alone.logits[0], **CLOSE)
        used = batch.recurrence.loops_used[row, padding:]
        assert used.tolist() == alone.recurrence.loops_used[0].tolist()


EXITS = cover(
    "exits",
    {
        "rule": EXIT_RULES,
        "attention": members(Attention),
        "halting": [part for part in members(Halting) if part.kind != "exit_gate"],
        "coda_layers": [0, 2],
    },
)


@pytest.mark.parametrize("parts", EXITS, ids=lambda row: "-".join(map(name_of, row.values())))
@torch.no_grad()
def test_exit_rules_leave_alike_with_a_cache(parts: dict[str, Any]) -> None:
    rule = parts["rule"]
    config = tiny_config(**{name: part for name, part in parts.items() if name != "rule"})
    model, (tokens, mask) = tiny_model(config, scale=0.15), left_padded()
    full = model(tokens, num_loops=6, attention_mask=mask, exit_rule=rule)
    cached, loops_used = decode_with_loops(model, tokens, [5, 4], num_loops=6, mask=mask, rule=rule)
    assert torch.equal(loops_used[mask], full.recurrence.loops_used[mask])
    torch.testing.assert_close(cached[mask], full.logits[mask], **CLOSE)


@torch.no_grad()
def test_a_rule_that_reads_logits_wants_the_whole_cache() -> None:
    """What the coda made of earlier tokens' loops is not there where no rule had it made."""
    model, tokens, rule = tiny_model(tiny_config()), random_tokens(2), KLExit(threshold=0.002)
    cache = model.new_cache(2, SEQ, num_loops=3)
    plain = cache.nbytes
    model(tokens[:, :5], num_loops=3, cache=cache)
    assert cache.nbytes == plain
    cache.advance(5)
    with pytest.raises(ValueError, match="exit_rule: reads the logits of every loop"):
        model(tokens[:, 5:6], num_loops=3, cache=cache, exit_rule=rule)
    # A rule that looks at states alone, and any rule without a coda, may come at any time.
    model(tokens[:, 5:6], num_loops=3, cache=cache, exit_rule=StateChangeExit())
    model = tiny_model(tiny_config(coda_layers=0))
    cache = model.new_cache(2, SEQ, num_loops=3)
    model(tokens[:, :5], num_loops=3, cache=cache)
    cache.advance(5)
    model(tokens[:, 5:6], num_loops=3, cache=cache, exit_rule=rule)


@torch.no_grad()
@pytest.mark.parametrize("policy", CACHE_POLICIES, ids=name_of)
@pytest.mark.parametrize("prefill", CACHE_POLICIES, ids=name_of)
def test_every_pair_of_cache_policies_decodes(prefill: CachePolicy, policy: CachePolicy) -> None:
    # Halting, since a shared slot must also keep the keys and values of halted positions.
    model, (tokens, mask) = tiny_model(tiny_config(halting=members(Halting)[-1])), left_padded()
    logits = decode(model, tokens, [5, 4], num_loops=5, mask=mask, prefill=prefill, policy=policy)
    assert logits.shape == (3, SEQ, VOCAB)
    assert torch.isfinite(logits).all()
    if isinstance(prefill, ExactCache) and isinstance(policy, ExactCache):
        full = model(tokens, num_loops=5, attention_mask=mask).logits
        torch.testing.assert_close(logits[mask], full[mask], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("policy", CACHE_POLICIES, ids=name_of)
def test_a_prompt_in_one_chunk_is_exact_where_every_loop_writes(policy: CachePolicy) -> None:
    model, tokens = tiny_model(tiny_config()), random_tokens(2)
    full = model(tokens, num_loops=5).logits
    cached = decode(model, tokens, [SEQ], num_loops=5, prefill=policy)
    same = torch.allclose(cached, full, **CLOSE)
    assert same == policy.overwrites


@torch.no_grad()
@pytest.mark.parametrize("policy", [p for p in CACHE_POLICIES if p.overwrites], ids=name_of)
def test_a_shared_cache_shows_earlier_tokens_as_their_last_writer_left_them(
    policy: CachePolicy,
) -> None:
    """Twin: an exact cache whose slots are overwritten by hand after every token.

    It stands for policies whose loops all write: another loop also reads its own token elsewhere.
    """
    num_loops, tokens = 5, random_tokens(2)
    model = tiny_model(tiny_config(recurrent_layers=2))
    writer = {policy.slot(loop): loop for loop in range(num_loops)}
    shared = decode(model, tokens, [6], num_loops=num_loops, policy=policy)
    cache, logits = model.new_cache(2, SEQ, num_loops=num_loops), []
    for part in (slice(0, 6), *(slice(i, i + 1) for i in range(6, SEQ))):
        logits.append(model(tokens[:, part], num_loops=num_loops, cache=cache).logits)
        cache.advance(part.stop - part.start)
        for layer in range(2):
            slots = [cache.views("recurrent", 1, loop)[layer].storage for loop in range(num_loops)]
            final = [slots[writer[policy.slot(loop)]].clone() for loop in range(num_loops)]
            for slot, seen in zip(slots, final, strict=True):
                slot[:, part] = seen[:, part]
    torch.testing.assert_close(shared, torch.cat(logits, dim=1), **CLOSE)


@torch.no_grad()
def test_prefill_with_fewer_loops_than_decode_repeats_the_last_loops_keys_and_values() -> None:
    model, tokens = tiny_model(tiny_config(recurrent_layers=2)), random_tokens(2)
    cache = model.new_cache(2, SEQ, num_loops=5)
    model(tokens[:, :8], num_loops=2, cache=cache)
    cache.advance(8)
    for layer in range(2):
        slots = [cache.views("recurrent", 1, loop)[layer].storage for loop in range(5)]
        first, last, *others = [slot[:, :8] for slot in slots]
        assert not torch.equal(first, last)
        assert all(torch.equal(other, last) for other in others)
    assert torch.isfinite(model(tokens[:, 8:9], num_loops=5, cache=cache).logits).all()


@torch.no_grad()
@pytest.mark.parametrize("attention", members(Attention), ids=name_of)
def test_decode_with_fewer_loops_than_prefill_equals_the_full_pass(attention: Attention) -> None:
    # Without a coda, whose keys and values know how often the prompt was looped.
    model = tiny_model(tiny_config(attention=attention, coda_layers=0))
    tokens = random_tokens(2)
    cache = model.new_cache(2, SEQ, num_loops=5)
    model(tokens[:, :8], num_loops=5, cache=cache)
    cache.advance(8)
    full = model(tokens, num_loops=2).logits
    cached = model(tokens[:, 8:], num_loops=2, cache=cache).logits
    torch.testing.assert_close(cached, full[:, 8:], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("halting", members(Halting), ids=name_of)
def test_loops_that_no_position_ran_are_filled_after_an_early_exit(halting: Halting) -> None:
    model = tiny_model(tiny_config(halting=halting))
    cache = model.new_cache(2, SEQ, num_loops=6)
    rule = StateChangeExit(threshold=10.0)
    out = model(random_tokens(2), num_loops=6, cache=cache, exit_rule=rule)
    assert (out.recurrence.loops_used == 1).all()
    slots = [cache.views("recurrent", 1, loop)[0].storage for loop in range(6)]
    assert slots[0][:, :SEQ].abs().sum() > 0
    assert all(torch.equal(slot, slots[0]) for slot in slots)


@torch.no_grad()
@pytest.mark.parametrize("halting", members(Halting), ids=name_of)
def test_the_forward_pass_does_not_advance_the_cache(halting: Halting) -> None:
    model, tokens = tiny_model(tiny_config(halting=halting)), random_tokens(2)
    cache = model.new_cache(2, SEQ, num_loops=3)
    first = model(tokens[:, :7], cache=cache).logits
    assert cache.length == 0
    again = model(tokens[:, :7], cache=cache).logits
    assert torch.equal(first, again)
    cache.advance(7)
    before = [storage_of(cache, loop)[:, :7].clone() for loop in range(3)]
    once, twice = (model(tokens[:, 7:9], cache=cache).logits for _ in range(2))
    assert cache.length == 7
    assert torch.equal(once, twice)
    assert all(torch.equal(storage_of(cache, i)[:, :7], before[i]) for i in range(3))


def storage_of(cache: KVCache, loop: int) -> Tensor:
    return cache.views("recurrent", 1, loop)[0].storage


@few_variants
@torch.no_grad()
def test_any_number_of_loops_is_finite(config: MythosConfig) -> None:
    out = tiny_model(config)(random_tokens(1), num_loops=24)
    assert torch.isfinite(out.logits).all()
    assert torch.isfinite(out.recurrence.state).all()


@torch.no_grad()
def test_beyond_the_last_loop_its_parameters_are_used_again() -> None:
    short = tiny_config(
        loop_embedding=LoopEmbedding(num_loops=2), loop_lora=LoopLoRA(num_loops=2, targets=("*",))
    )
    long = replace(
        short,
        loop_embedding=LoopEmbedding(num_loops=6),
        loop_lora=LoopLoRA(num_loops=6, targets=("*",)),
    )
    model, repeated = tiny_model(short), OpenMythos(long).eval().to(here())
    last = torch.tensor([0, 1, 1, 1, 1, 1])
    state = {
        name: tensor[last] if ".conditioning." in name else tensor
        for name, tensor in model.state_dict().items()
    }
    repeated.load_state_dict(state)
    tokens = random_tokens(2)
    for num_loops in (1, 2, 6):
        ours = model(tokens, num_loops=num_loops).logits
        assert torch.equal(ours, repeated(tokens, num_loops=num_loops).logits)
    assert torch.equal(model(tokens, num_loops=9).logits, repeated(tokens, num_loops=9).logits)


@few_variants
def test_sequences_of_different_depth_equal_each_alone(config: MythosConfig) -> None:
    """Forward and every gradient; eval mode, where a random initial state is fixed."""
    model, (tokens, mask) = tiny_model(config), left_padded()
    depths, weights = [2, 5, 1], torch.randn(len(tokens), SEQ, VOCAB)
    out = model(tokens, num_loops=torch.tensor(depths), attention_mask=mask)
    (out.logits * weights)[mask].sum().backward()
    together = gradients(model)
    model.zero_grad()
    for row, (depth, padding) in enumerate(zip(depths, PADDING, strict=True)):
        alone = model(tokens[row : row + 1, padding:], num_loops=depth)
        torch.testing.assert_close(out.logits[row, padding:], alone.logits[0], **CLOSE)
        used = out.recurrence.loops_used[row, padding:]
        assert used.tolist() == alone.recurrence.loops_used[0].tolist()
        (alone.logits[0] * weights[row, padding:]).sum().backward()
    assert_gradients_close(together, gradients(model))


# The other variants are checkpointed in recurrence/test_loop.py.
@pytest.mark.parametrize("config", FEW_VARIANTS[1::2], ids=FEW_VARIANT_IDS[1::2])
def test_checkpointed_loops_give_the_same_gradients(config: MythosConfig) -> None:
    model, tokens = tiny_model(config).train(), random_tokens(3)
    results = []
    for checkpoint_loops in (False, True):
        model.recurrent.checkpoint_loops = checkpoint_loops
        model.zero_grad()
        torch.manual_seed(0)
        out = model(tokens, num_loops=torch.tensor([3, 1, 4]), backprop_loops=2)
        loss = out.logits.square().sum()
        if out.recurrence.ponder_cost is not None:
            loss = loss + out.recurrence.ponder_cost
        loss = loss + sum(stats.balance + stats.z for stats in out.router.values())
        loss.backward()
        results.append((out, gradients(model)))
    (plain, wanted), (checkpointed, found) = results
    assert torch.equal(plain.logits, checkpointed.logits)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert plain.router.keys() == checkpointed.router.keys()
    for name, stats in plain.router.items():
        for ours, theirs in zip(stats, checkpointed.router[name], strict=True):
            assert torch.equal(ours, theirs)


@few_variants
def test_bf16_weights(config: MythosConfig) -> None:
    model, tokens = tiny_model(config).to(torch.bfloat16).train(), random_tokens(2)
    out = model(tokens, num_loops=3)
    assert out.logits.dtype == out.recurrence.state.dtype == torch.bfloat16
    out.logits.float().square().mean().backward()
    for name, gradient in gradients(model).items():
        assert torch.isfinite(gradient).all() and gradient.dtype == torch.bfloat16, name
    assert storage_of(model.new_cache(2, SEQ), 0).dtype == torch.bfloat16
    assert model.generate(tokens, max_new_tokens=2, num_loops=3).shape == (2, 2)


@few_variants
def test_bf16_autocast(config: MythosConfig) -> None:
    model, tokens = tiny_model(config), random_tokens(2)
    with torch.autocast(here().type, torch.bfloat16):
        out = model(tokens, num_loops=3)
        assert model.generate(tokens, max_new_tokens=2, num_loops=3).shape == (2, 2)
    # The residual stream stays in fp32: bf16 would lose what late loops add.
    assert out.recurrence.state.dtype == torch.float32
    exact = model(tokens, num_loops=3).logits
    # On average, since rounding may send a token to another expert or let it halt elsewhere.
    assert (out.logits.float() - exact).abs().mean() < 0.1 * exact.std()
    out.logits.float().square().mean().backward()
    for name, gradient in gradients(model).items():
        assert torch.isfinite(gradient).all() and gradient.dtype == torch.float32, name


@few_variants
@torch.no_grad()
def test_saving_and_loading_gives_the_same_model(config: MythosConfig, tmp_path: Path) -> None:
    model, tokens = tiny_model(config), random_tokens(2)
    model.save_pretrained(tmp_path)
    loaded = OpenMythos.from_pretrained(tmp_path).to(here())
    assert loaded.config == config
    assert not loaded.training
    weights, found = model.state_dict(), loaded.state_dict()
    assert weights.keys() == found.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    ours, theirs = (m(tokens, num_loops=4).logits for m in (model, loaded))
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)


@few_variants
def test_every_parameter_gets_a_gradient(config: MythosConfig) -> None:
    """Loops enough to reach every per-loop parameter; data-parallel training needs them all."""
    model = tiny_model(config).train()
    out = model(random_tokens(4, seed=1), num_loops=5)
    ponder_cost = 0 if out.recurrence.ponder_cost is None else out.recurrence.ponder_cost
    (out.logits.square().sum() + ponder_cost).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_a_feed_forward_or_attention_variant_changes_the_logits() -> None:
    """Guards the lists above: every variant is really another model."""
    tokens = random_tokens(2)
    with torch.no_grad():
        logits = [tiny_model(config)(tokens, num_loops=3).logits for config in FEW_VARIANTS]
    for (i, a), (j, b) in itertools.combinations(enumerate(logits), 2):
        assert not torch.allclose(a, b), (FEW_VARIANT_IDS[i], FEW_VARIANT_IDS[j])


def test_exit_rules_leave_early_and_at_different_loops() -> None:
    """Guards the tests above: the rules that they run do something."""
    for rule in EXIT_RULES:
        model = tiny_model(tiny_config())
        used = model(random_tokens(3), num_loops=6, exit_rule=rule).recurrence.loops_used
        if rule.kind == "fixed":
            assert (used == 6).all()
        else:
            assert used.min() < 6 and len(used.unique()) > 1, name_of(rule)


@pytest.mark.parametrize("rule", [KLExit, StateChangeExit])
def test_a_rule_for_whole_sequences_does_not_look_ahead(rule: type[Any]) -> None:
    model = tiny_model(tiny_config())
    gradients = embedding_gradients(model, 4, rule(threshold=0.01, scope="sequence"))
    check_causal(gradients, model.config.attention.window)
