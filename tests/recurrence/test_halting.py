"""ACT: weights, ponder cost, frozen positions, and the packed path against a naive twin."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from variants import (
    DIM,
    SEQ,
    active_positions,
    assert_gradients_close,
    gradients,
    members,
    random_tokens,
    tiny_config,
    tiny_model,
)

from openmythos.config import ConfigError
from openmythos.model.config import MythosConfig
from openmythos.model.mythos import OpenMythos
from openmythos.nn.block import Attention, FeedForward
from openmythos.nn.layout import AttentionContext, TokenLayout, attention_context
from openmythos.nn.moe import MoE
from openmythos.nn.view import LayerView, NoCache
from openmythos.recurrence import schedule
from openmythos.recurrence.exit_rules import StateChangeExit
from openmythos.recurrence.halting import ACT, ACTHalting, ExitGate, HaltState
from openmythos.recurrence.loop import RecurrentBlock
from openmythos.recurrence.loop_embedding import LoopEmbedding
from openmythos.recurrence.schedule import LoopPlan
from openmythos.recurrence.trace import RecurrentOutput


def run(
    model: OpenMythos, num_loops: int | Tensor, encoded: Tensor | None = None
) -> RecurrentOutput:
    """The recurrent block by itself, with everything collected."""
    encoded = torch.randn(3, SEQ, DIM) if encoded is None else encoded
    context = causal(model.config)
    last = int(torch.as_tensor(num_loops).max())
    loops = range(1, last + 1)
    plan = LoopPlan(num_loops=num_loops, collect=loops)
    return schedule.run(model.recurrent, encoded, context, plan)


def causal(config: MythosConfig) -> AttentionContext:
    layout = TokenLayout(SEQ, 0, torch.device("cpu"))
    return attention_context(layout, config.attention, config.dim)


def probabilities_to_states(probabilities: list[float]) -> list[Tensor]:
    """States [1, 1, 1] at which a halting unit with weight 1 and bias 0 says so."""
    return [torch.tensor(p).logit().view(1, 1, 1) for p in probabilities]


def halt_by_hand(config: ACT, probabilities: list[float]) -> tuple[Tensor, Tensor, list[float]]:
    """(output, ponder, weight per loop) of one position."""
    halting = ACTHalting(config, 1)
    with torch.no_grad():
        halting.weight.fill_(1)
        halting.bias.fill_(0)
    states = probabilities_to_states(probabilities)
    halt, active, used = halting.start(states[0]), torch.ones(1, 1, dtype=torch.bool), 0
    weights = []
    for loop, state in enumerate(states):
        used += int(active)
        before = halt.cumulative
        halt, active = halting.update(halt, active, state, loop)
        weights.append(float((halt.cumulative - before).detach()))
    output, ponder = halting.finish(halt, states[-1], torch.tensor([[used]]))
    return output, ponder, weights


def test_worked_example() -> None:
    """0.3 + 0.4 + 0.5 crosses the threshold in the third loop, which gets the remainder 0.3."""
    probabilities = [0.3, 0.4, 0.5, 0.9]
    output, ponder, weights = halt_by_hand(ACT(), probabilities)
    assert weights == pytest.approx([0.3, 0.4, 0.3, 0], abs=1e-6)
    states = torch.cat(probabilities_to_states(probabilities)).flatten()
    expected = 0.3 * states[0] + 0.4 * states[1] + 0.3 * states[2]
    torch.testing.assert_close(output.flatten()[0], expected)
    assert ponder.item() == pytest.approx(3 + 0.3, abs=1e-6)


def test_worked_example_where_the_loops_run_out() -> None:
    """The last loop gets 1 - 0.1 = 0.9, so N + R = 2 + 0.9."""
    output, ponder, weights = halt_by_hand(ACT(), [0.1, 0.2])
    assert weights == pytest.approx([0.1, 0.2], abs=1e-6)
    states = torch.cat(probabilities_to_states([0.1, 0.2])).flatten()
    torch.testing.assert_close(output.flatten()[0], 0.1 * states[0] + 0.9 * states[1])
    assert ponder.item() == pytest.approx(2.9, abs=1e-6)


def test_worked_example_with_a_minimum() -> None:
    _, ponder, weights = halt_by_hand(ACT(min_loops=3), [0.999, 0.999, 0.5, 0.6])
    assert weights == pytest.approx([0, 0, 0.5, 0.5], abs=1e-6)
    assert ponder.item() == pytest.approx(4.5, abs=1e-6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("num_loops", [1, 2, 5, (3, 5, 1)])
@pytest.mark.parametrize(
    "act",
    [ACT(bias_init=b, min_loops=m) for b, m in ((-6.0, 1), (-1.0, 1), (0.0, 2))],
    ids=str,
)
@torch.no_grad()
def test_weights_sum_to_one(act: ACT, num_loops: int | tuple[int, ...], training: bool) -> None:
    model = tiny_model(tiny_config(halting=act)).train(training)
    loops = num_loops if isinstance(num_loops, int) else torch.tensor(num_loops)
    out = run(model, loops)
    weights = [torch.nn.functional.pad(w, (0, 0, 0, 3 - len(w))) for w in out.halt_weights.values()]
    total = torch.stack(weights).sum(0)
    torch.testing.assert_close(total, torch.ones(3, SEQ), atol=1e-6, rtol=0)
    assert all((weight >= 0).all() for weight in weights)
    # What the coda gets is the weighted sum of the states.
    mixed = torch.zeros(3, SEQ, DIM)
    for weight, state in zip(out.halt_weights.values(), out.states.values(), strict=True):
        mixed[: len(state)] += weight[..., None] * state
    state = out.state if out.order is None else out.state[out.order]
    torch.testing.assert_close(state, mixed, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_weights_are_those_of_the_formula() -> None:
    model = tiny_model(tiny_config(halting=ACT(bias_init=-1.0)))
    out = run(model, 5)
    halting = model.recurrent.halting
    cumulative, active = torch.zeros(3, SEQ), torch.ones(3, SEQ, dtype=torch.bool)
    for loop, (weight, state) in enumerate(
        zip(out.halt_weights.values(), out.states.values(), strict=True)
    ):
        p = (state @ halting.weight + halting.bias).sigmoid()
        crosses = (cumulative + p > 0.99) | (loop == len(out.states) - 1)
        expected = torch.where(crosses, 1 - cumulative, p) * active
        torch.testing.assert_close(weight, expected, atol=1e-6, rtol=0)
        cumulative, active = cumulative + expected, active & ~crosses
    assert len(out.loops_used.unique()) > 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("feed_forward", members(FeedForward), ids=lambda f: f.kind)
@torch.no_grad()
def test_halted_positions_stand_still_and_cost_no_feed_forward(
    feed_forward: FeedForward, training: bool
) -> None:
    act = ACT(bias_init=-0.5)
    model = tiny_model(tiny_config(halting=act, recurrent_feed_forward=feed_forward))
    model.train(training)
    fed: list[int] = []
    model.recurrent.layers[0].feed_forward.register_forward_pre_hook(
        lambda _, args: fed.append(active_positions(*args))
    )
    num_loops = 24
    out = run(model, num_loops)
    used = out.loops_used
    assert used.max() < num_loops and len(used.unique()) > 1
    states, weights = [*out.states.values()], [*out.halt_weights.values()]
    for loop in range(1, len(states)):
        halted = used <= loop
        assert torch.equal(states[loop][halted], states[loop - 1][halted])
        assert (states[loop][~halted] != states[loop - 1][~halted]).any(dim=-1).all()
        assert (weights[loop][halted] == 0).all()
    # In training every rank must run the same loops, at inference nobody waits.
    loops_run = num_loops if training else int(used.max())
    assert fed == [int((used > loop).sum()) for loop in range(loops_run)]


def naive_act(
    block: RecurrentBlock, encoded: Tensor, context: AttentionContext, num_loops: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(output, ponder cost, loads): every position runs everything, `where` picks."""
    assert isinstance(block.halting, ACTHalting)
    config, batch, seq = block.halting.config, *encoded.shape[:2]
    drive = block.injection.prepare(block.prelude_norm(encoded))
    state, output = torch.zeros_like(encoded), torch.zeros_like(encoded)
    kvs: list[Tensor | None] = [None] * len(block.layers)
    cumulative = loops_used = ponder = torch.zeros(batch, seq)
    active = torch.ones(batch, seq, dtype=torch.bool)
    loads = []
    for loop in range(num_loops):
        embedding, deltas = block.conditioning(loop)
        x = block.injection(state, drive) + (0 if embedding is None else embedding)
        for index, layer in enumerate(block.layers):
            normed = layer.attention_norm(x)
            kv, old = layer.attention.project_kv(normed, context, deltas), kvs[index]
            kv = kv if old is None else torch.where(active[..., None], kv, old)
            kvs[index] = kv
            x = x + layer.attention(normed, kv, context, deltas)
            normed = layer.feed_forward_norm(x)
            x = x + layer.feed_forward(normed, LayerView(context, NoCache(), deltas=deltas))[0]
            if isinstance(layer.feed_forward.config, MoE):
                chosen = layer.feed_forward.router(normed[active]).chosen
                loads.append(chosen.flatten().bincount(minlength=4))
        state = torch.where(active[..., None], x, state)
        prob = (state @ block.halting.weight + block.halting.bias).sigmoid()
        prob = prob if loop + 1 >= config.min_loops else torch.zeros_like(prob)
        ends = (cumulative + prob > config.threshold) | (loop == num_loops - 1)
        weight = torch.where(ends, 1 - cumulative, prob)
        weight = torch.where(active, weight, 0)
        loops_used = loops_used + active
        ponder = torch.where(active & ends, loops_used + weight, ponder)
        output = output + weight[..., None] * state
        cumulative, active = cumulative + weight, active & ~ends
    return output, ponder.mean(), loads


