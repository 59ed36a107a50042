"""Mixture of experts against a loop over tokens and experts; routing statistics, balance."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from variants import here

from openmythos.config import ConfigError
from openmythos.nn import moe
from openmythos.nn.dispatch import Dispatched
from openmythos.nn.layout import AttentionContext
from openmythos.nn.linear import LowRank
from openmythos.nn.moe import MoE, MoELayer, RouterStats
from openmythos.nn.view import LayerView, NoCache

pytestmark = pytest.mark.usefixtures("device")
DIM, TOKENS = 16, 24
SMALL = {"num_experts": 6, "top_k": 2, "expert_dim": 8}


@torch.no_grad()
def build(**fields: Any) -> MoELayer:
    """A layer with random weights and biases, in training mode."""
    layer = MoE(**SMALL | fields).build(DIM).to(here())
    for parameter in layer.parameters():
        parameter.normal_(std=parameter.shape[-1] ** -0.5)
    layer.router.router_bias.normal_(std=0.1)
    return layer


CONTEXT = AttentionContext(torch.arange(1)[None], None, None, None, True)
LENGTHS = (10, 6, 8)


def run(
    layer: MoELayer, tokens: Tensor, lengths: tuple[int, ...] = (), **view: Any
) -> tuple[Tensor, Any]:
    """(output [tokens, dim], statistics) of sequences of these lengths, padded to one batch."""
    x = pad_sequence(tokens.split(lengths or (len(tokens),)), batch_first=True)
    # The backward pass may run this again, in a thread without a default device.
    ends = torch.tensor(lengths or (len(tokens),), device=x.device)
    active = torch.arange(x.shape[1], device=x.device) < ends[:, None]
    given = {"active": active if lengths else None, "collects": True} | view
    out, stats = layer(x, LayerView(CONTEXT, NoCache(), **given))
    assert not out[~active].any()
    return out[active], stats


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (gate_up @ x).chunk(2)
    return down @ (F.silu(gate) * up)


def naive(layer: MoELayer, tokens: Tensor) -> Tensor:
    """Every token by itself, every chosen expert by itself."""
    c, out = layer.config, []
    for x in tokens:
        logits = layer.router.weight @ x
        scores = logits.sigmoid() if c.score == "sigmoid" else logits.softmax(dim=0)
        biased = (scores + layer.router.router_bias).tolist()
        chosen = sorted(range(c.num_experts), key=lambda i: -biased[i])[: c.top_k]
        total = sum(scores[i] for i in chosen) if c.normalize_top_k else 1.0
        y = torch.zeros_like(x)
        for i in chosen:
            weight = c.route_scale * scores[i] / total
            y = y + weight * swiglu(x, layer.experts.gate_up[i], layer.experts.down[i])
        if layer.shared_expert is not None:
            shared = layer.shared_expert
            y = y + swiglu(x, shared.gate_up.weight, shared.down.weight)
        out.append(y)
    return torch.stack(out)


def assert_equals_naive(layer: MoELayer, tokens: Tensor) -> None:
    """Forward and every gradient."""
    wrt = [tokens, *layer.parameters()]
    out, _ = run(layer, tokens)
    expected = naive(layer, tokens)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    direction = torch.randn_like(out)
    # An expert that nobody chose has no place in the naive graph, hence no gradient at all.
    wanted = torch.autograd.grad(
        expected, wrt, direction, allow_unused=True, materialize_grads=True
    )
    got = torch.autograd.grad(out, wrt, direction)
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)


class Shuffling:
    """As an exchange with other ranks does, hands over rows in another order than they came in."""

    def dispatch(self, rows: Tensor, counts: Tensor) -> Dispatched:
        expert = torch.arange(len(counts)).repeat_interleave(counts)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        return Dispatched(rows[order], expert[order], (order.tolist(), []))

    def combine(self, results: Tensor, dispatched: Dispatched) -> Tensor:
        return results[torch.tensor(dispatched.sizes[0], dtype=torch.long).argsort()]


@pytest.mark.parametrize("tokens", [0, 1, 24])
def test_dispatched_rows_equal_naive(tokens: int) -> None:
    layer = build()
    layer.dispatcher = Shuffling()
    x = torch.randn(tokens, DIM, requires_grad=True)
    if tokens:
        assert_equals_naive(layer, x)
        return
    out, stats = run(layer, x, (0,))
    assert out.shape == (0, DIM) and out.requires_grad and stats is not None
    assert int(stats.counts.sum()) == 0


@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_equals_a_loop_over_tokens_and_experts(score: Any, normalize: bool, shared: int) -> None:
    layer = build(
        score=score, normalize_top_k=normalize, num_shared_experts=shared, route_scale=2.5
    )
    assert_equals_naive(layer, torch.randn(TOKENS, DIM, requires_grad=True))


def test_shared_experts_are_one_network_as_wide_as_all_of_them() -> None:
    assert build(num_shared_experts=0).shared_expert is None
    for count in (1, 3):
        shared = build(num_shared_experts=count, expert_dim=8).shared_expert
        assert shared is not None
        assert shared.gate_up.weight.shape == (2 * 8 * count, DIM)


@pytest.mark.parametrize("top_k", [1, 3, 6])
def test_equals_a_loop_for_any_number_of_chosen(top_k: int) -> None:
    layer = build(top_k=top_k, normalize_top_k=top_k > 1)
    assert_equals_naive(layer, torch.randn(TOKENS, DIM, requires_grad=True))


@pytest.mark.parametrize("favourites", [(0, 1), (5, 2), (3, 4)])
def test_experts_that_nobody_chooses(favourites: tuple[int, int]) -> None:
    """The first, the last and the middle groups of the grouped product are empty."""
    layer = build()
    layer.router.router_bias[list(favourites)] += 10
    tokens = torch.randn(TOKENS, DIM, requires_grad=True)
    assert_equals_naive(layer, tokens)
    out, stats = run(layer, tokens, LENGTHS)
    expected = [TOKENS if i in favourites else 0 for i in range(6)]
    assert stats.counts.tolist() == expected
    out.sum().backward()
    used = layer.experts.down.grad.flatten(1).any(dim=1) & layer.experts.gate_up.grad.flatten(
        1
    ).any(dim=1)
    assert used.tolist() == [bool(count) for count in expected]


@pytest.mark.parametrize("shared", [0, 1])
def test_no_tokens_at_all(shared: int) -> None:
    """Every position of a batch may have halted."""
    layer = build(num_shared_experts=shared)
    tokens = torch.randn(0, DIM, requires_grad=True)
    out, stats = run(layer, tokens, (0, 0))
    assert out.shape == (0, DIM)
    assert not any(field.any() for field in stats)
    (out.sum() + stats.balance + stats.z).backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None and not parameter.grad.any()
    joined = stats.plus(run(layer, torch.randn(TOKENS, DIM), LENGTHS)[1])
    assert joined.counts.sum() == 2 * TOKENS and joined.balance.isfinite()


def test_one_token() -> None:
    assert_equals_naive(build(), torch.randn(1, DIM, requires_grad=True))


@pytest.mark.parametrize("shared", [0, 1])
def test_autocast_is_close_to_fp32(shared: int) -> None:
    layer = build(num_shared_experts=shared)
    tokens = torch.randn(TOKENS, DIM, requires_grad=True)
    exact, exact_stats = run(layer, tokens, LENGTHS)
    with torch.autocast(here().type, dtype=torch.bfloat16):
        out, stats = run(layer, tokens, LENGTHS)
        assert layer.shared_weights().down.dtype == torch.bfloat16  # custom operators do not cast
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, atol=0.05, rtol=0.05)
    # The router runs in fp32 anyhow, so nothing of it may change.
    torch.testing.assert_close(tuple(stats), tuple(exact_stats), rtol=0, atol=0)
    direction = torch.randn_like(exact)
    wrt = [tokens, *layer.parameters()]
    got = torch.autograd.grad((out.float() * direction).sum(), wrt)
    wanted = torch.autograd.grad((exact * direction).sum(), wrt)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.03 * b.norm()


def test_a_bf16_layer_routes_in_fp32() -> None:
    layer = build().to(torch.bfloat16).eval()
    tokens = torch.randn(TOKENS, DIM, dtype=torch.bfloat16)
    weights, _, scores, logits = layer.router(tokens)
    assert {t.dtype for t in (weights, scores, logits)} == {torch.float32}
    out, stats = run(layer, tokens, LENGTHS, collects=False)
    assert out.dtype == torch.bfloat16 and stats is None
    expected = run(layer.float(), tokens.float(), LENGTHS)[0]
    torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0.05)


# Statistics


def test_counts_are_exact() -> None:
    layer = build(top_k=3)
    tokens = torch.randn(TOKENS, DIM)
    _, experts, _, _ = layer.router(tokens)
    _, stats = run(layer, tokens, LENGTHS)
    assert stats.counts.tolist() == torch.bincount(experts.flatten(), minlength=6).tolist()
    assert stats.counts.sum() == TOKENS * 3
    assert stats.tokens == TOKENS and stats.sequences == 3
    assert all(len(set(chosen)) == 3 for chosen in experts.tolist())


def test_statistics_come_where_they_are_asked_for_and_change_no_state() -> None:
    layer = build()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    tokens = torch.randn(TOKENS, DIM)
    with_them, stats = run(layer, tokens, LENGTHS)
    assert stats is not None
    without, none = run(layer, tokens, LENGTHS, collects=False)
    assert none is None and without.equal(with_them)
    assert all(tensor.equal(before[name]) for name, tensor in layer.state_dict().items())


def test_plus_adds_every_field() -> None:
    layer = build()
    tokens = torch.randn(TOKENS, DIM)
    _, whole = run(layer, tokens, LENGTHS)
    _, first = run(layer, tokens[:16], (10, 6))
    _, second = run(layer, tokens[16:], (8,))
    torch.testing.assert_close(tuple(first.plus(second)), tuple(whole))
    assert first.plus(None) is first


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_balance_and_z_are_their_formulas(score: Any, top_k: int) -> None:
    """Sequence by sequence (DeepSeek-V3, equations 17 to 20); an empty sequence adds nothing."""
    layer = build(score=score, top_k=top_k)
    lengths = (7, 0, 1, 16)
    tokens = torch.randn(sum(lengths), DIM, requires_grad=True)
    _, stats = run(layer, tokens, lengths)
    balance, z = torch.zeros(()), torch.zeros(())
    for sequence in tokens.split(lengths):
        if not len(sequence):
            continue
        logits = sequence @ layer.router.weight.T
        scores = logits.sigmoid() if score == "sigmoid" else logits.softmax(dim=1)
        chosen = (scores + layer.router.router_bias).topk(top_k).indices
        for i in range(6):
            fraction = 6 / (top_k * len(sequence)) * (chosen == i).sum()
            balance = balance + fraction * (scores[:, i] / scores.sum(dim=1)).mean()
        z = z + (logits.exp().sum(dim=1).log() ** 2).sum()
    torch.testing.assert_close(stats.balance, balance)
    torch.testing.assert_close(stats.z, z)
    assert stats.sequences == 3
    wrt = [tokens, layer.router.weight]
    for ours, theirs in ((stats.balance, balance), (stats.z, z)):
        got = torch.autograd.grad(ours, wrt, retain_graph=True)
        assert all(grad.any() for grad in got)
        torch.testing.assert_close(got, torch.autograd.grad(theirs, wrt, retain_graph=True))


def routed_to(logits: Tensor, **fields: Any) -> RouterStats:
    """Statistics of a layer whose router logits are given, one token per row of `logits`."""
    layer = build(num_experts=DIM, **fields)
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(DIM))
        layer.router.router_bias.zero_()
    stats = run(layer, logits)[1]
    assert stats is not None
    return stats


@pytest.mark.parametrize("top_k", [1, 4])
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_balance_is_one_when_perfect_and_largest_at_collapse(score: Any, top_k: int) -> None:
    block = torch.full((DIM // top_k, DIM), -30.0)
    for token in range(DIM // top_k):
        block[token, token * top_k : (token + 1) * top_k] = 3.0
    perfect = routed_to(block, score=score, top_k=top_k)
    torch.testing.assert_close(perfect.balance, torch.tensor(1.0))
    assert perfect.max_violation() == 0
    collapsed = routed_to(block[:1].expand(DIM, DIM), score=score, top_k=top_k)
    torch.testing.assert_close(collapsed.balance, torch.tensor(DIM / top_k))
    assert collapsed.max_violation() == DIM / top_k - 1
    for _ in range(5):
        between = routed_to(3 * torch.randn(DIM, DIM), score=score, top_k=top_k).balance
        assert 0.9 < between < DIM / top_k


def test_the_balance_loss_evens_out_the_load() -> None:
    """Its gradient alone, without any bias."""
    layer = build(num_experts=8, top_k=2)
    with torch.no_grad():
        layer.router.router_bias.zero_()
    tokens = torch.randn(256, DIM) + 1.0
    optimizer = torch.optim.SGD([layer.router.weight], lr=1.0)

    def step() -> tuple[float, float]:
        stats = run(layer, tokens)[1]
        optimizer.zero_grad()
        stats.balance.backward()
        optimizer.step()
        return stats.balance.item(), stats.max_violation().item()

    history = [step() for _ in range(60)]
    assert history[-1][0] < history[0][0] and history[-1][1] < history[0][1] / 2


# Router bias


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_router_bias_decides_who_is_chosen_not_the_weight(score: Any, normalize: bool) -> None:
    layer = build(score=score, normalize_top_k=normalize, route_scale=3.0)
    tokens = torch.randn(TOKENS, DIM)
    layer.router.router_bias.zero_()
    _, before, scores, _ = layer.router(tokens)
    layer.router.router_bias[4] = 10.0
    layer.router.router_bias[1] = -10.0
    weights, experts, same, _ = layer.router(tokens)
    assert same.equal(scores)
    assert (before == 1).any() and not (experts == 1).any()
    assert (experts == 4).sum() == TOKENS > (before == 4).sum()
    chosen = scores.gather(1, experts)
    if normalize:
        chosen = chosen / chosen.sum(dim=1, keepdim=True)
        torch.testing.assert_close(weights.sum(dim=1), torch.full((TOKENS,), 3.0))
    torch.testing.assert_close(weights, 3.0 * chosen)


def test_a_bias_that_changes_no_choice_changes_nothing() -> None:
    layer = build()
    tokens = torch.randn(TOKENS, DIM)
    before = run(layer, tokens, LENGTHS)[0]
    layer.router.router_bias += 5.0
    torch.testing.assert_close(run(layer, tokens, LENGTHS)[0], before)


def test_router_bias_is_a_buffer_without_gradient() -> None:
    layer = build()
    assert "router.router_bias" in layer.state_dict()
    assert not any("router_bias" in name for name, _ in layer.named_parameters())
    assert not layer.router.router_bias.requires_grad


def test_update_moves_every_bias_by_the_rate_towards_balance() -> None:
    layer = build(num_experts=4, bias_rate=0.25)
    layer.router.router_bias.zero_()
    layer.update_router_bias(torch.tensor([8.0, 0.0, 4.0, 4.0]))
    assert layer.router.router_bias.tolist() == [-0.25, 0.25, 0.0, 0.0]
    layer.update_router_bias(torch.tensor([5, 5, 5, 5]).float())
    assert layer.router.router_bias.tolist() == [-0.25, 0.25, 0.0, 0.0]


def test_update_balances_every_loop_by_itself() -> None:
    layer = build(num_experts=4, bias_rate=0.25, bias_loops=3)
    layer.router.router_bias.zero_()
    layer.update_router_bias(torch.tensor([[8.0, 0, 4, 4], [1, 2, 2, 3], [0, 0, 0, 0]]))
    wanted = [[-0.25, 0.25, 0.0, 0.0], [0.25, 0.0, 0.0, -0.25], [0.0] * 4]
    assert layer.router.router_bias.tolist() == wanted


@pytest.mark.parametrize(("decays", "moved"), [(False, 0.25), (True, 0.125)])
def test_the_step_of_the_bias_follows_the_learning_rate_if_asked(
    decays: bool, moved: float
) -> None:
    layer = build(num_experts=4, bias_rate=0.25, bias_decays=decays)
    layer.router.router_bias.zero_()
    layer.update_router_bias(torch.tensor([8.0, 0.0, 4.0, 4.0]), scale=0.5)
    assert layer.router.router_bias.tolist() == [-moved, moved, 0.0, 0.0]


def test_a_rate_of_zero_switches_the_bias_off() -> None:
    layer = build(bias_rate=0.0)
    before = layer.router.router_bias.clone()
    layer.update_router_bias(torch.tensor([9.0, 0, 0, 0, 0, 0]))
    assert layer.router.router_bias.equal(before)


@torch.no_grad()
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_updates_even_out_a_skewed_load(score: Any) -> None:
    """Tokens with a common direction flood some experts; the biases alone undo it."""
    layer = build(num_experts=8, score=score, bias_rate=0.005, num_shared_experts=0)
    layer.router.router_bias.zero_()
    common = 1.5 * torch.randn(DIM)

    def violation() -> float:
        stats = run(layer, torch.randn(512, DIM) + common)[1]
        layer.update_router_bias(stats.counts)
        return stats.max_violation().item()

    history = [violation() for _ in range(150)]
    assert history[0] > 1.0
    assert sum(history[-20:]) / 20 < history[0] / 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_once(reentrant: bool) -> None:
    layer = build()
    tokens = torch.randn(TOKENS, DIM, requires_grad=True)
    out, stats = run(layer, tokens, LENGTHS)
    (out.square().sum() + stats.balance).backward()
    expected = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    again, same = checkpoint(run, layer, tokens, LENGTHS, use_reentrant=reentrant)
    (again.square().sum() + (0 if reentrant else same.balance)).backward()
    assert again.equal(out)
    assert all(a.equal(b) for a, b in zip(same, stats, strict=True))
    if not reentrant:  # which returns only top-level tensors with gradient
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 7, "num_experts": 6}, "top_k = 7: must be at most num_experts = 6"),
        ({"top_k": 0}, "top_k = 0"),
        ({"num_experts": 0}, "num_experts = 0"),
        ({"expert_dim": 0}, "expert_dim = 0"),
        ({"num_shared_experts": -1}, "num_shared_experts = -1"),
        ({"route_scale": 0.0}, "route_scale = 0.0"),
        ({"bias_rate": -1e-3}, "bias_rate = -0.001"),
        ({"balance_weight": math.nan}, "balance_weight = nan"),
        ({"z_weight": -1.0}, "z_weight = -1.0"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoE(**fields)


def test_positions_that_are_not_active_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the router nor an expert sees them, and their gradient is exactly zero."""
    layer, x = build(), torch.randn(3, 8, DIM, requires_grad=True)
    active = torch.rand(3, 8) < 0.5
    seen: list[int] = []
    for part in (layer.router, layer.shared_expert.down):
        part.register_forward_pre_hook(lambda _, args: seen.append(args[0][..., 0].numel()))
    experts = moe.routed_experts
    monkeypatch.setattr(moe, "routed_experts", lambda *a: (seen.append(len(a[0])), experts(*a))[1])
    layer.shared_expert.down.delta_key = "down"  # a map that is called as a module only with one
    deltas = {"down": LowRank(torch.zeros(1, 8), torch.zeros(DIM, 1))}
    out, stats = layer(
        x, LayerView(CONTEXT, NoCache(), deltas=deltas, active=active, collects=True)
    )
    assert seen == [int(active.sum())] * 3 and stats.tokens == active.sum()
    assert not out[~active].any()
    whole, _ = layer(x, LayerView(CONTEXT, NoCache(), deltas=deltas))
    torch.testing.assert_close(out[active], whole[active])
    (grad,) = torch.autograd.grad(out.square().sum() + stats.balance + stats.z, x)
    assert not grad[~active].any() and grad[active].any(dim=-1).all()


