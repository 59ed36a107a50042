"""Dense feed-forward layers. They act on flattened positions [tokens, dim]."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openmythos import kernels
from openmythos.config import MAX_WIDTH, require_int
from openmythos.nn.linear import NO_DELTAS, Deltas, Linear, as_autocast
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
        require_int("hidden_dim", self.hidden_dim, minimum=1, maximum=MAX_WIDTH)

    def build(self, dim: int) -> "SwiGLULayer":
        return SwiGLULayer(dim, self.hidden_dim)


def gated_product(gated: Tensor) -> Tensor:
    """silu(g) * u of [g | u], outside of autograd."""
    gate, up = gated.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class _GatedLinear(torch.autograd.Function):
    """y = W (silu(g) * u), keeping [g | u] alone; the product is made again for the gradient."""

    @staticmethod
    def forward(ctx, gated, weight):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(gated, weight)
        return F.linear(gated_product(gated), weight)

    @staticmethod
    @kernels.first_order
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        gated, weight = ctx.saved_tensors
        gate, up = gated.chunk(2, dim=-1)
        silu = F.silu(gate)
        grad_weight = grad.t() @ (silu * up) if ctx.needs_input_grad[1] else None
        grad_hidden = grad @ weight
        grad_gate = torch.ops.aten.silu_backward(grad_hidden * up, gate)
        return torch.cat((grad_gate, grad_hidden.mul_(silu)), dim=-1), grad_weight


class SwiGLULayer(nn.Module):
    """y = W_down (silu(g) * u) with [g | u] = W_gate_up x."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_up = Linear(dim, 2 * hidden_dim, bias=False)
        self.down = Linear(hidden_dim, dim, bias=False)

    def forward(
        self, tokens: Tokens, rows: TokenRows | None, deltas: Deltas = NO_DELTAS
    ) -> tuple[Tokens, None]:
        gated = self.gate_up(tokens, deltas)
        adapted = self.down.delta_key in deltas
        # On every device, for its memory: the plain product keeps twice as much for its gradient.
        if adapted or not torch.is_grad_enabled() or kernels.reference():
            gate, up = gated.chunk(2, dim=-1)
            return self.down(F.silu(gate) * up, deltas), None
        weight = as_autocast(self.down.weight)
        out: Tensor = _GatedLinear.apply(gated, weight)  # type: ignore[no-untyped-call]
        return out, None


@dataclass(frozen=True, kw_only=True)
class ReLU2:
    """W_down relu(W_up x)^2, So et al. 2021 (Primer)."""

    kind: Literal["relu2"] = "relu2"
    hidden_dim: int = 1024

    def __post_init__(self) -> None:
        require_int("hidden_dim", self.hidden_dim, minimum=1, maximum=MAX_WIDTH)

    def build(self, dim: int) -> "ReLU2Layer":
        return ReLU2Layer(dim, self.hidden_dim)


class ReLU2Layer(nn.Module):
    """y = W_down relu(W_up x)^2."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.up = Linear(dim, hidden_dim, bias=False)
        self.down = Linear(hidden_dim, dim, bias=False)

    def forward(
        self, tokens: Tokens, rows: TokenRows | None, deltas: Deltas = NO_DELTAS
    ) -> tuple[Tokens, None]:
        return self.down(F.relu(self.up(tokens, deltas)).square(), deltas), None
