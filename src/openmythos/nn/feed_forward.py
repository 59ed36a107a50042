"""Dense feed-forward layers. They act on flattened positions [tokens, dim]."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from openmythos.config import require_int
from openmythos.nn.linear import NO_DELTAS, Deltas, Linear
from openmythos.types import Tokens


class TokenRows(NamedTuple):
    """Which sequence of the batch each flattened position came from."""

    row: Tensor  # [tokens]
    num_rows: int


@dataclass(frozen=True, kw_only=True)
class SwiGLU:
    """W_down (silu(W_gate x) * W_up x), Shazeer 2020."""

    kind: Literal["swiglu"] = "swiglu"
    hidden_dim: int = 704

    def __post_init__(self) -> None:
        require_int("hidden_dim", self.hidden_dim, minimum=1)

    def build(self, dim: int) -> "SwiGLULayer":
        return SwiGLULayer(dim, self.hidden_dim)


class _Gate(torch.autograd.Function):
    """silu(g) * u, keeping [g | u] alone for the backward pass."""

    @staticmethod
    def forward(ctx, gated):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(gated)
        gate, up = gated.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (gated,) = ctx.saved_tensors
        gate, up = gated.chunk(2, dim=-1)
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return torch.cat((grad_gate, F.silu(gate).mul_(grad)), dim=-1)


class SwiGLULayer(nn.Module):
    """y = W_down (silu(g) * u) with [g | u] = W_gate_up x."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_up = Linear(dim, 2 * hidden_dim, bias=False)
        self.down = Linear(hidden_dim, dim, bias=False)

    def forward(
        self, tokens: Tokens, rows: TokenRows, deltas: Deltas = NO_DELTAS
    ) -> tuple[Tokens, None]:
        hidden: Tensor = _Gate.apply(self.gate_up(tokens, deltas))  # type: ignore[no-untyped-call]
        return self.down(hidden, deltas), None


@dataclass(frozen=True, kw_only=True)
class ReLU2:
    """W_down relu(W_up x)^2, So et al. 2021 (Primer)."""

    kind: Literal["relu2"] = "relu2"
    hidden_dim: int = 1024

    def __post_init__(self) -> None:
        require_int("hidden_dim", self.hidden_dim, minimum=1)

    def build(self, dim: int) -> "ReLU2Layer":
        return ReLU2Layer(dim, self.hidden_dim)


class ReLU2Layer(nn.Module):
    """y = W_down relu(W_up x)^2."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.up = Linear(dim, hidden_dim, bias=False)
        self.down = Linear(hidden_dim, dim, bias=False)

    def forward(
        self, tokens: Tokens, rows: TokenRows, deltas: Deltas = NO_DELTAS
    ) -> tuple[Tokens, None]:
        return self.down(F.relu(self.up(tokens, deltas)).square(), deltas), None
