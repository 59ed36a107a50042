"""Linear maps with a low-rank delta, and the norm."""

import pytest
import torch

from openmythos.nn.feed_forward import SwiGLULayer
from openmythos.nn.linear import NO_DELTAS, Linear, LowRank
from openmythos.nn.norm import RMSNorm


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
    torch.testing.assert_close(layer.merged_weight({"here": delta}), merged)

    wrt = [*delta, layer.weight]
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
    assert layer.merged_weight(NO_DELTAS) is layer.weight
    assert layer.merged_weight({"elsewhere": low_rank()}) is layer.weight


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


@pytest.mark.parametrize("shape", [(3, 6), (2, 3, 6), (1, 6)])
def test_the_gradient_of_the_norm_is_that_of_its_formula(shape: tuple[int, ...]) -> None:
    norm = RMSNorm(6, eps=1e-3).double()
    norm.weight.data.normal_()
    x = torch.randn(shape, dtype=torch.double, requires_grad=True)

    def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(normed, (x, norm.weight))
    # What is kept is the input: a caller that changes nothing gets the same with and without it.
    with torch.no_grad():
        plain = norm(x)
    assert plain.equal(norm(x))


def test_a_norm_in_bf16_is_computed_in_fp32() -> None:
    norm, x = RMSNorm(64, eps=1e-6), torch.randn(5, 64)
    exact = norm(x.bfloat16().float())
    assert norm(x.bfloat16()).equal(exact.bfloat16())


def test_swiglu_and_its_gradients_are_those_of_its_formula() -> None:
    layer = SwiGLULayer(6, 10).double()
    x = torch.randn(5, 6, dtype=torch.double, requires_grad=True)
    names = ["gate_up.weight", "down.weight"]

    def run(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        given = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(layer, given, (x, None))[0]

    weights = [layer.gate_up.weight, layer.down.weight]
    gate, up = (x @ layer.gate_up.weight.T).chunk(2, dim=-1)
    expected = (torch.nn.functional.silu(gate) * up) @ layer.down.weight.T
    torch.testing.assert_close(run(x, *weights), expected)
    with torch.no_grad():
        torch.testing.assert_close(run(x, *weights), expected)
    assert torch.autograd.gradcheck(run, (x, *weights))
    # With a delta on the way out, which goes by other operators.
    layer.down.delta_key = "down"
    delta = LowRank(torch.randn(2, 10, dtype=torch.double), torch.randn(6, 2, dtype=torch.double))
    changed = layer(x, None, {"down": delta})[0]
    merged = layer.down.weight + delta.up @ delta.down
    torch.testing.assert_close(changed, (torch.nn.functional.silu(gate) * up) @ merged.T)


def test_swiglu_under_autocast_has_gradients_in_the_weights_dtype() -> None:
    layer, x = SwiGLULayer(8, 16), torch.randn(5, 8, requires_grad=True)
    layer(x, None)[0].square().sum().backward()
    exact = layer.down.weight.grad
    layer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x, None)[0]
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    found = layer.down.weight.grad
    assert exact is not None and found is not None and found.dtype == torch.float32
    torch.testing.assert_close(found, exact, atol=0.05 * float(exact.abs().max()), rtol=0.05)
