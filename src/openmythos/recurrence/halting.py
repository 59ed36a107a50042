"""Learned halting: a position stops looping when the model says so.

A halted position keeps its state and its keys and values, and costs no feed-forward compute in
later loops. Stopping rules for models that were not trained to halt are in `exit_rules`.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from openmythos.config import require_int, require_number
from openmythos.kernels.precision import at_least_fp32, no_autocast
from openmythos.nn.facts import Fill, constant
from openmythos.types import Hidden, LoopCounts, LoopsPerToken, Mask, PerToken, Scalar

_SMALLEST = torch.finfo(torch.float32).tiny


class HaltingLayer(nn.Module, ABC):
    """Interface of learned halting.

    The loop carries `halt`, a tree of tensors [batch, seq, ...] that only this layer interprets.
    Between loops it may be sliced along the batch or gathered at some positions.
    """

    decays = False

    @abstractmethod
    def start(self, state: Hidden) -> Any:
        """`halt` before the first loop, for an initial state [batch, seq, dim]."""

    @abstractmethod
    def update(
        self, halt: Any, active: Mask, state: Hidden, loop: int | LoopCounts
    ) -> tuple[Any, Mask]:
        """(halt, active) after a loop that produced `state` at the active positions."""

    @abstractmethod
    def finish(
        self, halt: Any, state: Hidden, loops_used: LoopsPerToken
    ) -> tuple[Hidden, PerToken]:
        """(the coda's input, ponder cost [batch, seq]) if the loops end here."""

    @abstractmethod
    def cumulative(self, halt: Any) -> PerToken:
        """The sum of the halting weights of the loops so far, at most 1."""

    @abstractmethod
    def loss(self, ponder_cost: Scalar) -> Scalar:
        """The term of the training loss, from the mean ponder cost."""


@dataclass(frozen=True, kw_only=True)
class NoHalting:
    """Every position runs every loop."""

    kind: Literal["none"] = "none"

    def build(self, dim: int) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class ACT:
    """Adaptive computation time per position (Graves 2016; Universal Transformers 2019).

    A position halts when its halting probabilities sum to more than `threshold`. `bias_init` sets
    the initial halting probability (sigmoid(-2) = 0.12), `min_loops` is the earliest loop to halt
    in, and `ponder_weight` scales the ponder cost in the loss.
    """

    kind: Literal["act"] = "act"
    threshold: float = 0.99
    bias_init: float = -2.0
    min_loops: int = 1
    ponder_weight: float = 0.01

    def __post_init__(self) -> None:
        require_number("threshold", self.threshold, above=0, below=1)
        require_number("bias_init", self.bias_init, at_least=-100, at_most=100)
        require_int("min_loops", self.min_loops, minimum=1)
        require_number("ponder_weight", self.ponder_weight, at_least=0, at_most=1e6)

    def build(self, dim: int) -> "ACTHalting":
        return ACTHalting(self, dim)


@dataclass(frozen=True, kw_only=True)
class ExitGate:
    """A learned exit distribution over the loops, which does not affect the states.

    (PonderNet, arXiv 2107.05407; Ouro, arXiv 2510.25741.)

    At inference `readout` says what a position's output is:

    select     its state in the first loop at which the cumulative exit probability reaches
               `threshold` (1: the last loop); all loops run, for the sake of later positions
    freeze     the same loop, but the position stops there and keeps that loop's keys and values
    expected   the mean of its states, weighted by exit probability; where no norm and no coda
               stand before the head, its logits are the expected logits

    In training every loop runs for every position, and with `train.loss` "expected" each loop's
    loss is weighted by its exit probability, and `prior_weight` times the KL divergence of the
    distribution from a prior is added: `prior` = 0 is uniform (Ouro's entropy term, up to a
    constant), above 0 geometric with that exit probability per loop.
    """

    kind: Literal["exit_gate"] = "exit_gate"
    threshold: float = 1.0
    readout: Literal["select", "freeze", "expected"] = "select"
    prior: float = 0.0
    prior_weight: float = 0.1

    def __post_init__(self) -> None:
        require_number("threshold", self.threshold, above=0, at_most=1)
        require_number("prior", self.prior, at_least=0, below=1)
        require_number("prior_weight", self.prior_weight, at_least=0, at_most=1e6)

    def build(self, dim: int) -> "ExitGateHalting":
        return ExitGateHalting(self, dim)


Halting = NoHalting | ACT | ExitGate


class HaltState(NamedTuple):
    """State of ACT between loops, per position."""

    cumulative: PerToken  # sum of the weights so far
    output: Hidden  # sum of weight * state so far
    last_weight: PerToken  # weight of the last loop that ran


class _Unit(HaltingLayer):
    """A halting layer that reads one probability per position: sigmoid(w h + b)."""

    def __init__(self, dim: int, bias_init: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(1))
        self._bias_init = bias_init

    def fills(self) -> dict[str, Fill]:
        return {"weight": constant(0.0), "bias": constant(self._bias_init)}

    def halt_prob(self, state: Hidden) -> PerToken:
        # fp32 at least, so that weights sum to 1 and bf16 states stay in their dtype.
        with no_autocast(state):
            wide = at_least_fp32(state)
            return (wide @ self.weight.to(wide.dtype) + self.bias.to(wide.dtype)).sigmoid()


class ACTHalting(_Unit):
    """halt_prob p = sigmoid(w h + b), read from the state that a loop has produced.

    halt_weight = p                       while sum(p) <= threshold
                = 1 - (weights before)    in the loop that crosses it, or in the last loop
    output      = sum over loops of halt_weight * h, weights summing to 1
    ponder      = N + R: loops run, plus the weight of the last of them
    """

    def __init__(self, config: ACT, dim: int) -> None:
        super().__init__(dim, config.bias_init)
        self.config = config

    def start(self, state: Hidden) -> HaltState:
        wide = torch.promote_types(state.dtype, torch.float32)
        zeros = state.new_zeros(state.shape[:2], dtype=wide)
        return HaltState(zeros, torch.zeros_like(state), zeros)

    def update(
        self, halt: HaltState, active: Mask, state: Hidden, loop: int | LoopCounts
    ) -> tuple[HaltState, Mask]:
        prob = self.halt_prob(state)
        early = loop + 1 < self.config.min_loops
        if isinstance(early, Tensor):
            prob = prob.masked_fill(early[:, None], 0)
        elif early:
            prob = prob * 0
        remainder = 1 - halt.cumulative
        halts = active & (halt.cumulative + prob > self.config.threshold)
        weight = torch.where(halts, remainder, prob) * active
        updated = HaltState(
            halt.cumulative + weight,
            halt.output + weight.unsqueeze(-1).to(state.dtype) * state,
            torch.where(active, weight, halt.last_weight),
        )
        return updated, active & ~halts

    def finish(
        self, halt: HaltState, state: Hidden, loops_used: LoopsPerToken
    ) -> tuple[Hidden, PerToken]:
        """The last loop gets the remainder, 1 - (sum of weights so far)."""
        missing = 1 - halt.cumulative
        output = halt.output + missing.unsqueeze(-1).to(state.dtype) * state
        return output, loops_used + halt.last_weight + missing

    def cumulative(self, halt: HaltState) -> PerToken:
        return halt.cumulative

    def loss(self, ponder_cost: Scalar) -> Scalar:
        return self.config.ponder_weight * ponder_cost


class GateState(NamedTuple):
    """State of an exit gate between loops, per position."""

    remaining: PerToken  # probability not to have exited before the last loop that ran
    exited: PerToken  # sum of the exit probabilities up to that loop
    divergence: PerToken  # sum over the loops before it of p log(p / prior)
    output: Hidden  # state after the loop that reached the threshold, where `selected`; or, for
    # the readout "expected", the sum of exit probability * state so far
    selected: Mask  # whether a loop has reached the threshold
    loops: LoopsPerToken


class ExitGateHalting(_Unit):
    """Exit probability of loop t, with lambda_t = sigmoid(w h_t + b):

    p_t = lambda_t prod_{s < t} (1 - lambda_s),  the last loop gets the remainder
    """

    def __init__(self, config: ExitGate, dim: int) -> None:
        super().__init__(dim, bias_init=0.0)
        self.config = config

    def start(self, state: Hidden) -> GateState:
        wide = torch.promote_types(state.dtype, torch.float32)
        zeros = state.new_zeros(state.shape[:2], dtype=wide)
        used = zeros.long()
        return GateState(zeros + 1, zeros, zeros, torch.zeros_like(state), used.bool(), used)

    def update(
        self, halt: GateState, active: Mask, state: Hidden, loop: int | LoopCounts
    ) -> tuple[GateState, Mask]:
        # The previous loop was not the last: its p is final, without the remainder.
        before = halt.exited
        remaining = 1 - before
        divergence = torch.where(
            halt.loops > 0, halt.divergence + self._term(halt, before), halt.divergence
        )
        exited = torch.where(active, before + remaining * self.halt_prob(state), before)
        reached = (exited >= self.config.threshold) & ~halt.selected & (not self.training)
        output = halt.output
        if self.config.readout == "expected":
            reached = torch.zeros_like(reached)
            output = output + (exited - before)[..., None].to(state.dtype) * state
        else:
            output = torch.where(reached[..., None], state, output)
        if self.config.readout == "freeze":
            active = active & ~reached
            exited = exited.masked_fill(reached, 1)  # no later loop has a share
        gate = GateState(
            remaining, exited, divergence, output, halt.selected | reached, halt.loops + 1
        )
        return gate, active

    def _term(self, halt: GateState, exited: PerToken) -> PerToken:
        """p log(p / prior) of the last loop that ran, for p = exited - (exited before it)."""
        p = (exited - (1 - halt.remaining)).clamp_min(_SMALLEST)
        return p * (p.log() - self._log_prior(halt.loops))

    def _log_prior(self, loops: LoopsPerToken) -> Tensor:
        """log prior of loop number `loops`, counted from 1; 0 for the uniform prior."""
        chance = self.config.prior
        if chance == 0:
            return loops.new_zeros((), dtype=torch.float32)
        return math.log(chance) + (loops - 1) * math.log1p(-chance)

    def finish(
        self, halt: GateState, state: Hidden, loops_used: LoopsPerToken
    ) -> tuple[Hidden, PerToken]:
        """The ponder cost is the divergence from the prior."""
        if self.config.readout == "expected" and not self.training:
            output = halt.output + (1 - halt.exited)[..., None].to(state.dtype) * state
        else:
            output = torch.where(halt.selected[..., None], halt.output, state)
        return output, halt.divergence + self._term(halt, torch.ones_like(halt.exited))

    def cumulative(self, halt: GateState) -> PerToken:
        return halt.exited

    def loss(self, ponder_cost: Scalar) -> Scalar:
        return self.config.prior_weight * ponder_cost