@pytest.mark.parametrize(
    "act", [ACT(bias_init=-0.5), ACT(bias_init=-0.5, min_loops=3), ACT(bias_init=-6.0)], ids=str
)
@pytest.mark.parametrize("attention", members(Attention), ids=lambda a: a.kind)
def test_packed_positions_equal_the_naive_twin(attention: Attention, act: ACT) -> None:
    config = tiny_config(
        attention=attention,
        halting=act,
        recurrent_layers=2,
        loop_embedding=LoopEmbedding(num_loops=2),
        prelude_layers=0,
        coda_layers=0,
    )
    model, encoded = tiny_model(config).train(), torch.randn(3, SEQ, DIM)
    weights, context = torch.randn(3, SEQ, DIM), causal(config)
    out = run(model, 5, encoded)
    ((out.state * weights).sum() + 3 * out.ponder_cost).backward()
    packed = gradients(model)
    model.zero_grad()
    state, ponder, loads = naive_act(model.recurrent, encoded, context, 5)
    ((state * weights).sum() + 3 * ponder).backward()
    torch.testing.assert_close(out.state, state, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.ponder_cost, ponder)
    naive = gradients(model)
    assert_gradients_close(packed, naive)
    assert all(grad.any() for name, grad in naive.items() if name.startswith("recurrent."))
    for index, stats in enumerate(out.router):
        assert torch.equal(stats.counts, sum(loads[index::2]).float())


