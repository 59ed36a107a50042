"""Whether training fits a number of devices of a given memory, and with which settings.

Assumes weights sharded over all devices (FSDP2), all-gather and computation in bf16, and AdamW; see
`distributed.parallelize`. An estimate from the config alone, as in `cost.training_memory`.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from openmythos.config import require_int, require_number
from openmythos.model.config import MythosConfig
from openmythos.nn.moe import MoELayer
from openmythos.planning import cost

USABLE = 0.9  # the rest is for the communication library, fragmentation, and all not counted here
MAX_TRIED = 2**20  # limit of devices and batch: all their divisors are tried
BF16 = torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A step on `gpus` devices: `batch` sequences on each, `micro_batch` of them per pass."""

    gpus: int
    batch: int
    micro_batch: int
    checkpoint_loops: bool
    experts: int = 1  # devices over which the routed experts are sharded

    def overrides(self) -> list[str]:
        """The settings as overrides for `openmythos train`."""
        chosen = [
            "train.precision=bf16",
            f"train.batch_size={self.batch * self.gpus}",
            f"train.micro_batch_size={self.micro_batch}",
            f"train.checkpoint_loops={str(self.checkpoint_loops).lower()}",
        ]
        if self.gpus > 1:
            chosen.append("train.parallel.gather=bf16")
        if self.experts > 1:
            chosen.append(f"train.parallel.experts={self.experts}")
        return chosen


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Bytes of a training step on one device of several.

    `gathered` are full weights in bf16: embedding and head, the largest FSDP unit, and one that is
    prefetched. `reduced` are the gradients of a unit before reduce-scatter, in bf16 and in fp32;
    with several micro-batches those of all units, in fp32.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    reduced: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The settings found; if `fits` is False, those that need the least memory."""

    fits: bool
    settings: Settings
    memory: DeviceMemory
    usable: int


def find(
    config: MythosConfig,
    *,
    gpus: int,
    memory: int,
    context: int | None = None,
    batch: int = 1,
    num_loops: int | None = None,
    backprop_loops: int = 0,
) -> Fit:
    """The fastest settings that fit `batch` sequences per device into `memory` bytes per device.

    Tried in order of their cost in time: smaller micro-batches, activation checkpointing, expert
    parallelism.
    """
    require_int("gpus", gpus, minimum=1, maximum=MAX_TRIED)
    require_int("batch", batch, minimum=1, maximum=MAX_TRIED)
    require_number("memory", float(memory), above=0)
    usable = round(USABLE * memory)
    tried = [
        (settings, device_memory(config, settings, context, num_loops, backprop_loops))
        for settings in _candidates(config, gpus, batch)
    ]
    for settings, needed in tried:
        if needed.total <= usable:
            return Fit(fits=True, settings=settings, memory=needed, usable=usable)
    settings, needed = min(tried, key=lambda pair: pair[1].total)
    return Fit(fits=False, settings=settings, memory=needed, usable=usable)


def _candidates(config: MythosConfig, gpus: int, batch: int) -> Iterator[Settings]:
    layers = [m for m in cost.on_meta(config).modules() if isinstance(m, MoELayer)]
    holders = [
        n
        for n in range(1, gpus + 1)
        if gpus % n == 0
        and (n == 1 or layers)
        and all(m.config.num_experts % n == 0 for m in layers)
    ]
    micro_batches = [n for n in range(batch, 0, -1) if batch % n == 0]
    for experts, checkpoint, size in itertools.product(holders, (False, True), micro_batches):
        yield Settings(
            gpus=gpus, batch=batch, micro_batch=size, checkpoint_loops=checkpoint, experts=experts
        )


def device_memory(
    config: MythosConfig,
    settings: Settings,
    context: int | None = None,
    num_loops: int | None = None,
    backprop_loops: int = 0,
) -> DeviceMemory:
    """Estimate the peak of a step on each device."""
    s = settings
    full = cost.training_memory(
        config,
        batch=s.micro_batch,
        context=config.context if context is None else context,
        num_loops=num_loops,
        backprop_loops=backprop_loops,
        checkpointing=s.checkpoint_loops,
        dtype=BF16,
    )
    total = cost.numel(cost.on_meta(config))
    outside, units = _units(config, s.experts)
    largest, next_largest, *_ = (*sorted(units, reverse=True), 0)
    several = s.gpus > 1
    # On one device, autocast keeps a bf16 copy of every weight.
    copies = outside + largest + next_largest if several else total
    # Gradients are reduced after the last micro-batch; until then every device keeps its own sum.
    summed = outside + sum(units) if s.micro_batch < s.batch else largest
    return DeviceMemory(
        weights=total * cost.FP32 // s.gpus,
        gradients=full.gradients // s.gpus,
        optimizer=full.optimizer // s.gpus,
        gathered=copies * BF16.itemsize,
        reduced=summed * cost.FP32 + largest * BF16.itemsize if several else 0,
        activations=full.activations,
        logits=full.logits,
    )


def _units(config: MythosConfig, experts: int) -> tuple[int, list[int]]:
    """Numbers of weights after the all-gather: outside all FSDP units, and of each unit."""
    model = cost.on_meta(config)
    units = (*model.prelude, model.recurrent, *model.coda)
    outside = cost.numel(model) - sum(map(cost.numel, units))
    return outside, [_unit_size(unit, experts) for unit in units]


def _unit_size(unit: nn.Module, experts: int) -> int:
    routed = sum(cost.numel(m.experts) for m in unit.modules() if isinstance(m, MoELayer))
    return cost.numel(unit) - routed + routed // experts
