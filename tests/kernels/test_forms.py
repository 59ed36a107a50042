"""The two forms of every formula agree, and the reference form has what the fast one has not."""

import runpy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap
from variants import (
    FEW_VARIANT_IDS,
    FEW_VARIANTS,
    assert_gradients_close,
    gradients,
    random_tokens,
    tiny_config,
    tiny_model,
)

from openmythos import kernels
from openmythos.config import ConfigError
from openmythos.model.config import MythosConfig
from openmythos.model.mythos import OpenMythos
from openmythos.nn.layout import AttentionContext, TokenLayout, attention_context
from openmythos.nn.moe import MoE
from openmythos.recurrence.halting import ACT
from openmythos.recurrence.loop import RecurrentBlock

CPU = torch.device("cpu")
TOKENS, TARGETS = random_tokens(2, 6), random_tokens(2, 6, seed=1)
# A weight whose gradient has met every formula: norm, attention, experts, halting, the loss.
NAME = "model.prelude.0.attention_norm.weight"


class Loss(nn.Module):
    """Cross-entropy as the forward pass of a module, for `functional_call`."""

    def __init__(self, model: OpenMythos) -> None:
        super().__init__()
        self.model = model

    def forward(self) -> Tensor:
        return self.model.losses(TOKENS, TARGETS, num_loops=3).cross_entropy


def loss_of(**parts: Any) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """(loss as a function of one weight, the weight, a direction), in fp64: MLA, MoE and ACT."""
    moe = MoE(num_experts=4, top_k=2, expert_dim=16)
    config = tiny_config(recurrent_feed_forward=moe, halting=ACT(bias_init=-1.0), **parts)
    loss = Loss(tiny_model(config).double())
    weight = loss.get_parameter(NAME).detach().clone()

    def value(w: Tensor) -> Tensor:
        return functional_call(loss, {NAME: w}, ())

    return value, weight, torch.randn_like(weight)


def test_second_derivatives_are_those_of_finite_differences() -> None:
    value, weight, direction = loss_of()
    with kernels.use("reference"):
        _, found = torch.autograd.functional.hvp(value, weight, direction)
        step = 1e-5 * direction
        ahead, behind = (grad(value)(weight + sign * step) for sign in (1, -1))
    wanted = (ahead - behind) / 2e-5
    assert wanted.abs().max() > 1e-4
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)


def test_fast_forms_refuse_second_derivatives() -> None:
    value, weight, direction = loss_of()
    with pytest.raises(RuntimeError, match=r'no second derivatives; .*kernels\.use\("reference"\)'):
        torch.autograd.functional.hvp(value, weight, direction)


