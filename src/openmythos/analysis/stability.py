"""Stability of the loop: the spectral radius of its linear part."""

import math

import torch

from openmythos.recurrence.injection import InjectionLayer
from openmythos.recurrence.injections import ConcatInjection, DiagonalInjection


@torch.no_grad()
def spectral_radius(injection: InjectionLayer) -> float:
    """Spectral radius of the linear map from a loop's state to the next loop's input.

    1 if there is no such map, inf if its weights are not finite.
    """
    decay = injection.max_decay()
    if decay is not None:
        return float(decay)
    if isinstance(injection, ConcatInjection):
        weight = injection.state_map.weight
        if not bool(weight.isfinite().all()):
            return math.inf
        return float(torch.linalg.eigvals(weight.cpu()).abs().max())
    if isinstance(injection, DiagonalInjection):
        largest = injection.state_map.abs().max()
        return float(largest) if bool(largest.isfinite()) else math.inf
    return 1.0
