"""How the encoded input re-enters the state at the start of every loop.

`prepare` computes, once per forward pass, what is constant over loops; every loop then computes
u = decay * h + input_term. `Add`, `Concat` and `NoInjection` are the usual baselines of the LTI
injection.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openmythos.config import require, require_number
from openmythos.kernels.precision import at_least_fp32
from openmythos.nn.facts import Fill, constant, identity, scaled_identity
from openmythos.nn.linear import Linear
from openmythos.types import Hidden

_SMALLEST = torch.finfo(torch.float32).tiny
# The nearest bf16 number below 1 is 0.99609; anything up to here rounds to it or lower.
LARGEST_MAX_DECAY = 0.996


class Drive(NamedTuple):
    """The part of the injection that is constant over loops."""

    input_term: Hidden  # contribution of the input to u
    decay: Tensor  # factor on the state, [dim] or a scalar


class InjectionLayer(nn.Module, ABC):
    """Interface: `prepare` once per pass, `forward` in every loop.

    The state h enters a loop only through this map: the layers run on u, not on h.
    `maps_once` and `maps_per_loop`: multiply-adds per token of `prepare` and `forward`.
    """

    decays = False

    @abstractmethod
    def prepare(self, encoded: Hidden) -> Drive:
        """What is constant over loops, from the normed prelude output [batch, seq, dim]."""

    @abstractmethod
    def forward(self, state: Hidden, drive: Drive) -> Hidden:
        """u from the state [batch, seq, dim] after the previous loop."""

    def max_decay(self) -> Tensor | None:
        """The largest decay of any channel; None for an injection without decay."""
        return None

    def maps_once(self) -> int:
        return 0

    def maps_per_loop(self) -> int:
        return 0


@dataclass(frozen=True, kw_only=True)
class LTI:
    """Linear time-invariant injection u = decay * h + B e, decay < 1 (Parcae, arXiv 2604.12946).

    `discretization`: "zoh" has the exact steady-state gain of the continuous system, "euler" is
    the paper's. `input_map`: one weight per channel or a full matrix. `init_decay` is every
    channel's initial decay, `max_decay` its bound for any parameters. max_decay = 1 is for
    imported weights: decay = exp(-exp(log_rate) * step_size), kept below 1 in any dtype.
    `orthogonal` removes from decay * h its component along the input term (OrthoInj, xLLM-Loop).
    """

    kind: Literal["lti"] = "lti"
    needs_encoded_state: ClassVar[bool] = False
    discretization: Literal["zoh", "euler"] = "zoh"
    input_map: Literal["diagonal", "dense"] = "diagonal"
    init_decay: float = math.sqrt(0.2)
    max_decay: float = 0.99
    orthogonal: bool = False

    def __post_init__(self) -> None:
        if self.max_decay != 1:
            require_number("max_decay", self.max_decay, above=0, at_most=LARGEST_MAX_DECAY)
        require_number("init_decay", self.init_decay, at_least=1e-6)
        require(
            self.init_decay < self.max_decay,
            "init_decay",
            self.init_decay,
            f"must be below max_decay = {self.max_decay}",
        )

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

    def fills(self) -> dict[str, Fill]:
        """decay = max_decay * exp(-exp(log_rate) * step) = init_decay, with rate 1 and gain 1."""
        step = -math.log(self.config.init_decay)
        log_rate = math.log(1 + math.log(self.config.max_decay) / step)
        return {
            "log_rate": constant(log_rate),
            "raw_step_size": constant(math.log(math.expm1(step))),
            "input_map": identity,
        }

    def max_decay(self) -> Tensor:
        return self.discretize()[0].max()

    def maps_once(self) -> int:
        return self.input_map.numel() if self.input_map.ndim == 2 else 0

    def discretize(self) -> tuple[Tensor, Tensor]:
        """(decay, gain), both [dim] in fp32 at least."""
        raw, log_rate = at_least_fp32(self.raw_step_size), at_least_fp32(self.log_rate)
        # softplus underflows far below zero, where log softplus(x) = x.
        log_step = torch.where(raw < -15, raw, F.softplus(raw.clamp_min(-15)).log())
        # exp(-e^5) is 0 in fp32 already; beyond, e^x would overflow and its gradient be nan.
        shrink = (log_step + log_rate).clamp_max(5.0).exp()
        step, decay = log_step.exp(), self.config.max_decay * torch.exp(-shrink)
        if self.config.discretization == "euler":
            return decay, step
        if self.config.max_decay == 1:
            return decay, step * -torch.expm1(-shrink) / shrink.clamp_min(_SMALLEST)
        return decay, step * (1 - decay) / (shrink - math.log(self.config.max_decay))

    def prepare(self, encoded: Hidden) -> Drive:
        decay, gain = self.discretize()
        gain = gain.to(encoded.dtype)
        if self.config.input_map == "diagonal":
            input_term = encoded * (gain * self.input_map.to(encoded.dtype))
        else:
            input_term = F.linear(encoded, self.input_map.to(encoded.dtype)) * gain
        decay = decay.to(encoded.dtype)
        if self.config.max_decay == 1:  # keep it below 1 after rounding
            decay = decay.clamp_max(1 - torch.finfo(decay.dtype).eps / 2)
        return Drive(input_term, decay)

    def forward(self, state: Hidden, drive: Drive) -> Hidden:
        kept, added = drive.decay * state, drive.input_term
        if self.config.orthogonal:
            wide, along = at_least_fp32(kept), at_least_fp32(added)
            size = along.square().sum(-1, keepdim=True) + 1e-6
            kept = (wide - (wide * along).sum(-1, keepdim=True) / size * along).to(kept.dtype)
        return kept + added


@dataclass(frozen=True, kw_only=True)
class Add:
    """u = h + e: the marginally stable baseline, rho = 1."""

    kind: Literal["add"] = "add"
    needs_encoded_state: ClassVar[bool] = False

    def build(self, dim: int) -> "AddInjection":
        return AddInjection()


class AddInjection(InjectionLayer):
    """u = h + e."""

    def prepare(self, encoded: Hidden) -> Drive:
        return Drive(encoded, encoded.new_ones(()))

    def forward(self, state: Hidden, drive: Drive) -> Hidden:
        return state + drive.input_term


@dataclass(frozen=True, kw_only=True)
class Concat:
    """u = W [h; e] (+ b): an unconstrained linear map (Huginn, arXiv 2502.05171).

    W starts at two random matrices, or with `init_decay` > 0 at [init_decay I, I], where `LTI`
    starts.
    """

    kind: Literal["concat"] = "concat"
    needs_encoded_state: ClassVar[bool] = False
    bias: bool = False
    init_decay: float = 0.0

    def __post_init__(self) -> None:
        require_number("init_decay", self.init_decay, at_least=0, at_most=1)

    def build(self, dim: int) -> "ConcatInjection":
        return ConcatInjection(self, dim)


@dataclass(frozen=True, kw_only=True)
class Diagonal:
    """u = a * h + b * e per channel, a and b unconstrained: what `LTI` is without its bound."""

    kind: Literal["diagonal"] = "diagonal"
    needs_encoded_state: ClassVar[bool] = False
    init_decay: float = math.sqrt(0.2)

    def __post_init__(self) -> None:
        require_number("init_decay", self.init_decay, at_least=0, at_most=1)

    def build(self, dim: int) -> "DiagonalInjection":
        return DiagonalInjection(self, dim)


class DiagonalInjection(InjectionLayer):
    """u = a * h + b * e per channel, a unconstrained."""

    def __init__(self, config: Diagonal, dim: int) -> None:
        super().__init__()
        self.config = config
        self.state_map = nn.Parameter(torch.empty(dim))
        self.input_map = nn.Parameter(torch.empty(dim))

    def fills(self) -> dict[str, Fill]:
        return {"state_map": constant(self.config.init_decay), "input_map": identity}

    def prepare(self, encoded: Hidden) -> Drive:
        factor = self.state_map.to(encoded.dtype)
        return Drive(encoded * self.input_map.to(encoded.dtype), factor)

    def forward(self, state: Hidden, drive: Drive) -> Hidden:
        return drive.decay * state + drive.input_term


class ConcatInjection(InjectionLayer):
    """u = W_h h + W_e e (+ b); all but the first term is computed once."""

    def __init__(self, config: Concat, dim: int) -> None:
        super().__init__()
        self.config = config
        self.state_map = Linear(dim, dim, bias=False)
        self.input_map = Linear(dim, dim, bias=config.bias)

    def fills(self) -> dict[str, Fill]:
        found = {"input_map.bias": constant(0.0)} if self.config.bias else {}
        if self.config.init_decay:
            found["state_map.weight"] = scaled_identity(self.config.init_decay)
            found["input_map.weight"] = identity
        return found

    def maps_once(self) -> int:
        return self.input_map.weight.numel()

    def maps_per_loop(self) -> int:
        return self.state_map.weight.numel()

    def prepare(self, encoded: Hidden) -> Drive:
        return Drive(self.input_map(encoded), encoded.new_ones(()))

    def forward(self, state: Hidden, drive: Drive) -> Hidden:
        # Autocast computes the map in bf16, but the state keeps its own dtype.
        return (self.state_map(state) + drive.input_term).to(state.dtype)


@dataclass(frozen=True, kw_only=True)
class NoInjection:
    """u = h: the input enters only through the initial state."""

    kind: Literal["none"] = "none"
    needs_encoded_state: ClassVar[bool] = True

    def build(self, dim: int) -> "NoInjectionLayer":
        return NoInjectionLayer()


class NoInjectionLayer(AddInjection):
    """u = h."""

    def forward(self, state: Hidden, drive: Drive) -> Hidden:
        return state


Injection = LTI | Add | Concat | Diagonal | NoInjection