def test_ponder_cost_falls_when_halting_probabilities_rise() -> None:
    model = tiny_model(tiny_config(halting=ACT(bias_init=-2.0))).train()
    for num_loops, sign in ((1, 0), (3, -1), (8, -1)):
        model.zero_grad()
        cost = run(model, num_loops).ponder_cost
        cost.backward()
        assert 1 <= cost.item() <= num_loops + 1
        assert torch.sign(model.recurrent.halting.bias.grad) == sign


def test_training_on_the_ponder_cost_alone_shortens_the_loops() -> None:
    model = tiny_model(tiny_config(halting=ACT(bias_init=-3.0))).train()
    encoded = torch.randn(3, SEQ, DIM)
    before = run(model, 8, encoded).loops_used.float().mean()
    halting = list(model.recurrent.halting.parameters())
    optimizer = torch.optim.Adam(halting, lr=0.3)
    for _ in range(12):
        optimizer.zero_grad()
        run(model, 8, encoded).ponder_cost.backward()
        optimizer.step()
    assert run(model, 8, encoded).loops_used.float().mean() < before - 1


@pytest.mark.parametrize("min_loops", [1, 2, 4])
@torch.no_grad()
def test_min_loops_is_kept_and_reached(min_loops: int) -> None:
    model = tiny_model(tiny_config(halting=ACT(bias_init=20.0, min_loops=min_loops)))
    assert (run(model, 6).loops_used == min_loops).all()
    # Fewer loops than the minimum: the last one still gets all the weight.
    out = run(model, 1)
    torch.testing.assert_close(out.halt_weights[1], torch.ones(3, SEQ))


