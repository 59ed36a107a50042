"""Dense feed-forward layers. They act on flattened positions [tokens, dim]."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

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


class SwiGLULayer(nn.Module):
    """y = W_down (silu(g) * u) with [g | u] = W_gate_up x."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_up = Linear(dim, 2 * hidden_dim, bias=False)
        self.down = Linear(hidden_dim, dim, bias=False)

    def forward(
        self, tokens: Tokens, rows: TokenRows, deltas: Deltas = NO_DELTAS
    ) -> tuple[Tokens, None]:
        gate, up = self.gate_up(tokens, deltas).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up, deltas), None


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
