"""Optimisers and learning-rate schedules; which parameter gets what, as one table.

| parameters                                              | Muon run | weight decay |
|---------------------------------------------------------|----------|--------------|
| matrices of layers, each expert's matrices              | Muon     | yes          |
| embedding, head                                         | AdamW    | if asked for |
| router weight, LoopLoRA, halting                        | AdamW    | no           |
| norms, decay, step size, input map, loop embedding      | AdamW    | no           |
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from openmythos.config import ConfigError, require_number

_EMBEDDINGS = ("embed.", "head.")
_WITHOUT_DECAY = (
    ".router.",
    ".conditioning.",
    ".halting.",
    ".injection.",
    "norm.",
)


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW for everything (Loshchilov & Hutter 2019)."""

    kind: Literal["adamw"] = "adamw"
    lr: float = 3e-3
    weight_decay: float = 0.1
    decay_embeddings: bool = False
    beta1: float = 0.9
    beta2: float = 0.95

    def __post_init__(self) -> None:
        _check_adam(self.lr, self.weight_decay, self.beta1, self.beta2)

    def build(self, model: nn.Module) -> "Optimizers":
        decayed, plain = _split(model, embeddings=self.decay_embeddings)
        groups = [
            {"params": part, "weight_decay": weight_decay}
            for params, weight_decay in ((decayed, self.weight_decay), (plain, 0.0))
            for part in by_mesh(params)
        ]
        betas = (self.beta1, self.beta2)
        adamw = torch.optim.AdamW(groups, lr=self.lr, betas=betas, fused=True)
        return Optimizers([adamw], _names(model))


@dataclass(frozen=True, kw_only=True)
class Muon:
    """Muon for matrices (Jordan et al. 2024; scaled to AdamW's step, arXiv 2502.16982), AdamW else.

    `lr` is for both, in AdamW's units; `adamw_lr_scale` multiplies it for AdamW's parameters. The
    weight decay falls linearly to `final_decay` times what it is.
    """

    kind: Literal["muon"] = "muon"
    lr: float = 3e-3
    weight_decay: float = 0.1
    final_decay: float = 1.0
    momentum: float = 0.95
    adamw_lr_scale: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95

    def __post_init__(self) -> None:
        _check_adam(self.lr, self.weight_decay, self.beta1, self.beta2)
        require_number("final_decay", self.final_decay, at_least=0)
        require_number("momentum", self.momentum, at_least=0, below=1)
        require_number("adamw_lr_scale", self.adamw_lr_scale, above=0)

    def build(self, model: nn.Module) -> "Optimizers":
        decayed, plain = _split(model)
        views, names = MatrixViews(decayed), _names(model)
        for weight, matrices in views.items():
            numbers = range(_first_matrix(weight), weight.shape[0])
            named = zip(matrices, numbers, strict=False)
            names |= {id(matrix): f"{names[id(weight)]}.{number}" for matrix, number in named}
        muon = torch.optim.Muon(
            views.matrices,
            lr=self.lr,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        adamw = torch.optim.AdamW(
            [{"params": part} for part in by_mesh(plain)],
            lr=self.lr * self.adamw_lr_scale,
            betas=(self.beta1, self.beta2),
            weight_decay=0.0,
            fused=True,
        )
        return Optimizers([muon, adamw], names, views, final_decay=self.final_decay)


Optimizer = AdamW | Muon


class MatrixViews:
    """Each matrix of stacked weights as a parameter: torch's Muon takes only matrices."""

    def __init__(self, stacked: Iterable[nn.Parameter]) -> None:
        self._stacked = list(stacked)
        self._parts = [
            [nn.Parameter(part) for part in _matrices(weight.data)] for weight in self._stacked
        ]
        self.matrices = [part for parts in self._parts for part in parts]

    def items(self) -> Iterable[tuple[nn.Parameter, list[nn.Parameter]]]:
        """Each stack with its matrices."""
        return zip(self._stacked, self._parts, strict=True)

    def take_gradients(self) -> None:
        """Point the views' gradients at their share of the stacked gradients."""
        matrices = iter(self.matrices)
        for weight, parts in zip(self._stacked, self._parts, strict=True):
            gradients = [None] * len(parts) if weight.grad is None else _matrices(weight.grad)
            for gradient in gradients:
                next(matrices).grad = gradient


def _matrices(weight: Tensor) -> list[Tensor]:
    """Of a stack in shards the matrices of this rank, which are whole; a matrix stays in shards."""
    if weight.ndim == 2:
        return [weight]
    if isinstance(weight, DTensor):
        weight = weight.to_local()
    return list(weight.flatten(0, -3).unbind())


def _first_matrix(weight: Tensor) -> int:
    """Which of a stack's matrices is this rank's first."""
    if weight.ndim == 2 or not isinstance(weight, DTensor):
        return 0
    _, offset = compute_local_shape_and_global_offset(
        weight.shape, weight.device_mesh, weight.placements
    )
    return offset[0]


class Optimizers:
    """One or more optimisers stepped together, with learning rates scaled by a schedule.

    `names` has the name of every parameter by its id: the state is saved under them.
    """

    def __init__(
        self,
        optimizers: list[torch.optim.Optimizer],
        names: dict[int, str],
        views: MatrixViews | None = None,
        *,
        final_decay: float = 1.0,
    ) -> None:
        self._optimizers = optimizers
        self._names = names
        self._views = views
        self._final_decay = final_decay
        self._base = [
            [(group["lr"], group["weight_decay"]) for group in o.param_groups] for o in optimizers
        ]

    def step(self, scale: float, progress: float = 0.0) -> None:
        """Update with every learning rate times `scale`; `progress` is the share of steps done."""
        decay_scale = 1 - (1 - self._final_decay) * progress
        if self._views is not None:
            self._views.take_gradients()
        for optimizer, base in zip(self._optimizers, self._base, strict=True):
            for group, (lr, decay) in zip(optimizer.param_groups, base, strict=True):
                group["lr"], group["weight_decay"] = lr * scale, decay * decay_scale
            optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """The whole state, by parameter and field: "embed.weight.exp_avg"."""
        return {
            f"{self._names[id(parameter)]}.{field}": value
            for optimizer in self._optimizers
            for parameter, state in optimizer.state.items()
            for field, value in state.items()
        }

    def expect(self, names: Iterable[str]) -> None:
        """Make room for state of these names, as `tensors` has them, to be loaded into."""
        fields: dict[str, list[str]] = {}
        own = {self._names[id(parameter)] for _, parameter in self._parameters()}
        views = () if self._views is None else self._views.items()
        stacks = {self._names[id(weight)] for weight, _ in views}
        for name in names:
            parameter_name, _, field = name.rpartition(".")
            stack, _, number = parameter_name.rpartition(".")
            # A matrix of a stack may be another rank's, and so may all of them.
            elsewhere = number.isdigit() and stack in stacks
            if parameter_name not in own and not elsewhere:
                raise ConfigError(f"optimizer: has no place for the saved {name}; was it another?")
            fields.setdefault(parameter_name, []).append(field)
        for optimizer, parameter in self._parameters():
            for field in fields.get(self._names[id(parameter)], ()):
                # All is of the parameter's shape but the number of steps.
                room = (
                    torch.zeros((), device=parameter.device)
                    if field == "step"
                    else torch.zeros_like(parameter)
                )
                optimizer.state[parameter][field] = room

    def _parameters(self) -> Iterator[tuple[torch.optim.Optimizer, nn.Parameter]]:
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                yield from ((optimizer, parameter) for parameter in group["params"])


def by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters in lists of one mesh each: torch's operators on lists take no other."""
    found: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        found.setdefault(mesh, []).append(parameter)
    return list(found.values())


def _names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}


