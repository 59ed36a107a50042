"""The loop itself: truncated backprop, depths per sequence, checkpoints, statistics, states."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from variants import (
    DIM,
    FEW_VARIANT_IDS,
    FEW_VARIANTS,
    SEQ,
    assert_gradients_close,
    gradients,
    members,
    name_of,
    random_tokens,
    tiny_config,
    tiny_model,
)

from openmythos.model.config import MythosConfig
from openmythos.model.mythos import OpenMythos
from openmythos.model.outputs import MythosOutput
from openmythos.nn.block import Attention, FeedForward
from openmythos.nn.feed_forward import SwiGLU
from openmythos.nn.layout import AttentionContext, TokenLayout, attention_context
from openmythos.nn.moe import MoE
from openmythos.nn.view import LayerView, NoCache
from openmythos.recurrence import schedule
from openmythos.recurrence.halting import ACT
from openmythos.recurrence.initial_state import EncodedState, NormalState, ZeroState
from openmythos.recurrence.injections import Injection
from openmythos.recurrence.loop import RecurrentBlock
from openmythos.recurrence.loop_embedding import LoopEmbedding
from openmythos.recurrence.loop_lora import LoopLoRA
from openmythos.recurrence.schedule import LoopPlan

BIAS = "recurrent.layers.0.feed_forward.router.router_bias"
CONDITIONED: dict[str, Any] = {
    "loop_embedding": LoopEmbedding(num_loops=3),
    "loop_lora": LoopLoRA(num_loops=3, targets=("*",)),
    "recurrent_layers": 2,
}


def causal(config: MythosConfig) -> AttentionContext:
    layout = TokenLayout(SEQ, 0, torch.device("cpu"))
    tokens = torch.arange(SEQ)[None]
    return attention_context(layout, config.attention, config.dim, tokens)


def naive_loops(
    block: RecurrentBlock,
    initial: Tensor,
    encoded: Tensor,
    context: AttentionContext,
    num_loops: int,
    detach: int,
) -> Tensor:
    """h <- u + R(u) written out, cut from the graph before loop `detach`."""
    drive, state = block.injection.prepare(encoded), initial
    for loop in range(num_loops):
        state = state.detach() if loop == detach else state
        embedding, deltas = block.conditioning(loop)
        x = block.injection(state, drive)
        x = x if embedding is None else x + embedding
        for layer in block.layers:
            x, _ = layer(x, LayerView(context, NoCache(), deltas))
        state = x
    return state


# The other variants are checkpointed in model/test_invariants.py.
@pytest.mark.parametrize("config", FEW_VARIANTS[::2], ids=FEW_VARIANT_IDS[::2])
def test_the_schedule_computes_the_equation(config: MythosConfig) -> None:
    """Rows that loop differently, halted positions, checkpointing: the same as `forward`."""
    model, depths = tiny_model(config), torch.tensor([4, 1, 3])
    encoded, weights = torch.randn(2, 3, SEQ, DIM)
    encoded.requires_grad_()
    context = causal(config)
    block = model.recurrent
    rows = [
        block(row[None], context, depth)
        for row, depth in zip(encoded, depths.tolist(), strict=True)
    ]
    wanted = run_backward(model, encoded, (torch.cat(rows) * weights).sum())
    block.checkpoint_loops = True
    out = schedule.run(block, encoded, context, LoopPlan(num_loops=depths))
    torch.testing.assert_close(out.state, torch.cat(rows), rtol=1e-4, atol=1e-5)
    found = run_backward(model, encoded, (out.state * weights).sum())
    assert_gradients_close(found, wanted)


@pytest.mark.parametrize("config", FEW_VARIANTS, ids=FEW_VARIANT_IDS)
@torch.no_grad()
def test_rows_in_different_loops_step_together(config: MythosConfig) -> None:
    """One step of rows at loops 0, 3 and 7 is that of each row by itself."""
    model, loops = tiny_model(config), torch.tensor([0, 3, 7])
    block, encoded = model.recurrent, torch.randn(3, SEQ, DIM)
    context = causal(config)
    state, inputs = block.start(encoded, context)
    state = state._replace(hidden=torch.randn(3, SEQ, DIM))
    together, _ = block.step(state, inputs, loops)
    for row, loop in enumerate(loops.tolist()):
        own = state.map(lambda x: x[row : row + 1])  # noqa: B023
        alone, _ = block.step(own, inputs.rows(row, row + 1), loop)
        torch.testing.assert_close(
            together.hidden[row : row + 1], alone.hidden, rtol=1e-4, atol=1e-5
        )


@torch.no_grad()
def test_an_initial_state_from_outside() -> None:
    model, tokens = tiny_model(tiny_config(state_init=NormalState())), random_tokens(3)
    usual = model(tokens, num_loops=3)
    own = model.recurrent.initial_state.draw(
        torch.zeros(3, SEQ, DIM), torch.arange(SEQ)[None], fresh=False
    )
    assert torch.equal(model(tokens, num_loops=3, initial_state=own).logits, usual.logits)
    other = model(tokens, num_loops=3, initial_state=own + 1).logits
    assert not torch.allclose(other, usual.logits)
    mixed = model(tokens, num_loops=torch.tensor([1, 3, 2]), initial_state=own + 1).logits
    torch.testing.assert_close(mixed[1], other[1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"initial_state: has shape \[3, 1, 32\], must be"):
        model(tokens, initial_state=own[:, :1])


@pytest.mark.parametrize("injection", members(Injection), ids=name_of)
@pytest.mark.parametrize("backprop_loops", [0, 2, 99])
def test_truncated_backprop_equals_a_manual_detach(
    injection: Injection, backprop_loops: int
) -> None:
    config = tiny_config(injection=injection, state_init=EncodedState(), **CONDITIONED)
    model, num_loops = tiny_model(config), 5
    encoded, weights = torch.randn(2, 2, SEQ, DIM)
    encoded.requires_grad_()
    context = causal(config)
    plan = LoopPlan(num_loops=num_loops, backprop_loops=backprop_loops)
    out = schedule.run(model.recurrent, encoded, context, plan)
    normed = model.recurrent.prelude_norm(encoded)
    # Where all loops carry gradient, so does the initial state.
    detach = num_loops - backprop_loops if 0 < backprop_loops < num_loops else -1
    state = naive_loops(model.recurrent, normed, normed, context, num_loops, detach)
    torch.testing.assert_close(out.state, state, rtol=1e-5, atol=1e-5)
    wanted = run_backward(model, encoded, (state * weights).sum())
    assert_gradients_close(run_backward(model, encoded, (out.state * weights).sum()), wanted)
    assert wanted["recurrent.layers.0.attention.output.weight"].any()


def run_backward(model: OpenMythos, encoded: Tensor, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    encoded.grad = None
    loss.backward()
    grad = torch.zeros_like(encoded) if encoded.grad is None else encoded.grad
    return gradients(model) | {"encoded": grad}


@pytest.mark.parametrize("halting", [tiny_config().halting, ACT(bias_init=-1.0)], ids=name_of)
def test_truncation_counts_from_each_sequences_own_last_loop(halting: Any) -> None:
    model, tokens = tiny_model(tiny_config(halting=halting, **CONDITIONED)), random_tokens(4)
    depths, weights = [5, 1, 3, 2], torch.randn(4, SEQ, 50)
    out = model(tokens, num_loops=torch.tensor(depths), backprop_loops=2)
    (out.logits * weights).sum().backward()
    together = gradients(model)
    model.zero_grad()
    for row, depth in enumerate(depths):
        alone = model(tokens[row : row + 1], num_loops=depth, backprop_loops=2)
        (alone.logits[0] * weights[row]).sum().backward()
    assert_gradients_close(together, gradients(model))
    # Loops 0 and 1 carry gradient only in the short sequences, loop 2 in the long ones.
    model.zero_grad()
    model(tokens, num_loops=5, backprop_loops=2).logits.sum().backward()
    table = model.recurrent.conditioning.embedding.table.grad
    assert table[:2].abs().sum() == 0 and table[2].abs().sum() > 0


@pytest.mark.parametrize("feed_forward", members(FeedForward), ids=name_of)
@pytest.mark.parametrize("attention", members(Attention), ids=name_of)
def test_truncation_under_autocast_loses_no_gradient(
    attention: Attention, feed_forward: FeedForward
) -> None:
    """Autocast caches cast weights; one cast without gradient must not be used with gradient."""
    config = tiny_config(attention=attention, recurrent_feed_forward=feed_forward, **CONDITIONED)
    model, tokens = tiny_model(config).train(), random_tokens(3)
    found = []
    for cache_enabled in (True, False):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache_enabled):
            out = model(tokens, num_loops=torch.tensor([4, 1, 3]), backprop_loops=2)
        out.logits.float().square().sum().backward()
        found.append(gradients(model))
    # Not equal to the last bit: a weight cast once adds up its gradients in bf16.
    for (name, cached), uncached in zip(found[0].items(), found[1].values(), strict=True):
        assert (cached - uncached).norm() <= 0.02 * uncached.norm(), name
        assert uncached.any() or ".layers." not in name


def test_loops_without_gradient_keep_no_graph() -> None:
    """The memory of a truncated step does not grow with the loops that are cut off."""

    def saved_numbers(num_loops: int) -> int:
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(random_tokens(2), num_loops=num_loops, backprop_loops=2)
        return sum(sizes)

    model = tiny_model(tiny_config(recurrent_feed_forward=SwiGLU(hidden_dim=24)))
    assert saved_numbers(2) == saved_numbers(12)


def test_checkpointed_loops_keep_one_state_each() -> None:
    def saved_numbers(num_loops: int) -> int:
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(random_tokens(2), num_loops=num_loops)
        return sum(sizes)

    model = tiny_model(tiny_config(recurrent_feed_forward=SwiGLU(hidden_dim=24)))
    plain = saved_numbers(12) - saved_numbers(2)
    model.recurrent.checkpoint_loops = True
    checkpointed = saved_numbers(12) - saved_numbers(2)
    assert checkpointed < plain / 10


def expert_calls(model: OpenMythos, run: Callable[[], MythosOutput]) -> tuple[MythosOutput, Any]:
    """What each router of the recurrent block chose in each call, recorded from outside."""
    chosen: dict[int, list[Tensor]] = {index: [] for index in range(len(model.recurrent.layers))}
    hooks = [
        layer.feed_forward.router.register_forward_hook(
            lambda _m, _a, out, index=index: chosen[index].append(out[1])
        )
        for index, layer in enumerate(model.recurrent.layers)
    ]
    out = run()
    for hook in hooks:
        hook.remove()
    return out, chosen


@pytest.mark.parametrize("halting", [tiny_config().halting, ACT(bias_init=-1.0)], ids=name_of)
@pytest.mark.parametrize("checkpoint_loops", [False, True])
def test_router_statistics_are_summed_over_loops(halting: Any, checkpoint_loops: bool) -> None:
    model = tiny_model(
        tiny_config(halting=halting, feed_forward=MoE(num_experts=4, expert_dim=16), **CONDITIONED)
    ).train()
    model.recurrent.checkpoint_loops = checkpoint_loops
    depths = torch.tensor([4, 1, 3])
    out, chosen = expert_calls(
        model, lambda: model(random_tokens(3), num_loops=depths, backprop_loops=2)
    )
    assert set(out.router) == {"prelude.0", "recurrent.layers.0", "recurrent.layers.1", "coda.0"}
    for index, calls in chosen.items():
        stats = out.router[f"recurrent.layers.{index}"]
        experts = torch.cat(calls)
        assert torch.equal(stats.counts, experts.flatten().bincount(minlength=4).float())
        assert stats.tokens == len(experts) == int(out.recurrence.loops_used.sum())
        assert stats.counts.sum() == 2 * stats.tokens
    if halting.kind == "none":
        assert out.recurrence.loops_used.sum() == depths.sum() * SEQ
    for name in ("prelude.0", "coda.0"):
        assert out.router[name].tokens == 3 * SEQ
    assert model.eval()(random_tokens(3)).router == {}


@torch.no_grad()
def test_a_loop_is_routed_and_counted_by_a_bias_of_its_own() -> None:
    """Against one shared bias that is set by hand before every loop; the last is used beyond."""
    mixture = MoE(num_experts=6, expert_dim=16, bias_loops=2)
    model = tiny_model(tiny_config(recurrent_feed_forward=mixture)).train()
    shared = tiny_model(tiny_config(recurrent_feed_forward=replace(mixture, bias_loops=1)))
    biases = torch.randn(2, 6)
    values = model.state_dict() | {BIAS: torch.zeros(6)}
    shared.load_state_dict(values)
    model.load_state_dict(values | {BIAS: biases})
    tokens, depths = random_tokens(3), torch.tensor([4, 1, 3])
    out = model(tokens, num_loops=depths, backprop_loops=2)
    router = shared.get_submodule(BIAS.removesuffix(".router_bias"))
    loops = iter([0, 1, 1, 1])

    def set_bias(*_: Any) -> None:
        router.router_bias.copy_(biases[next(loops)])

    handle = router.register_forward_pre_hook(set_bias)
    wanted, own = expert_calls(shared, lambda: shared(tokens, num_loops=depths))
    handle.remove()
    torch.testing.assert_close(out.logits, wanted.logits)
    stats = out.router["recurrent.layers.0"]
    by_loop = [x.flatten().bincount(minlength=6) for x in (own[0][0], torch.cat(own[0][1:]))]
    assert stats.counts.tolist() == torch.stack(by_loop).tolist()
    load = sum(by_loop)
    assert stats.max_violation() == pytest.approx(float(load.max() / load.float().mean() - 1))


def test_the_forward_pass_changes_no_buffer_or_parameter() -> None:
    model = tiny_model(tiny_config(halting=ACT(), **CONDITIONED)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(random_tokens(2), num_loops=3).logits.sum().backward()
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("halting", [tiny_config().halting, ACT(bias_init=-1.0)], ids=name_of)
@torch.no_grad()
def test_collected_loops_are_what_fewer_loops_give(halting: Any) -> None:
    model, tokens = tiny_model(tiny_config(halting=halting, **CONDITIONED)), random_tokens(3)
    out = model(tokens, num_loops=6, collect_loops=(1, 2, 5))
    plain = model(tokens, num_loops=6)
    assert torch.equal(out.logits, plain.logits)
    assert list(out.loop_logits) == list(out.recurrence.outputs) == [1, 2, 5]
    for loops, output, logits in zip(
        (1, 2, 5), out.recurrence.outputs.values(), out.loop_logits.values(), strict=True
    ):
        fewer = model(tokens, num_loops=loops)
        torch.testing.assert_close(output, fewer.recurrence.state)
        torch.testing.assert_close(logits, fewer.logits)
    assert plain.loop_logits == plain.recurrence.states == plain.recurrence.halt_weights == {}


@torch.no_grad()
def test_collected_loops_of_sequences_of_different_depth() -> None:
    model, tokens = tiny_model(tiny_config(**CONDITIONED)), random_tokens(4)
    depths, mask = (
        torch.tensor([2, 5, 1, 3]),
        torch.arange(SEQ) >= torch.tensor([[4], [0], [1], [2]]),
    )
    out = model(tokens, num_loops=depths, attention_mask=mask, collect_loops=range(1, 6))
    order = out.recurrence.order
    assert order is not None and order.tolist() == [1, 3, 0, 2]
    for loops, logits in out.loop_logits.items():
        rows = [row for row in order.tolist() if depths[row] >= loops]
        fewer = model(tokens[rows], num_loops=loops, attention_mask=mask[rows])
        torch.testing.assert_close(logits, fewer.logits, rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_a_random_initial_state_is_fixed_at_inference_and_fresh_in_training() -> None:
    model = tiny_model(tiny_config(state_init=NormalState()))
    block, encoded = model.recurrent, torch.zeros(2, 6, DIM)

    def initial(first: int, training: bool = False) -> Tensor:
        return block.initial_state.draw(
            encoded, torch.arange(first, first + 6)[None], fresh=training
        )

    assert torch.equal(initial(0), initial(0))
    assert torch.equal(initial(0)[:, 3:], initial(3)[:, :3])
    assert not torch.equal(initial(0, training=True), initial(0, training=True))
    for training in (False, True):
        many = torch.zeros(64, 64, DIM)
        state = block.initial_state.draw(many, torch.arange(4096).view(64, 64), fresh=training)
        assert state.std() == pytest.approx((2 / (5 * DIM)) ** 0.5, rel=0.02)
        assert abs(state.mean()) < 0.002


@torch.no_grad()
def test_initial_states() -> None:
    encoded, positions = torch.randn(2, SEQ, DIM), torch.arange(SEQ)[None]
    zeros, same = (
        kind().draw(encoded, positions, fresh=False) for kind in (ZeroState, EncodedState)
    )
    assert not zeros.any()
    assert torch.equal(same, encoded)


@pytest.mark.parametrize("fresh", [False, True])
def test_a_truncated_state_has_no_outliers_and_its_own_spread(fresh: bool) -> None:
    encoded, positions = torch.zeros(64, 64, 32), torch.arange(4096).view(64, 64)
    std = (2 / (5 * 32)) ** 0.5
    state = NormalState(truncate=1.0).draw(encoded, positions, fresh=fresh)
    assert state.abs().max() <= std * (1 + 1e-6)
    # The standard deviation of a standard normal cut at 1.
    assert state.std() == pytest.approx(0.5398 * std, rel=0.01)


@torch.no_grad()
def test_a_block_of_equal_depths_is_the_same_as_one_number() -> None:
    model, tokens = tiny_model(tiny_config(halting=ACT(), **CONDITIONED)), random_tokens(3)
    one = model(tokens, num_loops=3)
    each = model(tokens, num_loops=torch.tensor([3, 3, 3]))
    assert torch.equal(one.logits, each.logits)
    assert torch.equal(one.recurrence.loops_used, each.recurrence.loops_used)


@torch.no_grad()
def test_work_is_the_sum_of_the_depths() -> None:
    model, fed = tiny_model(tiny_config()).train(), []
    model.recurrent.layers[0].attention.register_forward_pre_hook(
        lambda _, args: fed.append(len(args[0]))
    )
    model(random_tokens(4), num_loops=torch.tensor([1, 4, 2, 2]))
    assert fed == [4, 3, 1, 1]