def test_forward_mode_equals_finite_differences() -> None:
    value, weight, direction = loss_of()
    with kernels.use("reference"):
        _, found = jvp(value, (weight,), (direction,))
        ahead, behind = (value(weight + sign * 1e-6 * direction) for sign in (1, -1))
    torch.testing.assert_close(found, (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-9)


def loop_map(block: RecurrentBlock, config: MythosConfig, seq: int) -> Callable[[Tensor], Tensor]:
    """h -> h' of one sequence [seq, dim] at a fixed input."""
    layout = TokenLayout(seq, 0, CPU)
    context: AttentionContext = attention_context(layout, config.attention, config.dim)
    encoded = torch.randn(1, seq, config.dim, dtype=torch.float64)
    first, inputs = block.start(encoded, context)

    def step(state: Tensor) -> Tensor:
        return block.step(first._replace(hidden=state[None]), inputs, 0)[0].hidden[0]

    return step


def test_jacobians_of_the_loop() -> None:
    config, seq = tiny_config(recurrent_feed_forward=MoE(num_experts=4, expert_dim=16)), 3
    states = torch.randn(2, seq, config.dim, dtype=torch.float64)
    with kernels.use("reference"):
        step = loop_map(tiny_model(config).double().recurrent, config, seq)
        found = vmap(jacrev(step))(states)
    wanted = torch.stack([torch.autograd.functional.jacobian(step, state) for state in states])
    torch.testing.assert_close(found, wanted)
    with torch.no_grad():
        change = torch.randn_like(states[0])
        moved = (step(states[0] + 1e-6 * change) - step(states[0] - 1e-6 * change)) / 2e-6
    torch.testing.assert_close(torch.tensordot(found[0], change, 2), moved, rtol=1e-5, atol=1e-8)


def test_gradcheck_in_fp64() -> None:
    moe = MoE(num_experts=4, top_k=2, expert_dim=8)
    loss = Loss(tiny_model(tiny_config(recurrent_feed_forward=moe)).double())
    weights = {name: p.detach().clone().requires_grad_() for name, p in loss.named_parameters()}

    def value(*given: Tensor) -> Tensor:
        return functional_call(loss, dict(zip(weights, given, strict=True)), ())

    for forms in ("auto", "reference"):
        with kernels.use(forms):
            assert torch.autograd.gradcheck(value, tuple(weights.values()), fast_mode=True)


def results(model: OpenMythos, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits of a prompt and of a decoded token, loss, gradients."""
    with torch.no_grad():
        model.eval()
        cache = model.new_cache(2, 7, num_loops=3)
        logits = [model(TOKENS, num_loops=3, cache=cache).logits]
        cache.advance(6)
        logits.append(model(TOKENS[:, :1], num_loops=3, cache=cache).logits)
    model.train().zero_grad()
    torch.manual_seed(0)
    out = model.losses(TOKENS, TARGETS, num_loops=torch.tensor([3, 1]))
    loss = out.cross_entropy + sum(stats.balance + stats.z for stats in out.router.values())
    loss.backward()
    assert loss.dtype == dtype and all(x.dtype == dtype for x in logits)
    return torch.cat(logits, dim=1), loss.detach(), gradients(model)


@pytest.mark.parametrize("config", FEW_VARIANTS, ids=FEW_VARIANT_IDS)
def test_both_forms_agree(config: MythosConfig) -> None:
    model = tiny_model(config)
    fast = results(model, torch.float32)
    with kernels.use("reference"):
        plain = results(model, torch.float32)
    for found, wanted in zip(fast[:2], plain[:2], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)
    assert_gradients_close(fast[2], plain[2])


@pytest.mark.parametrize("config", FEW_VARIANTS[:6], ids=FEW_VARIANT_IDS[:6])
def test_both_forms_agree_in_fp64(config: MythosConfig) -> None:
    model = tiny_model(config).double()
    fast = results(model, torch.float64)
    with kernels.use("reference"):
        plain = results(model, torch.float64)
    for found, wanted in zip(fast[:2], plain[:2], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_model_runs_in_every_dtype(dtype: torch.dtype) -> None:
    moe = MoE(num_experts=4, top_k=2, expert_dim=16)
    model = tiny_model(tiny_config(recurrent_feed_forward=moe))
    with torch.no_grad():
        wanted = model(TOKENS, num_loops=3).logits
        found = model.to(dtype)(TOKENS, num_loops=3).logits
    assert found.dtype == dtype
    close = 1e-4 if dtype == torch.float64 else 0.2
    torch.testing.assert_close(found.float(), wanted, rtol=close, atol=close)


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    def fast() -> bool:
        return kernels.fast(CPU) is not None

    assert fast()
    with kernels.use("reference"):
        assert not fast()
        with kernels.use("auto"):
            assert fast()
        assert not fast()
    # Of the run-time type checker, where it is on, an error of its own.
    with pytest.raises(Exception, match=r"forms.*'slow'"), kernels.use("slow"):
        pass
    assert fast()
    monkeypatch.setenv("OPENMYTHOS_KERNELS", "reference")
    assert runpy.run_path(kernels.__file__)["fast"](CPU) is None
    monkeypatch.setenv("OPENMYTHOS_KERNELS", "fast")
    with pytest.raises(ConfigError, match="OPENMYTHOS_KERNELS = 'fast': unknown choice"):
        runpy.run_path(kernels.__file__)


def test_constants_are_those_of_the_device() -> None:
    assert kernels.fast(CPU) is kernels.CPU
    for other in ("cuda", "mps", "meta"):
        assert kernels.fast(torch.device(other)) is kernels.ACCELERATOR


@torch.no_grad()
def test_a_forward_pass_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = OpenMythos(tiny_config(recurrent_feed_forward=MoE(num_experts=4, expert_dim=16)))
        assert model(TOKENS.to("meta"), num_loops=3).logits.shape == (2, 6, 50)
