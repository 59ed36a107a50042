"""Stability of the LTI injection for any parameters, its closed forms, and the baselines."""

import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from variants import SEQ, members, name_of, random_tokens, tiny_config, tiny_model, variations

from openmythos.analysis.stability import spectral_radius
from openmythos.config import ConfigError
from openmythos.model.mythos import OpenMythos
from openmythos.recurrence.initial_state import NormalState, StateInit, ZeroState
from openmythos.recurrence.injection import LARGEST_MAX_DECAY, LTI, Drive, LTIInjection
from openmythos.recurrence.injections import Add, Concat, Diagonal, Injection, NoInjection

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LTIS = variations(LTI)


def layer(config: LTI, log_rate: Any, raw_step_size: Any, dtype: torch.dtype) -> LTIInjection:
    built = config.build(len(log_rate))
    with torch.no_grad():
        built.log_rate.copy_(torch.as_tensor(log_rate))
        built.raw_step_size.copy_(torch.as_tensor(raw_step_size))
        built.input_map.copy_(torch.randn_like(built.input_map))
    return built.to(dtype)


def numbers(dtype: torch.dtype) -> st.SearchStrategy[float]:
    """Every finite number of the dtype, and often one of a usual size."""
    info = torch.finfo(dtype)
    return st.one_of(
        st.floats(-12, 12, width=32),
        st.floats(-1e4, 1e4, width=32),
        st.floats(info.min, info.max, width=16 if dtype == torch.float16 else 32),
        st.sampled_from([info.max, info.min, info.tiny, 0.0]),
    )


