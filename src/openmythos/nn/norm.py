"""RMSNorm, the only norm of this project."""

import torch
from torch import Tensor, nn

from openmythos.kernels.norm import rms_norm
from openmythos.nn.facts import Fill, constant


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension (Zhang & Sennrich 2019).

    `weighted=False`: no weight, hence no parameters.
    """

    decays = False
    weight: nn.Parameter | None

    def __init__(self, dim: int, eps: float, *, weighted: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.register_parameter("weight", nn.Parameter(torch.ones(dim)) if weighted else None)

    def fills(self) -> dict[str, Fill]:
        return {} if self.weight is None else {"weight": constant(1.0)}

    def forward(self, x: Tensor) -> Tensor:
        weight = x.new_ones(x.shape[-1]) if self.weight is None else self.weight
        return rms_norm(x, weight, self.eps)
