"""What a config costs before anybody pays for it: parameters, cache, arithmetic, training memory.

Everything is computed from the config alone, for a trillion parameters as fast as for a thousand.
Counts of weights come from the module itself, built on the meta device, so that they cannot drift
from the model. Memory of activations is an estimate; the rest is exact.
"""

from dataclasses import dataclass
from typing import Literal, assert_never

import torch
from torch import nn

from openmythos.config import require, require_int
from openmythos.model.config import MythosConfig
from openmythos.model.mythos import OpenMythos
from openmythos.nn.attention import GroupedQueryAttention
from openmythos.nn.block import Attention, FeedForward
from openmythos.nn.cache import CachePolicy, ExactCache, LastLoopCache
from openmythos.nn.feed_forward import ReLU2, SwiGLU
from openmythos.nn.latent_attention import LatentAttention
from openmythos.nn.linear import Linear
from openmythos.nn.moe import Experts, MoE, Router

Optimizer = Literal["adamw", "muon"]
FP32 = 4


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Numbers of weights. The parts from `embedding` to `head` add up to `total`.

    `active` are those that one token meets: of the routed experts top_k / num_experts, of all else
    everything, the deltas of every loop and the whole embedding included. A tied head is 0.
    """

    total: int
    active: int
    embedding: int
    prelude: int
    recurrent: int
    coda: int
    norm: int
    head: int
    routed_experts: int  # of the parts above
    loop_lora: int  # of `recurrent`


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes on one device at the peak of a training step, without sharding."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All costs of a config for one choice of context, batch and loops.

    `dtype` is that of inference, of the cache and of the activations in training. FLOPs are per
    token; `checkpointed` is the memory with every loop recomputed in the backward pass.
    """

    context: int
    batch: int
    num_loops: int
    backprop_loops: int
    dtype: torch.dtype
    effective_depth: int
    parameters: ParameterCount
    weight_bytes: int
    cache_bytes: int  # one slot per loop: exact
    shared_cache_bytes: int  # one slot for all loops
    forward_flops: int
    training_flops: int
    training: TrainingMemory
    checkpointed: TrainingMemory


def plan(
    config: MythosConfig,
    *,
    context: int | None = None,
    batch: int = 1,
    num_loops: int | None = None,
    backprop_loops: int = 0,
    optimizer: Optimizer = "adamw",
    dtype: torch.dtype = torch.bfloat16,
) -> Plan:
    """Everything this file can say; context and num_loops default to the config's."""
    context = config.context if context is None else context
    loops = config.num_loops if num_loops is None else num_loops
    count = parameters(config)

    def cache(policy: CachePolicy) -> int:
        return cache_bytes(
            config, context=context, batch=batch, num_loops=loops, dtype=dtype, policy=policy
        )

    def training(checkpointing: bool) -> TrainingMemory:
        return training_memory(
            config,
            batch=batch,
            context=context,
            num_loops=loops,
            backprop_loops=backprop_loops,
            checkpointing=checkpointing,
            optimizer=optimizer,
            dtype=dtype,
        )

    return Plan(
        context=context,
        batch=batch,
        num_loops=loops,
        backprop_loops=_grad_loops(loops, backprop_loops),
        dtype=dtype,
        effective_depth=config.effective_depth(loops),
        parameters=count,
        weight_bytes=count.total * dtype.itemsize,
        cache_bytes=cache(ExactCache()),
        shared_cache_bytes=cache(LastLoopCache()),
        forward_flops=forward_flops_per_token(config, num_loops=loops, context=context),
        training_flops=training_flops_per_token(
            config, num_loops=loops, backprop_loops=backprop_loops, context=context
        ),
        training=training(False),
        checkpointed=training(True),
    )


def parameters(config: MythosConfig) -> ParameterCount:
    """Count the weights of the model that the config describes."""
    model = _on_meta(config)
    routed = active = 0
    for module in model.modules():
        if isinstance(module, Experts):
            routed += _numel(module)
            active += _per_token(module, config)
    total = _numel(model)
    lora = model.recurrent.conditioning.lora
    return ParameterCount(
        total=total,
        active=total - routed + active,
        embedding=_numel(model.embed),
        prelude=_numel(model.prelude),
        recurrent=_numel(model.recurrent),
        coda=_numel(model.coda),
        norm=_numel(model.norm),
        head=0 if model.head is None else _numel(model.head),
        routed_experts=routed,
        loop_lora=0 if lora is None else _numel(lora),
    )


def _on_meta(config: MythosConfig) -> OpenMythos:
    with torch.device("meta"):
        return OpenMythos(config)


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
