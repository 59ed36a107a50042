"""How the encoded input re-enters the state at the start of every loop.

An injection prepares once per forward pass what no loop changes (`prepare`) and then makes
u = decay * h + forced in every loop. `Add`, `Concat` and `NoInjection` are the baselines that the
field compares the LTI injection with.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openmythos.config import require, require_number
from openmythos.kernels.precision import at_least_fp32
from openmythos.nn.linear import Linear
from openmythos.types import Hidden

# The nearest bf16 number below 1 is 0.99609; anything up to here rounds to it or lower.
LARGEST_MAX_DECAY = 0.996


class Drive(NamedTuple):
    """What does not change between loops."""

    forced: Hidden  # the input's share of u
    decay: Tensor  # of the state, [dim] or a scalar

    def rows(self, start: int, stop: int) -> "Drive":
        return self._replace(forced=self.forced[start:stop])


class InjectionLayer(nn.Module):
    """Interface: `prepare` once, `forward` in every loop."""

    def prepare(self, encoded: Hidden) -> Drive:
        raise TypeError(f"{type(self).__name__} must define prepare")


@dataclass(frozen=True, kw_only=True)
class LTI:
    """Linear time-invariant injection u = decay * h + B e, decay < 1 (Parcae, arXiv 2604.12946).

    `discretization`: "zoh" has the exact steady-state gain of the continuous system, "euler" is
    the paper's. `input_map`: one weight per channel or a full matrix. `init_decay` is every
    channel's decay at the start, `max_decay` bounds it whatever the parameters become.
    """

    kind: Literal["lti"] = "lti"
    discretization: Literal["zoh", "euler"] = "zoh"
    input_map: Literal["diagonal", "dense"] = "diagonal"
    init_decay: float = math.sqrt(0.2)
    max_decay: float = 0.99

    def __post_init__(self) -> None:
        require_number("max_decay", self.max_decay, above=0, at_most=LARGEST_MAX_DECAY)
        require_number("init_decay", self.init_decay, at_least=1e-6)
        require(
            self.init_decay < self.max_decay,
            "init_decay",
            self.init_decay,
            f"must be below max_decay = {self.max_decay}",
        )

    def check(self, state_init: str) -> None:
        """Works from any initial state."""

    def build(self, dim: int) -> "LTIInjection":
        return LTIInjection(self, dim)


class LTIInjection(InjectionLayer):
    """u = decay * h + gain * B e, per channel, from dh/dt = -rate h + B e over step_size.

    step_size = softplus(raw_step_size)
    rate      = exp(log_rate) - ln(max_decay) / step_size     (hence decay <= max_decay)
    decay     = exp(-rate * step_size) = max_decay * exp(-exp(log_rate) * step_size)
    gain      = (1 - decay) / rate   zoh, or   step_size   euler
    """

    def __init__(self, config: LTI, dim: int) -> None:
        super().__init__()
        self.config = config
        self.log_rate = nn.Parameter(torch.empty(dim))
        self.raw_step_size = nn.Parameter(torch.empty(dim))
        shape = (dim,) if config.input_map == "diagonal" else (dim, dim)
        self.input_map = nn.Parameter(torch.empty(shape))

    def discretize(self) -> tuple[Tensor, Tensor]:
        """(decay, gain), both [dim] in fp32 at least."""
        raw, log_rate = at_least_fp32(self.raw_step_size), at_least_fp32(self.log_rate)
        # softplus underflows far below zero, where log softplus(x) = x.
        log_step = torch.where(raw < -15, raw, F.softplus(raw.clamp_min(-15)).log())
        # exp(-e^5) is 0 in fp32 already; beyond, e^x would overflow and its gradient be nan.
        shrink = (log_step + log_rate).clamp_max(5.0).exp()
        floor = -math.log(self.config.max_decay)
        decay = self.config.max_decay * torch.exp(-shrink)
        step = log_step.exp()
        if self.config.discretization == "euler":
            return decay, step
        return decay, step * (1 - decay) / (shrink + floor)

    def prepare(self, encoded: Hidden) -> Drive:
        decay, gain = self.discretize()
        gain = gain.to(encoded.dtype)
        if self.config.input_map == "diagonal":
            forced = encoded * (gain * self.input_map.to(encoded.dtype))
        else:
            forced = F.linear(encoded, self.input_map.to(encoded.dtype)) * gain
        return Drive(forced, decay.to(encoded.dtype))

    def forward(self, state: Hidden, drive: Drive) -> Hidden:
        return drive.decay * state + drive.forced


@dataclass(frozen=True, kw_only=True)
class Add:
    """u = h + e: the marginally stable baseline, rho = 1."""

    kind: Literal["add"] = "add"

    def check(self, state_init: str) -> None:
        """Works from any initial state."""

    def build(self, dim: int) -> "AddInjection":
        return AddInjection()


class AddInjection(InjectionLayer):
    """u = h + e."""

    def prepare(self, encoded: Hidden) -> Drive:
        return Drive(encoded, encoded.new_ones(()))

    def forward(self, state: Hidden, drive: Drive) -> Hidden:
        return state + drive.forced


@dataclass(frozen=True, kw_only=True)
class Concat:
    """u = W [h; e]: an unconstrained linear map (Huginn, arXiv 2502.05171)."""

    kind: Literal["concat"] = "concat"

    def check(self, state_init: str) -> None:
        """Works from any initial state."""

    def build(self, dim: int) -> "ConcatInjection":
        return ConcatInjection(dim)


class ConcatInjection(InjectionLayer):
    """u = W_h h + W_e e; the second term is computed once."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.state_map = Linear(dim, dim, bias=False)
        self.input_map = Linear(dim, dim, bias=False)

    def prepare(self, encoded: Hidden) -> Drive:
        return Drive(self.input_map(encoded), encoded.new_ones(()))

    def forward(self, state: Hidden, drive: Drive) -> Hidden:
        # Autocast maps in bf16, but what runs from loop to loop stays in its own dtype.
        return (self.state_map(state) + drive.forced).to(state.dtype)


@dataclass(frozen=True, kw_only=True)
class NoInjection:
    """u = h: the input is seen through the initial state alone."""

    kind: Literal["none"] = "none"

    def check(self, state_init: str) -> None:
        require(
            state_init == "encoded",
            "state_init",
            state_init,
            'must be "encoded" with injection "none", or the input would never be seen',
        )

    def build(self, dim: int) -> "NoInjectionLayer":
        return NoInjectionLayer()


class NoInjectionLayer(InjectionLayer):
    """u = h."""

    def prepare(self, encoded: Hidden) -> Drive:
        return Drive(encoded, encoded.new_ones(()))

    def forward(self, state: Hidden, drive: Drive) -> Hidden:
        return state


Injection = LTI | Add | Concat | NoInjection
