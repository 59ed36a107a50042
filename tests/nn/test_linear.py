"""Linear maps with a low-rank delta, dense feed-forward layers, and the norm."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from variants import members, name_of

from openmythos.nn.block import FeedForward
from openmythos.nn.feed_forward import ReLU2, SwiGLU
from openmythos.nn.layout import AttentionContext
from openmythos.nn.linear import NO_DELTAS, Deltas, Linear, LowRank
from openmythos.nn.norm import RMSNorm
from openmythos.nn.view import LayerView, NoCache

VIEW = LayerView(AttentionContext(torch.arange(1)[None], None, None, None, True), NoCache())


def low_rank(rank: int = 2) -> LowRank:
    return LowRank(torch.randn(rank, 6).requires_grad_(), torch.randn(4, rank).requires_grad_())


@pytest.mark.parametrize("bias", [False, True])
def test_a_delta_is_added_to_the_weight(bias: bool) -> None:
    layer, delta, x = Linear(6, 4, bias=bias), low_rank(), torch.randn(2, 3, 6)
    layer.delta_key = "here"
    merged = layer.weight + delta.up @ delta.down
    expected = x @ merged.T + (layer.bias if bias else 0)
    out = layer(x, {"here": delta, "elsewhere": low_rank()})
    torch.testing.assert_close(out, expected)

    wrt = [delta.down, delta.up, layer.weight]
    direction = torch.randn_like(out)
    grads = torch.autograd.grad(out, wrt, direction), torch.autograd.grad(expected, wrt, direction)
    torch.testing.assert_close(*grads)


def test_deltas_of_other_maps_are_not_applied() -> None:
    layer, x = Linear(6, 4), torch.randn(3, 6)
    plain = torch.nn.functional.linear(x, layer.weight, layer.bias)
    assert layer(x).equal(plain)
    assert layer(x, {"elsewhere": low_rank()}).equal(plain)  # not registered
    layer.delta_key = "here"
    assert layer(x, {"elsewhere": low_rank()}).equal(plain)
    assert layer(x, NO_DELTAS).equal(plain)


def test_a_delta_key_is_no_part_of_a_checkpoint() -> None:
    layer = Linear(6, 4)
    layer.delta_key = "here"
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert Linear(6, 4).delta_key == ""


@torch.no_grad()
def test_the_norm_is_its_formula() -> None:
    norm = RMSNorm(6, eps=1e-3)
    norm.weight.normal_()
    x = torch.randn(2, 3, 6) * torch.tensor([1e-2, 1.0, 1e3]).view(1, 3, 1)
    expected = x / (x.square().mean(dim=-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)


def test_the_norm_of_zero_is_zero_with_a_finite_gradient() -> None:
    x = torch.zeros(2, 6, requires_grad=True)
    out = RMSNorm(6, eps=1e-6)(x)
    out.sum().backward()
    assert not out.any() and x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_norm_keeps_the_dtype_of_its_input(dtype: torch.dtype) -> None:
    """Under autocast the weight is fp32 and the input is not."""
    norm, x = RMSNorm(6, eps=1e-6), torch.randn(2, 6)
    out = norm(x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), norm(x), atol=0.03, rtol=0.03)
    out.float().sum().backward()
    assert norm.weight.grad is not None and norm.weight.grad.dtype == torch.float32


def test_a_norm_in_bf16_is_computed_in_fp32() -> None:
    norm, x = RMSNorm(64, eps=1e-6), torch.randn(5, 64)
    exact = norm(x.bfloat16().float())
    assert norm(x.bfloat16()).equal(exact.bfloat16())


def per_row_deltas(layer: torch.nn.Module, batch: int) -> Deltas:
    """A delta of its own for each row of a batch, for every linear map of the layer."""
    deltas = {}
    for name, part in layer.named_modules():
        if isinstance(part, Linear):
            part.delta_key = name
            down = 0.3 * torch.randn(batch, 2, part.in_features)
            deltas[name] = LowRank(down, 0.3 * torch.randn(batch, part.out_features, 2))
    return deltas


def row_of(deltas: Deltas, row: int) -> Deltas:
    return {key: LowRank(delta.down[row], delta.up[row]) for key, delta in deltas.items()}


@pytest.mark.parametrize("bias", [False, True])
def test_rows_with_deltas_of_their_own_equal_each_row_alone(bias: bool) -> None:
    layer = torch.nn.ModuleDict({"map": Linear(6, 4, bias=bias)})
    deltas, x = per_row_deltas(layer, 3), torch.randn(3, 5, 6)
    part = layer["map"]
    alone = torch.cat([part(x[i : i + 1], row_of(deltas, i)) for i in range(3)])
    torch.testing.assert_close(part(x, deltas), alone)
    torch.testing.assert_close(part(x.flatten(0, 1), deltas), alone.flatten(0, 1))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("config", [SwiGLU(hidden_dim=10), ReLU2(hidden_dim=10)], ids=name_of)
def test_dense_layers_with_deltas_of_each_row_equal_each_row_alone(
    config: SwiGLU | ReLU2, masked: bool
) -> None:
    layer, x = config.build(6), torch.randn(3, 5, 6)
    deltas, active = per_row_deltas(layer, 3), torch.rand(3, 5) < 0.6
    out = layer(x, replace(VIEW, deltas=deltas, active=active if masked else None))[0]
    for i in range(3):
        alone = layer(x[i : i + 1], replace(VIEW, deltas=row_of(deltas, i)))[0]
        wanted = alone * active[i, :, None] if masked else alone
        torch.testing.assert_close(out[i : i + 1], wanted)


@pytest.mark.parametrize("config", members(FeedForward), ids=name_of)
def test_inactive_positions_get_no_update_and_no_gradient(config: Any) -> None:
    layer = config.build(16)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, active = torch.randn(3, 5, 16, requires_grad=True), torch.rand(3, 5) < 0.6
    out, _ = layer(x, replace(VIEW, active=active))
    whole, _ = layer(x, VIEW)
    torch.testing.assert_close(out, whole * active[..., None])
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert not grad[~active].any() and grad[active].any(dim=-1).all()
    out, _ = layer(x, replace(VIEW, active=torch.zeros(3, 5, dtype=torch.bool)))
    assert out.shape == x.shape and not out.any()


def test_swiglu_is_its_formula_with_a_delta_on_the_way_out_too() -> None:
    layer, x = SwiGLU(hidden_dim=10).build(6), torch.randn(2, 5, 6)

    def formula(down: Tensor) -> Tensor:
        gate, up = (x @ layer.gate_up.weight.T).chunk(2, dim=-1)
        return (torch.nn.functional.silu(gate) * up) @ down.T

    torch.testing.assert_close(layer(x, VIEW)[0], formula(layer.down.weight))
    layer.down.delta_key = "down"
    delta = LowRank(torch.randn(2, 10), torch.randn(6, 2))
    changed = layer(x, replace(VIEW, deltas={"down": delta}))[0]
    torch.testing.assert_close(changed, formula(layer.down.weight + delta.up @ delta.down))


def test_swiglu_under_autocast_has_gradients_in_the_weights_dtype() -> None:
    layer, x = SwiGLU(hidden_dim=16).build(8), torch.randn(1, 5, 8, requires_grad=True)
    layer(x, VIEW)[0].square().sum().backward()
    exact = layer.down.weight.grad
    layer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x, VIEW)[0]
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    found = layer.down.weight.grad
    assert exact is not None and found is not None and found.dtype == torch.float32
    torch.testing.assert_close(found, exact, atol=0.05 * float(exact.abs().max()), rtol=0.05)
