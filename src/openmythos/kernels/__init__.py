"""How a formula is computed: in its fast form, or as it is written down. Chosen here.

"auto" takes the fast form of this device where there is one. Fast forms have gradients, but no
second derivatives and no place in `torch.func`. "reference" computes everything with plain torch
operators, slowly: any dtype, derivatives of any order, `jvp`, `vmap`, Jacobians of the loop.

A file of this room has one formula: `reference()` is the formula, in any dtype; the function of the
file's name computes it fast on the device at hand.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from openmythos.config import require, unknown_name

Forms = Literal["auto", "reference"]
VARIABLE = "OPENMYTHOS_KERNELS"


def _checked(forms: str, name: str) -> str:
    known = get_args(Forms)
    require(forms in known, name, forms, unknown_name("choice", forms, known))
    return forms


_forms = _checked(os.environ.get(VARIABLE, "auto"), VARIABLE)


def reference() -> bool:
    """Whether formulas are to be computed as they are written down."""
    return _forms == "reference"


@contextlib.contextmanager
def use(forms: Forms) -> Iterator[None]:
    """Compute with these forms inside the block; the environment's OPENMYTHOS_KERNELS elsewhere.

    For the whole process, since a backward pass may run in a thread of its own: that pass belongs
    inside the block too.
    """
    global _forms
    before, _forms = _forms, _checked(forms, "forms")
    try:
        yield
    finally:
        _forms = before


@dataclass(frozen=True)
class Tuned:
    """What was measured on a kind of device, or is assumed where nothing was.

    `own_forms`: our norm, rotation, gated product and attention in blocks gain over torch's.
    `chunk_tokens`: rows of logits that the loss makes at a time. `few_rows_per_expert`: below so
    many routed rows per expert, experts are computed one by one in decoding. `stacks`: one product
    of a stack of matrices gains over a product of each.
    """

    own_forms: bool
    chunk_tokens: int
    few_rows_per_expert: float
    stacks: bool


# CPU: measured on 2-core Zen 4, see docs/performance.md. Elsewhere: torch's own operators, and
# chunks that keep a kernel busy with at most 1 GiB of fp32 logits per 32,768 words. Not measured.
CPU = Tuned(own_forms=True, chunk_tokens=512, few_rows_per_expert=0.25, stacks=False)
ACCELERATOR = Tuned(own_forms=False, chunk_tokens=8192, few_rows_per_expert=0.0, stacks=True)


def tuned(device: torch.device) -> Tuned:
    """The constants for a device."""
    return CPU if device.type == "cpu" else ACCELERATOR


def own_form(x: Tensor) -> bool:
    """Whether to compute with a form of our own rather than with torch's operators."""
    return not reference() and tuned(x.device).own_forms


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the backward pass of a fast form, which cannot be differentiated itself.

    It refuses to run where a graph of it is wanted (`create_graph=True`). torch's own
    `once_differentiable` refuses only where the incoming gradient has a graph: at the loss it is a
    constant, and all second derivatives came out as 0.
    """

    @functools.wraps(backward)
    def guarded(ctx, *grads):  # type: ignore[no-untyped-def]
        if torch.compiler.is_compiling():  # torch.compile refuses second derivatives itself
            return backward(ctx, *grads)
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True: the fast kernels have no second derivatives; compute all of "
                'it within openmythos.kernels.use("reference")'
            )
        return backward(ctx, *grads)

    return guarded