def test_a_loop_may_have_a_router_of_its_own() -> None:
    layer, tokens = build(), torch.randn(TOKENS, DIM)
    experts = layer.config.num_experts
    layer.router.delta_key = "router"
    own = LowRank(torch.randn(experts, DIM), torch.eye(experts))
    _, _, scores, logits = layer.router(tokens, {"router": own})
    torch.testing.assert_close(logits, tokens @ (layer.router.weight + own.down).T)
    assert not scores.allclose(layer.router(tokens)[2])


@pytest.mark.parametrize("masked", [False, True])
def test_rows_of_a_batch_may_have_routers_of_their_own(masked: bool) -> None:
    """Batched deltas, as of rows in different loops, equal each row alone."""
    layer, x = build(), torch.randn(3, 5, DIM)
    maps = {"router": layer.router, "up": layer.shared_expert.gate_up}
    deltas = {}
    for key, part in maps.items():
        part.delta_key = key
        down, up = torch.randn(3, 2, part.in_features), torch.randn(3, part.out_features, 2)
        deltas[key] = LowRank(down, up)
    active = torch.rand(3, 5) < 0.6 if masked else None
    out, stats = layer(
        x, LayerView(CONTEXT, NoCache(), deltas=deltas, active=active, collects=True)
    )
    joined = None
    for row in range(3):
        own = {key: LowRank(delta.down[row], delta.up[row]) for key, delta in deltas.items()}
        seen = None if active is None else active[row : row + 1]
        view = LayerView(CONTEXT, NoCache(), deltas=own, active=seen, collects=True)
        alone, part = layer(x[row : row + 1], view)
        torch.testing.assert_close(out[row : row + 1], alone, atol=1e-5, rtol=1e-5)
        joined = part.plus(joined)
    torch.testing.assert_close(tuple(stats), tuple(joined))