@pytest.mark.parametrize("max_decay", [0.5, LARGEST_MAX_DECAY, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(st.data())
def test_decay_is_below_one_for_any_parameters(
    dtype: torch.dtype, max_decay: float, data: st.DataObject
) -> None:
    parameters = st.lists(st.tuples(numbers(dtype), numbers(dtype)), min_size=8, max_size=8)
    log_rate, raw = zip(*data.draw(parameters), strict=True)
    config = LTI(max_decay=max_decay, init_decay=max_decay / 2)
    injection = layer(config, log_rate, raw, dtype)
    drive = injection.prepare(torch.zeros(1, 1, 8, dtype=dtype))
    assert drive.decay.dtype == dtype
    assert ((drive.decay >= 0) & (drive.decay < 1)).all()
    # At most max_decay, up to the dtype's rounding.
    assert (drive.decay.float() <= max_decay * (1 + torch.finfo(dtype).eps)).all()
    drive.decay.float().sum().backward()
    for parameter in (injection.log_rate, injection.raw_step_size):
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all()


@pytest.mark.parametrize("config", LTIS, ids=name_of)
@given(st.lists(st.tuples(*[st.floats(-1e4, 1e4, width=32)] * 2), min_size=8, max_size=8))
@example([(1e4, 1e4), (-1e4, 1e4), (1e4, -1e4), (-1e4, -1e4), (5, 0), (0, -15), (0, 15), (0, 0)])
def test_forced_input_and_every_gradient_are_finite(
    config: LTI, parameters: list[tuple[float, float]]
) -> None:
    injection = layer(config, *zip(*parameters, strict=True), torch.float32)
    state, encoded = torch.randn(2, 1, 3, 8, requires_grad=True)
    u = injection(state, injection.prepare(encoded))
    assert torch.isfinite(u).all()
    u.sum().backward()
    for name, parameter in injection.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def moderate(config: LTI, dtype: torch.dtype = torch.float32) -> LTIInjection:
    return layer(config, torch.linspace(-3, 1.5, 32), torch.linspace(1, -4, 32), dtype)


def rates(injection: LTIInjection) -> tuple[Tensor, Tensor]:
    """(rate, step size) of the continuous system, in double precision."""
    step = torch.nn.functional.softplus(injection.raw_step_size.double())
    rate = injection.log_rate.double().exp() - math.log(injection.config.max_decay) / step
    return rate, step


def test_zero_order_hold_keeps_the_steady_state_of_the_continuous_system() -> None:
    """dh/dt = -rate h + B e rests at B e / rate; so must u = decay u + gain B e."""
    for input_map in ("diagonal", "dense"):
        injection = moderate(LTI(input_map=input_map))
        encoded = torch.randn(2, 3, 32)
        drive = injection.prepare(encoded)
        u = torch.zeros_like(encoded)
        for _ in range(2000):
            u = injection(u, drive)
        weight = injection.input_map
        forced = encoded * weight if input_map == "diagonal" else encoded @ weight.T
        rate, _ = rates(injection)
        torch.testing.assert_close(u, (forced / rate).float(), rtol=1e-3, atol=1e-4)


def test_discretization_formulas() -> None:
    for config in LTIS:
        injection = moderate(config)
        rate, step = rates(injection)
        decay, gain = injection.discretize()
        torch.testing.assert_close(decay.double(), (-rate * step).exp(), rtol=1e-5, atol=1e-7)
        euler = config.discretization == "euler"
        wanted = step if euler else (1 - (-rate * step).exp()) / rate
        torch.testing.assert_close(gain.double(), wanted, rtol=1e-5, atol=1e-7)


def test_the_decay_of_zero_order_hold_and_euler_agree_for_small_steps() -> None:
    small = [torch.full((4,), value) for value in (0.0, -9.0)]
    config = LTI(max_decay=LARGEST_MAX_DECAY)
    (decay, gain), (decay_euler, gain_euler) = (
        layer(c, *small, torch.float32).discretize()
        for c in (config, replace(config, discretization="euler"))
    )
    assert torch.equal(decay, decay_euler)
    torch.testing.assert_close(gain, gain_euler, rtol=0.01, atol=0)


@pytest.mark.parametrize("config", LTIS, ids=name_of)
@pytest.mark.parametrize("init_decay", [1e-6, 0.1, math.sqrt(0.2), 0.9, 0.9899])
def test_initial_decay_is_the_configured_one(config: LTI, init_decay: float) -> None:
    injection = replace(config, init_decay=init_decay)
    model = OpenMythos(tiny_config(injection=injection), seed=0)
    decay, gain = model.recurrent.injection.discretize()
    torch.testing.assert_close(decay, torch.full((32,), init_decay), rtol=1e-4, atol=1e-9)
    if config.discretization == "zoh":
        # The rate is 1: at rest the state is the encoded input itself.
        torch.testing.assert_close(gain / (1 - decay), torch.ones(32), rtol=1e-4, atol=0)


@pytest.mark.parametrize("state_init", [kind() for kind in get_args(StateInit)])
@pytest.mark.parametrize("config", LTIS, ids=name_of)
@torch.no_grad()
def test_without_residual_branches_the_loop_is_the_linear_system(
    config: LTI, state_init: StateInit
) -> None:
    """h_T = decay^T h_0 + (1 - decay^T) / (1 - decay) gain B e: A is applied once per loop."""
    shape = {"prelude_layers": 0, "coda_layers": 0, "recurrent_layers": 2}
    model = tiny_model(tiny_config(injection=config, state_init=state_init, **shape))
    for block in model.recurrent.layers:
        for parameter in (block.attention.output.weight, *block.feed_forward.parameters()):
            parameter.zero_()
    for parameter in model.recurrent.conditioning.parameters():
        parameter.zero_()
    tokens, num_loops = random_tokens(2), 7
    encoded = model.recurrent.prelude_norm(model.embed(tokens))
    drive = model.recurrent.injection.prepare(encoded)
    initial = state_init.draw(encoded, torch.arange(SEQ)[None], fresh=False)
    power = drive.decay**num_loops
    solution = power * initial + (1 - power) / (1 - drive.decay) * drive.input_term
    state = model(tokens, num_loops=num_loops).recurrence.state
    torch.testing.assert_close(state, solution, rtol=1e-4, atol=1e-5)


def test_decay_stays_below_one_after_a_step_too_large() -> None:
    """The gradient at the bound is not lost: the decay comes back."""
    injection = layer(LTI(), torch.full((4,), -12.0), torch.full((4,), 0.0), torch.float32)
    decay, _ = injection.discretize()
    assert (decay < 1).all() and (decay > 0.98).all()
    optimizer = torch.optim.Adam(injection.parameters(), lr=1.0)
    for _ in range(60):
        optimizer.zero_grad()
        injection.discretize()[0].sum().backward()
        optimizer.step()
    assert (injection.discretize()[0] < 0.9).all()


def test_prepared_drive_is_sliced_by_rows() -> None:
    for config in members(Injection):
        injection = config.build(8)
        for parameter in injection.parameters():
            torch.nn.init.normal_(parameter)
        encoded, state = torch.randn(2, 4, 3, 8)
        drive = injection.prepare(encoded)
        whole = injection(state, drive)
        part = injection(state[1:3], drive._replace(input_term=drive.input_term[1:3]))
        torch.testing.assert_close(part, whole[1:3])


def test_baselines() -> None:
    encoded, state = torch.randn(2, 2, 3, 8)
    added, none, concat = (config.build(8) for config in (Add(), NoInjection(), Concat()))
    assert torch.equal(added(state, added.prepare(encoded)), state + encoded)
    assert torch.equal(none(state, none.prepare(encoded)), state)
    both = torch.cat((concat.state_map.weight, concat.input_map.weight), dim=1)
    u = concat(state, concat.prepare(encoded))
    torch.testing.assert_close(u, torch.cat((state, encoded), dim=-1) @ both.T)
    assert isinstance(concat.prepare(encoded), Drive)


def test_unconstrained_maps_may_start_where_lti_does() -> None:
    """u = decay * h + e, for whole matrices and per channel; and then leave it."""
    encoded, state = torch.randn(2, 2, 3, 8)
    for config in (Concat(init_decay=0.4), Diagonal(init_decay=0.4)):
        injection = config.build(8)
        for name, parameter in injection.named_parameters():
            injection.fills()[name](parameter, None)
        u = injection(state, injection.prepare(encoded))
        torch.testing.assert_close(u, 0.4 * state + encoded)
        assert spectral_radius(injection) == pytest.approx(0.4)
        with torch.no_grad():
            next(injection.parameters()).mul_(-5)
        assert spectral_radius(injection) == pytest.approx(2.0)


@pytest.mark.parametrize("state_init", [ZeroState(), NormalState()])
def test_no_injection_needs_the_encoded_state(state_init: StateInit) -> None:
    with pytest.raises(ConfigError, match=f"state_init = '{state_init.kind}': must be \"encoded\""):
        replace(tiny_config(), injection=NoInjection(), state_init=state_init)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"max_decay": 0.997}, "max_decay = 0.997: must be a number, above 0 and at most 0.996"),
        ({"max_decay": 0.0}, "max_decay = 0.0"),
        ({"init_decay": 0.99}, "init_decay = 0.99: must be below max_decay = 0.99"),
        ({"init_decay": 0.0}, "init_decay = 0.0: must be a number, at least 1e-06"),
    ],
)
def test_impossible_decays_are_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LTI(**fields)
