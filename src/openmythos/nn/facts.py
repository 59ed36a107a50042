"""What a module states about itself: initialisation, weight decay, arithmetic.

Whoever initialises, optimises or plans a model asks its modules; nothing else lists their names. A
module without statements is an ordinary one: matrices get a truncated normal of their fan-in and
weight decay, and cost one multiply-add per weight and token.

    fills()            by relative name, how its own parameters and buffers start
    residual_outputs   its maps that write to the residual stream, which may start at zero
    decays             False: its parameters get AdamW without weight decay
    multiply_adds()    per token, where that is not one per weight of its linear maps
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Fill = Callable[[Tensor, torch.Generator | None], None]


def truncated_normal(x: Tensor, generator: torch.Generator | None) -> None:
    """std sqrt(2 / (5 fan_in)), cut at three of them (Parcae, arXiv 2604.12946)."""
    std = math.sqrt(2 / (5 * x.shape[-1]))
    nn.init.trunc_normal_(x, std=std, a=-3 * std, b=3 * std, generator=generator)


def constant(value: float) -> Fill:
    def fill(x: Tensor, generator: torch.Generator | None) -> None:
        nn.init.constant_(x, value)

    return fill


def identity(x: Tensor, generator: torch.Generator | None) -> None:
    """1 per channel, or the identity matrix."""
    nn.init.ones_(x) if x.ndim == 1 else nn.init.eye_(x)


def fills(model: nn.Module, *, zero_outputs: bool) -> dict[str, Fill]:
    """How every parameter and buffer of the model starts, by name."""
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
    """The parameters of all modules that state that theirs do not decay."""
    for module in model.modules():
        if not getattr(module, "decays", True):
            yield from module.parameters()


def multiply_adds(layers: nn.Module) -> int:
    """Per token, outside attention: one for every weight of a linear map that a token meets."""
    stated: Any = getattr(layers, "multiply_adds", None)
    if stated is not None:
        return int(stated())
    own = layers.weight.numel() if isinstance(layers, nn.Linear) else 0
    return own + sum(multiply_adds(child) for child in layers.children())
