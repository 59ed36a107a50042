"""Muon for matrices and stacks of matrices (experts), sharded or not."""

from collections.abc import Iterable, Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from openmythos.kernels.orthogonalize import orthogonalize, takes_stacks


class MuonStep(torch.optim.Optimizer):
    """Steps along the orthogonalised momentum, as torch.optim.Muon does with match_rms_adamw.

    A parameter is a matrix or a stack of matrices (k, m, n), each updated separately. A sharded
    stack has complete matrices on every rank; sharded matrices are redistributed first, see
    `_across_ranks`. `dtype` is that of the orthogonalisation (None: the fast one of the device);
    torch's own Muon uses bf16 on every device.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; a closure is not supported."""
        assert closure is None
        for group in self.param_groups:
            lr, decay = group["lr"], group["weight_decay"]
            for weights in _together(p for p in group["params"] if p.grad is not None):
                rate = 0.2 * sqrt(max(weights[0].shape[-2:])) * lr
                updates = [self._update(weight, group["momentum"]) for weight in weights]
                for weight, along in zip(weights, self._directions(weights, updates), strict=True):
                    _local(weight).mul_(1 - lr * decay).add_(along, alpha=-rate)

    def _update(self, weight: Tensor, momentum: float) -> Tensor:
        """This rank's shard of the Nesterov momentum."""
        assert weight.grad is not None
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight.grad)
        gradient, buffer = _local(weight.grad), _local(state["momentum_buffer"])
        buffer.lerp_(gradient, 1 - momentum)
        return gradient.lerp(buffer, momentum)

    def _directions(self, weights: Sequence[Tensor], updates: list[Tensor]) -> Sequence[Tensor]:
        first = weights[0]
        if isinstance(first, DTensor) and first.ndim == 2:
            return self._across_ranks(first, updates)
        if len(updates) > 1:
            return orthogonalize(torch.stack(updates), self._dtype).unbind()
        return [orthogonalize(update, self._dtype) for update in updates]

    def _across_ranks(self, weight: DTensor, updates: list[Tensor]) -> Sequence[Tensor]:
        """Orthogonalise sharded matrices: an all-to-all gives each rank some complete ones."""
        shape = torch.Size((len(updates), *weight.shape))
        stride = (weight.numel(), weight.shape[1], 1)
        here = [Shard(p.dim + 1) if isinstance(p, Shard) else p for p in weight.placements]
        apart = [Shard(0) if isinstance(p, Shard) else p for p in weight.placements]

        def spread(local: Tensor, placements: list[Any]) -> DTensor:
            return DTensor.from_local(
                local, weight.device_mesh, placements, run_check=False, shape=shape, stride=stride
            )

        whole = spread(torch.stack(updates), here).redistribute(placements=apart).to_local()
        done = spread(orthogonalize(whole, self._dtype).contiguous(), apart)
        return done.redistribute(placements=here).to_local().unbind()


def _together(weights: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Group the weights that are orthogonalised in one batched call."""
    found: dict[Any, list[nn.Parameter]] = {}
    for weight in weights:
        key: Any = id(weight)
        if weight.ndim == 2 and isinstance(weight, DTensor):
            key = (weight.shape, weight.device_mesh, weight.placements)
        elif weight.ndim == 2 and takes_stacks(weight.device):
            key = weight.shape
        found.setdefault(key, []).append(weight)
    return list(found.values())


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x
