"""A function of a few small weights, computed again only when one of their numbers has changed."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from openmythos.kernels import few_rows_native


class Kept:
    """The last results, used again while the inputs hold the same numbers.

    At inference on a CPU alone: elsewhere comparing costs more than computing.
    """

    def __init__(self) -> None:
        self._last: tuple[list[Tensor], tuple[Tensor, ...]] | None = None

    def __call__(
        self, compute: Callable[[], tuple[Tensor, ...]], inputs: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """compute(), which depends on nothing but `inputs`."""
        if torch.is_grad_enabled() or not few_rows_native.accepts_input(inputs[0].detach()):
            return compute()
        last = self._last
        if last is not None and all(map(_same, inputs, last[0])):
            return last[1]
        found = compute()
        self._last = [x.detach().clone() for x in inputs], found
        return found


def _same(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and torch.equal(x, y)
