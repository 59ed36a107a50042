"""What a module states about itself: initialisation, weight decay, arithmetic.

Initialisation, optimizer and planning ask the modules; nothing else lists their names. The default,
for a module that states nothing: matrices start from a truncated normal scaled by fan-in, get
weight decay, and cost one multiply-add per weight and token.

    fills()            initialisation of its own parameters and buffers, by relative name
    residual_outputs   its weights that write to the residual stream, which may start at zero
    decays             False: its parameters get AdamW without weight decay
    multiply_adds()    per token, if not one per weight of its linear maps
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Fill = Callable[[Tensor, torch.Generator | None], None]


def truncated_normal(x: Tensor, generator: torch.Generator | None) -> None:
    """Normal with std sqrt(2 / (5 fan_in)), truncated at 3 std (Parcae, arXiv 2604.12946)."""
    std = math.sqrt(2 / (5 * x.shape[-1]))
    nn.init.trunc_normal_(x, std=std, a=-3 * std, b=3 * std, generator=generator)


def constant(value: float) -> Fill:
    def fill(x: Tensor, generator: torch.Generator | None) -> None:
        nn.init.constant_(x, value)

    return fill


def identity(x: Tensor, generator: torch.Generator | None) -> None:
    """Ones for a vector (one weight per channel), the identity for a matrix."""
    nn.init.ones_(x) if x.ndim == 1 else nn.init.eye_(x)


def scaled_identity(value: float) -> Fill:
    """That number times the identity matrix."""

    def fill(x: Tensor, generator: torch.Generator | None) -> None:
        nn.init.eye_(x)
        with torch.no_grad():
            x.mul_(value)

    return fill


def fills(model: nn.Module, *, zero_outputs: bool) -> dict[str, Fill]:
    """The initialisation of every parameter and buffer of the model, by name."""
    stated: dict[str, Fill] = {}
    for path, module in model.named_modules():
        start = f"{path}." if path else ""
        statement: Any = getattr(module, "fills", dict)
        own: Mapping[str, Fill] = statement()
        outputs = getattr(module, "residual_outputs", ()) if zero_outputs else ()
        own = {**own, **dict.fromkeys(outputs, constant(0.0))}
        stated |= {f"{start}{name}": fill for name, fill in own.items()}
    found: dict[str, Fill] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name not in stated and tensor.ndim < 2:
            raise TypeError(f"{name}: its module must state in fills() how it starts")
        found[name] = stated.get(name, truncated_normal)
    return found


def undecayed(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters without weight decay: those of modules with `decays = False`."""
    for module in model.modules():
        if not getattr(module, "decays", True):
            yield from module.parameters()


def multiply_adds(layers: nn.Module) -> int:
    """Multiply-adds per token of all linear maps, without the products of attention."""
    stated: Any = getattr(layers, "multiply_adds", None)
    if stated is not None:
        return int(stated())
    own = layers.weight.numel() if isinstance(layers, nn.Linear) else 0
    return own + sum(multiply_adds(child) for child in layers.children())