@pytest.mark.parametrize("bias_init", [-6.0, -2.0, 0.5])
@torch.no_grad()
def test_first_probabilities_come_from_the_bias(bias_init: float) -> None:
    model = OpenMythos(tiny_config(halting=ACT(bias_init=bias_init)), seed=0).eval()
    prob = model.recurrent.halting.halt_prob(torch.randn(2, 3, DIM))
    torch.testing.assert_close(prob, torch.tensor(bias_init).sigmoid().expand(2, 3))
    weight = run(model, 3).halt_weights[1]
    torch.testing.assert_close(weight, prob[:1, :1].expand(3, SEQ))


@torch.no_grad()
def test_more_loops_than_needed_change_nothing() -> None:
    model, encoded = tiny_model(tiny_config(halting=ACT(bias_init=0.0))), torch.randn(3, SEQ, DIM)
    enough, many = run(model, 12, encoded), run(model, 64, encoded)
    assert enough.loops_used.max() < 12
    assert torch.equal(enough.state, many.state)
    assert torch.equal(enough.loops_used, many.loops_used)
    assert torch.equal(enough.ponder_cost, many.ponder_cost)


@torch.no_grad()
def test_weights_sum_to_one_for_positions_stopped_by_an_exit_rule() -> None:
    model = tiny_model(tiny_config(halting=ACT(bias_init=-3.0)))
    rule = StateChangeExit(threshold=0.3)
    out = model(random_tokens(3), num_loops=8, exit_rule=rule, collect_loops=range(1, 9))
    used = out.recurrence.loops_used
    assert used.max() < 8
    total = torch.stack([*out.recurrence.halt_weights.values()]).sum(0)
    torch.testing.assert_close(total, torch.ones(3, SEQ), atol=1e-6, rtol=0)
    assert torch.isfinite(out.logits).all()


def test_halt_state_is_kept_in_fp32() -> None:
    halting = ACTHalting(ACT(), 4)
    torch.nn.init.zeros_(halting.weight)
    torch.nn.init.constant_(halting.bias, -3)
    state = torch.randn(1, 2, 4, dtype=torch.bfloat16)
    halt, active = halting.start(state), torch.ones(1, 2, dtype=torch.bool)
    for loop in range(40):
        halt, active = halting.update(halt, active, state, loop)
    assert halt.cumulative.dtype == torch.float32
    assert halt.output.dtype == torch.bfloat16
    assert isinstance(halt, HaltState) and not active.any()
    torch.testing.assert_close(halt.cumulative, torch.ones(1, 2), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"threshold": 1.0}, "threshold = 1.0: must be a number, above 0 and below 1"),
        ({"threshold": 0.0}, "threshold = 0.0"),
        ({"min_loops": 0}, "min_loops = 0: must be an integer, at least 1"),
        ({"ponder_weight": -0.1}, "ponder_weight = -0.1"),
        ({"bias_init": float("nan")}, "bias_init = nan: must be a number"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(ACT(), **fields)


def test_an_exit_gate_selects_the_first_state_that_reaches_its_threshold() -> None:
    config = tiny_config(halting=ExitGate(threshold=0.8), prelude_layers=0, coda_layers=0)
    model = tiny_model(config)
    with torch.no_grad():
        model.recurrent.halting.weight.normal_()
        encoded = torch.randn(3, SEQ, DIM)
        out = run(model, 6, encoded)
        # The gate changes no state: a model without it goes through the same ones.
        model.recurrent.halting, gate = None, model.recurrent.halting
        plain = run(model, 6, encoded)
    left, chosen = torch.ones(3, SEQ), torch.zeros(3, SEQ, dtype=torch.long)
    for loop, state in out.states.items():
        left = left * (1 - gate.halt_prob(state))
        chosen = torch.where((chosen == 0) & ((left <= 0.2) | (loop == 6)), loop, chosen)
    assert len(chosen.unique()) > 1
    for loop, state in out.states.items():
        assert torch.equal(out.state[chosen == loop], state[chosen == loop])
        torch.testing.assert_close(state, plain.states[loop])
    assert (out.loops_used == 6).all()
