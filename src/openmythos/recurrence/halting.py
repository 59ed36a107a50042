"""Learned halting: a position stops looping when the model says so.

A halted position keeps its state and its keys and values, and costs no feed-forward compute in
later loops. Stopping rules for models that were not trained to halt are in `exit_rules`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from openmythos.config import require_int, require_number
from openmythos.kernels.precision import at_least_fp32, no_autocast
from openmythos.nn.facts import Fill, constant
from openmythos.types import Hidden, LoopCounts, LoopsPerToken, Mask, PerToken, Scalar


class HaltingLayer(nn.Module, ABC):
    """Interface of learned halting.

    The loop carries `halt`, a tree of tensors [batch, seq, ...] that only the layer reads: it may
    be cut along the batch, or gathered at some positions, between loops.
    """

    decays = False

    @abstractmethod
    def start(self, state: Hidden) -> Any:
        """`halt` before the first loop, for an initial state [batch, seq, dim]."""

    @abstractmethod
    def update(
        self, halt: Any, active: Mask, state: Hidden, loop: int | LoopCounts
    ) -> tuple[Any, Mask]:
        """(halt, active) after a loop that has left `state` at the active positions."""

    @abstractmethod
    def finish(
        self, halt: Any, state: Hidden, loops_used: LoopsPerToken
    ) -> tuple[Hidden, PerToken]:
        """(what the coda reads, ponder cost [batch, seq]) if the loops end here."""

    @abstractmethod
    def cumulative(self, halt: Any) -> PerToken:
        """The sum of the weights of the loops so far, at most 1."""

    @abstractmethod
    def loss(self, ponder_cost: Scalar) -> Scalar:
        """What halting adds to the training loss."""


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
    the first halting probabilities (sigmoid(-2) = 0.12), `min_loops` forbids halting earlier, and
    `ponder_weight` scales the ponder cost in the loss.
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


Halting = NoHalting | ACT


class HaltState(NamedTuple):
    """What ACT carries from loop to loop, per position."""

    cumulative: PerToken  # sum of the weights so far
    output: Hidden  # sum of weight * state so far
    last_weight: PerToken  # weight of the last loop that ran


class ACTHalting(HaltingLayer):
    """halt_prob p = sigmoid(w h + b), read from the state that a loop has produced.

    halt_weight = p                       while sum(p) <= threshold
                = 1 - (weights before)    in the loop that crosses it, or in the last loop
    output      = sum over loops of halt_weight * h, weights summing to 1
    ponder      = N + R: loops run, plus the weight of the last of them
    """

    def __init__(self, config: ACT, dim: int) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(1))

    def fills(self) -> dict[str, Fill]:
        return {"weight": constant(0.0), "bias": constant(self.config.bias_init)}

    def start(self, state: Hidden) -> HaltState:
        wide = torch.promote_types(state.dtype, torch.float32)
        zeros = state.new_zeros(state.shape[:2], dtype=wide)
        return HaltState(zeros, torch.zeros_like(state), zeros)

    def halt_prob(self, state: Hidden) -> PerToken:
        # fp32 at least, so that weights sum to 1 and bf16 states stay in their dtype.
        with no_autocast(state):
            wide = at_least_fp32(state)
            return (wide @ self.weight.to(wide.dtype) + self.bias.to(wide.dtype)).sigmoid()

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
        """The last loop gets the weight that is still missing."""
        missing = 1 - halt.cumulative
        output = halt.output + missing.unsqueeze(-1).to(state.dtype) * state
        return output, loops_used + halt.last_weight + missing

    def cumulative(self, halt: HaltState) -> PerToken:
        return halt.cumulative

    def loss(self, ponder_cost: Scalar) -> Scalar:
        return self.config.ponder_weight * ponder_cost
