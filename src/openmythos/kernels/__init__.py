"""How a formula is computed: in a fast form, or as it is written down.

One file per formula. In each, `reference()` is the formula in plain torch: any dtype, derivatives
of any order, `jvp`, `vmap`. The function of the file's name chooses between it and the fast forms,
which have first derivatives only and no place in `torch.func`.

Nothing outside this room asks for the kind of a device or for torch.compile, defines an
`autograd.Function` or an operator, or holds a constant that was tuned.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from openmythos.config import require, unknown_name

Forms = Literal["auto", "reference"]
VARIABLE = "OPENMYTHOS_KERNELS"


def _checked(forms: str, name: str) -> str:
    known = get_args(Forms)
    require(forms in known, name, forms, unknown_name("choice", forms, known))
    return forms


_forms = _checked(os.environ.get(VARIABLE, "auto"), VARIABLE)


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

    `own_forms`: our norm and rotation gain over torch's. `blocks`: causal attention of several
    queries gains from being computed in blocks of queries. `chunk_tokens`: rows of logits that the
    loss makes at a time. `few_rows_per_expert`: with at most so many routed rows per expert,
    decoding computes experts one by one. `stacks`: one product of a stack of matrices gains over a
    product of each.
    """

    own_forms: bool
    blocks: bool
    chunk_tokens: int
    few_rows_per_expert: float
    stacks: bool


# CPU: measured on 2-core Zen 4, see docs/performance.md. Elsewhere: torch's own operators, and
# chunks that keep a kernel busy with at most 1 GiB of fp32 logits per 32,768 words. Not measured.
CPU = Tuned(own_forms=True, blocks=True, chunk_tokens=512, few_rows_per_expert=0.25, stacks=False)
ACCELERATOR = Tuned(
    own_forms=False, blocks=False, chunk_tokens=8192, few_rows_per_expert=0.0, stacks=True
)


def fast(device: torch.device) -> Tuned | None:
    """The constants of the fast forms on a device; None: compute the formula as it is written."""
    if _forms == "reference":
        return None
    return CPU if device.type == "cpu" else ACCELERATOR


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
