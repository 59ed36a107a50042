"""Stability of the loop: how fast its linear part alone makes the state grow."""

import math

import torch

from openmythos.recurrence.injection import ConcatInjection, InjectionLayer


@torch.no_grad()
def spectral_radius(injection: InjectionLayer) -> float:
    """rho of the linear map from the state of a loop to the input of the next; 1 if there is none.

    Infinite where its weights are not finite.
    """
    decay = injection.max_decay()
    if decay is not None:
        return float(decay)
    if isinstance(injection, ConcatInjection):
        weight = injection.state_map.weight
        if not bool(weight.isfinite().all()):
            return math.inf
        return float(torch.linalg.eigvals(weight.cpu()).abs().max())
    return 1.0