def _split(
    model: nn.Module, *, embeddings: bool = False
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(parameters with weight decay, the others)."""
    without = _WITHOUT_DECAY if embeddings else (*_EMBEDDINGS, *_WITHOUT_DECAY)
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and not any(part in name for part in without)
        (decayed if is_matrix else plain).append(parameter)
    return decayed, plain


def _check_adam(lr: float, weight_decay: float, beta1: float, beta2: float) -> None:
    require_number("lr", lr, above=0)
    require_number("weight_decay", weight_decay, at_least=0)
    require_number("beta1", beta1, at_least=0, below=1)
    require_number("beta2", beta2, at_least=0, below=1)


@dataclass(frozen=True, kw_only=True)
class _Warmup:
    """`warmup` and `decay` are shares of all steps; the rate ends at `final` times its peak."""

    warmup: float = 0.02
    final: float = 0.05

    def __post_init__(self) -> None:
        require_number("warmup", self.warmup, at_least=0, below=1)
        require_number("final", self.final, at_least=0, at_most=1)

    def scale(self, step: int, num_steps: int) -> float:
        """Factor on the learning rate for the update of step 0 ... num_steps - 1."""
        warmup_steps = self.warmup * num_steps
        if step + 1 < warmup_steps:
            return (step + 1) / warmup_steps
        return self.final + (1 - self.final) * self.shape((step + 1) / num_steps)

    def since_warmup(self, progress: float) -> float:
        """Share of the steps behind the warmup."""
        return max(0.0, (progress - self.warmup) / (1 - self.warmup))

    def shape(self, progress: float) -> float:
        raise TypeError(f"{type(self).__name__} must define shape")


@dataclass(frozen=True, kw_only=True)
class WSD(_Warmup):
    """Warm up, stay, decay linearly over the last `decay` share (arXiv 2404.06395)."""

    kind: Literal["wsd"] = "wsd"
    decay: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("decay", self.decay, above=0, at_most=1)

    def shape(self, progress: float) -> float:
        return min(1.0, (1 - progress) / self.decay)


@dataclass(frozen=True, kw_only=True)
class Cosine(_Warmup):
    """Warm up, then half a cosine to the end."""

    kind: Literal["cosine"] = "cosine"

    def shape(self, progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * self.since_warmup(progress)))


@dataclass(frozen=True, kw_only=True)
class Linear(_Warmup):
    """Warm up, then fall linearly to the end."""

    kind: Literal["linear"] = "linear"

    def shape(self, progress: float) -> float:
        return 1 - self.since_warmup(progress)


@dataclass(frozen=True, kw_only=True)
class Constant(_Warmup):
    """Warm up, then stay."""

    kind: Literal["constant"] = "constant"

    def shape(self, progress: float) -> float:
        return 1.0


Schedule = WSD | Cosine | Linear | Constant
