"""y = W x, where x may be the new tokens of a few rows.

For few rows the time is that of reading W. The native form reads it once for all of them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from openmythos.kernels import few_rows_native

# Above, torch's product is as fast.
MOST_ROWS = 16
# The native form uses one thread. With more than two, not measured, torch computes a larger W.
MOST_NUMBERS = 1 << 20


def reference(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in], weight [out, in] -> [..., out]."""
    return F.linear(x, weight)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`reference`, fast for few rows at inference on a CPU."""
    few = 0 < x.numel() <= MOST_ROWS * x.shape[-1] and _is_read_fast(weight)
    if few and few_rows_native.accepts_input(x) and few_rows_native.accepts_weight(weight):
        return few_rows_native.linear(x.contiguous(), weight)
    return F.linear(x, weight)


def _is_read_fast(weight: Tensor) -> bool:
    return weight.numel() <= MOST_NUMBERS or torch.get_num_threads() <= 2
