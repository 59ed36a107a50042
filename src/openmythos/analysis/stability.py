"""Stability of the loop: how fast its linear part alone makes the state grow."""

import math

import torch
from torch import nn

from openmythos.recurrence.injection import ConcatInjection, LTIInjection


@torch.no_grad()
def spectral_radius(injection: nn.Module) -> float:
    """rho of the linear map from one loop's state to the next loop's input; 1 without such a map.

    Infinite where its weights are not finite.
    """
    if isinstance(injection, LTIInjection):
        return float(injection.discretize()[0].max())
    if isinstance(injection, ConcatInjection):
        weight = injection.state_map.weight
        if not bool(weight.isfinite().all()):
            return math.inf
        return float(torch.linalg.eigvals(weight.cpu()).abs().max())
    return 1.0
