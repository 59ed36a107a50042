"""How the encoded input re-enters the state at the start of every loop.

`prepare` computes, once per forward pass, what is constant over loops; every loop then computes
u = decay * h + input_term. The usual baselines of LTI are in `recurrence.injections`.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openmythos.config import require, require_number
from openmythos.kernels.constants import Kept
from openmythos.kernels.precision import at_least_fp32
from openmythos.nn.facts import Fill, constant, identity
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
        self._kept = Kept()

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
        decay, gain = self._kept(self.discretize, (self.log_rate, self.raw_step_size))
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
