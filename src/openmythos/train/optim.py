"""Optimisers and learning-rate schedules; which parameter gets what, as one table.

| parameters                                              | Muon run | weight decay |
|---------------------------------------------------------|----------|--------------|
| matrices of layers, each expert's matrices              | Muon     | yes          |
| embedding, head                                         | AdamW    | if asked for |
| router weight, LoopLoRA, halting                        | AdamW    | no           |
| norms, decay, step size, input map, loop embedding      | AdamW    | no           |
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset as local_part

from openmythos.config import ConfigError, require_number
from openmythos.distributed.parallelize import by_mesh
from openmythos.nn.facts import undecayed
from openmythos.train.muon import MuonStep

_EMBEDDINGS = ("embed.", "head.")
# Above any useful value, and far below an overflow of its product with a weight.
_MAX_DECAY = 1000.0


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

    def build(self, model: nn.Module, dtype: torch.dtype | None = None) -> "Optimizers":
        """`dtype` has no effect (see `Muon.build`): AdamW computes in the dtype of the weights."""
        decayed, plain = _split(model, embeddings=self.decay_embeddings)
        groups: list[dict[str, Any]] = [{"params": part} for part in by_mesh(decayed)]
        groups += [{"params": part, "weight_decay": 0.0} for part in by_mesh(plain)]
        betas, decay = (self.beta1, self.beta2), self.weight_decay
        adamw = torch.optim.AdamW(groups, self.lr, betas, weight_decay=decay, fused=True)
        return Optimizers([adamw], model)


@dataclass(frozen=True, kw_only=True)
class Muon:
    """Muon for matrices (Jordan et al. 2024; scaled to AdamW's step, arXiv 2502.16982), AdamW else.

    Both use `lr`, in AdamW's units; `adamw_lr_scale` multiplies it for AdamW's parameters. The
    weight decay changes linearly to `final_decay` times its initial value.
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
        require_number("final_decay", self.final_decay, at_least=0, at_most=_MAX_DECAY)
        require_number("momentum", self.momentum, at_least=0, below=1)
        require_number("adamw_lr_scale", self.adamw_lr_scale, above=0)

    def build(self, model: nn.Module, dtype: torch.dtype | None = None) -> "Optimizers":
        """`dtype` is that of the orthogonalisation (None: the fast one of the device)."""
        decayed, plain = _split(model)
        muon = MuonStep(
            decayed,
            lr=self.lr,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            dtype=dtype,
        )
        groups = [{"params": part} for part in by_mesh(plain)]
        lr, betas = self.lr * self.adamw_lr_scale, (self.beta1, self.beta2)
        adamw = torch.optim.AdamW(groups, lr, betas, weight_decay=0.0, fused=True)
        return Optimizers([muon, adamw], model, final_decay=self.final_decay)


Optimizer = AdamW | Muon


def _matrices(weight: Tensor, stacked: Tensor) -> dict[int, Tensor]:
    """The local matrices of a stack by their global index; views, not copies."""
    first = 0
    if isinstance(weight, DTensor):
        first = local_part(weight.shape, weight.device_mesh, weight.placements)[1][0]
    local = stacked.to_local() if isinstance(stacked, DTensor) else stacked
    return dict(enumerate(local.unbind(), first))


class Optimizers:
    """One or more optimisers stepped together, with learning rates scaled by a schedule."""

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        model: nn.Module,
        *,
        final_decay: float = 1.0,
    ) -> None:
        self._optimizers, self._final_decay = optimizers, final_decay
        names = {parameter: name for name, parameter in model.named_parameters()}
        self._homes = {
            names[parameter]: (optimizer, parameter)
            for optimizer in optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        self._base = [
            (group, group["lr"], group["weight_decay"])
            for optimizer in optimizers
            for group in optimizer.param_groups
        ]

    def step(self, scale: float, progress: float = 0.0) -> None:
        """Update with every learning rate times `scale`; `progress` is the share of steps done."""
        decay_scale = 1 - (1 - self._final_decay) * progress
        for group, lr, decay in self._base:
            group["lr"], group["weight_decay"] = lr * scale, decay * decay_scale
        for optimizer in self._optimizers:
            optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """The whole state, by parameter and field: "embed.weight.exp_avg".

        Muon's state of a stack is split by matrix: "experts.down.0.momentum_buffer".
        """
        found: dict[str, Tensor] = {}
        for name, (optimizer, parameter) in self._homes.items():
            for field, value in optimizer.state.get(parameter, {}).items():
                if _saved_by_matrix(optimizer, parameter):
                    parts = _matrices(parameter, value)
                    found |= {f"{name}.{number}.{field}": x for number, x in parts.items()}
                else:
                    found[f"{name}.{field}"] = value
        return found

    def allocate_state(self, names: Iterable[str]) -> None:
        """Allocate the state of these names (see `tensors`) so that it can be loaded in place."""
        for name in names:
            home, _, field = name.rpartition(".")
            by_matrix = home not in self._homes
            if by_matrix:
                home = home.rpartition(".")[0]
            found = self._homes.get(home)
            if found is None or not _keeps(*found, field, by_matrix=by_matrix):
                raise ConfigError(f"optimizer: has no place for the saved {name}; was it another?")
            optimizer, parameter = found
            # Every field has the parameter's shape, except the number of steps.
            if field not in optimizer.state[parameter]:
                one = torch.zeros((), device=parameter.device)
                empty = one if field == "step" else torch.zeros_like(parameter)
                optimizer.state[parameter][field] = empty


def _keeps(
    optimizer: torch.optim.Optimizer, parameter: Tensor, field: str, *, by_matrix: bool
) -> bool:
    """Whether an optimizer saves this field of the state of a parameter."""
    is_muon = isinstance(optimizer, MuonStep)
    fields = ("momentum_buffer",) if is_muon else ("step", "exp_avg", "exp_avg_sq")
    return field in fields and by_matrix == _saved_by_matrix(optimizer, parameter)


def _saved_by_matrix(optimizer: torch.optim.Optimizer, parameter: Tensor) -> bool:
    return isinstance(optimizer, MuonStep) and parameter.ndim > 2


def _split(
    model: nn.Module, *, embeddings: bool = False
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(parameters with weight decay, the others)."""
    without = {id(parameter) for parameter in undecayed(model)}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and id(parameter) not in without
        is_matrix = is_matrix and (embeddings or not name.startswith(_EMBEDDINGS))
        (decayed if is_matrix else plain).append(parameter)
    return decayed, plain


def _check_adam(lr: float, weight_decay: float, beta1: float, beta2: float) -> None:
    require_number("lr", lr, above=0, below=math.inf)
    require_number("weight_decay", weight_decay, at_least=0, at_most=_MAX_DECAY)
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
        """The rate after the warmup, from 1 at its peak to 0 at `final`."""
        raise NotImplementedError


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
