"""All injections: LTI and its usual baselines."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from openmythos.config import require_number
from openmythos.nn.facts import Fill, constant, identity, scaled_identity
from openmythos.nn.linear import Linear
from openmythos.recurrence.injection import LTI, Drive, InjectionLayer
from openmythos.types import Hidden


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
