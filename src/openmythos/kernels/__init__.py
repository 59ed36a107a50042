"""Kernels: each formula in plain torch (the reference) and in fast forms.

One file per formula. `reference()` is the formula in plain torch: any dtype, derivatives of any
order, `jvp`, `vmap`. The main function of the file chooses between it and the fast forms, which
have only first derivatives and do not work under `torch.func`.

Only this package checks for the type of a device or for torch.compile, defines an
`autograd.Function` or an operator, or has tuned constants.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from openmythos.config import require, unknown_name

# "torch": fast forms, but no native code.
Forms = Literal["auto", "torch", "reference"]
VARIABLE = "OPENMYTHOS_KERNELS"


def _checked(forms: str, name: str) -> str:
    known = get_args(Forms)
    if forms not in known:  # the text of the error takes longer than a small kernel
        require(False, name, forms, unknown_name("choice", forms, known))
    return forms


_forms = _checked(os.environ.get(VARIABLE, "auto"), VARIABLE)


@contextlib.contextmanager
def use(forms: Forms) -> Iterator[None]:
    """Use these forms inside the block; elsewhere the environment's OPENMYTHOS_KERNELS.

    The choice is process-wide, since the backward pass may run in another thread; run the backward
    pass inside the block too.
    """
    global _forms
    before, _forms = _forms, _checked(forms, "forms")
    try:
        yield
    finally:
        _forms = before


@dataclass(frozen=True)
class Tuned:
    """Tuned constants of a type of device, measured or assumed.

    `own_forms`: our norm and rotation are faster than torch's. `blocks`: causal attention of
    several queries is faster in blocks of queries. `chunk_tokens`: rows of logits that the loss
    computes at a time. `few_rows_per_expert`: up to this many routed rows per expert, decoding
    computes experts one by one. `stacks`: a batched matmul of a stack of matrices is faster than
    one matmul each. `gathers`: decoding copies the weights of the chosen experts, so as not to wait
    for the device.
    """

    own_forms: bool
    blocks: bool
    chunk_tokens: int
    few_rows_per_expert: float
    stacks: bool
    gathers: bool


# CPU: measured on 2-core Zen 4, see docs/performance.md. Elsewhere: torch's own operators, and
# chunks of at most 1 GiB of fp32 logits for a vocabulary of 32,768. Not measured.
CPU = Tuned(
    own_forms=True,
    blocks=True,
    chunk_tokens=512,
    few_rows_per_expert=0.25,
    stacks=False,
    gathers=False,
)
ACCELERATOR = Tuned(
    own_forms=False,
    blocks=False,
    chunk_tokens=8192,
    few_rows_per_expert=0.0,
    stacks=True,
    gathers=True,
)


def fast(device: torch.device) -> Tuned | None:
    """The constants of the fast forms on a device; None: use the reference."""
    if _forms == "reference":
        return None
    return CPU if device.type == "cpu" else ACCELERATOR


def native_wanted() -> bool:
    """Whether compiled code of our own may take the place of torch's operators."""
    return _forms == "auto" and not torch.compiler.is_compiling()


def step_form(device: torch.device) -> Literal["compiled", "captured", ""]:
    """How decoding steps of fixed shapes run fast: as compiled code, as CUDA graphs, or not."""
    if _forms == "reference":
        return ""
    return {"cpu": "compiled", "cuda": "captured"}.get(device.type, "")  # type: ignore[return-value]


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator for the backward pass of a fast form, which has no second derivatives.

    It raises a RuntimeError under `create_graph=True`. torch's `once_differentiable` raises only if
    the incoming gradient has a graph: at the loss it is a constant, and all second derivatives
    would be 0.
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
