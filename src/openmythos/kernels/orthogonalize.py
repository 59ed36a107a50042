"""Newton-Schulz iteration of Muon: approximately orthogonalises a matrix (Jordan et al. 2024).

Maps X = U S V^T to about U V^T, with singular values between about 0.7 and 1.2. The coefficients
trade exact convergence to 1 for a steep slope at 0, so that 5 steps suffice.
"""

import torch
from torch import Tensor

from openmythos import kernels, machine

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
EPS = 1e-7


def reference(x: Tensor) -> Tensor:
    """The formula, on matrices (..., m, n), in their dtype."""
    a, b, c = COEFFICIENTS
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def orthogonalize(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Orthogonalise a matrix, or each of a stack (k, m, n), in `dtype`.

    The result has that dtype. Default: the device's fast one; fp64 stays fp64.
    """
    if dtype is None:
        dtype = x.dtype if x.dtype == torch.float64 else machine.fast_dtype(x.device)
    x = x.to(dtype)
    if x.numel() == 0:
        return x
    tuned = kernels.fast(x.device)
    if tuned is None:
        return reference(x)
    if x.ndim == 3 and not tuned.stacks:
        return torch.stack([_iterate(matrix) for matrix in x])
    return _iterate(x)


def takes_stacks(device: torch.device) -> bool:
    """Whether one call for a stack of matrices is faster there than one for each."""
    tuned = kernels.fast(device)
    return tuned is not None and tuned.stacks


def _iterate(x: Tensor) -> Tensor:
    """The iteration on the smaller of the two Gram matrices, with addition fused into matmuls."""
    a, b, c = COEFFICIENTS
    add_product = torch.addmm if x.ndim == 2 else torch.baddbmm
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = add_product(x, add_product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
