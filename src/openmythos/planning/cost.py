"""Costs of a config before it is built: parameters, KV cache, FLOPs, training memory.

All follow from the config and take no longer for larger models. Weights are counted on the module
itself, built on the meta device, so that the counts cannot drift from the model. Training memory
is an estimate, the rest is exact.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

import torch
from torch import nn

from openmythos import kernels
from openmythos.config import require_int
from openmythos.model.config import MAX_SIZE, MythosConfig
from openmythos.model.mythos import OpenMythos
from openmythos.nn.block import FeedForward
from openmythos.nn.cache import CachePolicy, ExactCache, LastLoopCache
from openmythos.nn.facts import multiply_adds
from openmythos.nn.moe import MoELayer
from openmythos.recurrence.conditioning import LoopDeltas

Optimizer = Literal["adamw", "muon"]
FP32 = 4


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Numbers of weights. The parts from `embedding` to `head` add up to `total`; a tied head is 0.

    `active` counts the routed experts at top_k / num_experts and all other weights in full,
    including the embedding and the LoRA deltas of every loop.
    """

    total: int
    active: int
    embedding: int
    prelude: int
    recurrent: int
    coda: int
    norm: int
    head: int
    routed_experts: int  # included in the parts above
    loop_lora: int  # included in `recurrent`


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes of a training step on one device, without sharding.

    `total` is the peak without activation checkpointing, and an upper bound with it: the logits are
    freed before the first loop is recomputed.
    """

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
    token; `checkpointed` is the memory with activation checkpointing of every loop.
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
    """All costs of a config; context and num_loops default to its own."""
    context = config.context if context is None else context
    loops = config.num_loops if num_loops is None else num_loops
    for name, value in (("context", context), ("batch", batch), ("num_loops", loops)):
        require_int(name, value, minimum=1, maximum=MAX_SIZE)
    require_int("backprop_loops", backprop_loops, minimum=0)
    count, flops = parameters(config), Flops(config, context)
    cache = partial(cache_bytes, config, context=context, batch=batch, num_loops=loops, dtype=dtype)
    training = partial(
        training_memory,
        config,
        batch=batch,
        context=context,
        num_loops=loops,
        backprop_loops=backprop_loops,
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
        cache_bytes=cache(policy=ExactCache()),
        shared_cache_bytes=cache(policy=LastLoopCache()),
        forward_flops=flops.forward(loops),
        training_flops=round(flops.training(loops, backprop_loops)),
        training=training(checkpointing=False),
        checkpointed=training(checkpointing=True),
    )


def parameters(config: MythosConfig) -> ParameterCount:
    """Count the weights of the model that the config describes."""
    model = on_meta(config)
    mixtures = [module for module in model.modules() if isinstance(module, MoELayer)]
    routed = sum(numel(mixture.experts) for mixture in mixtures)
    total = numel(model)
    lora = model.recurrent.conditioning.lora
    return ParameterCount(
        total=total,
        active=total - routed + sum(mixture.active_weights() for mixture in mixtures),
        embedding=numel(model.embed),
        prelude=numel(model.prelude),
        recurrent=numel(model.recurrent),
        coda=numel(model.coda),
        norm=numel(model.norm),
        head=0 if model.head is None else numel(model.head),
        routed_experts=routed,
        loop_lora=0 if lora is None else numel(lora),
    )


def cache_bytes(
    config: MythosConfig,
    *,
    context: int,
    batch: int = 1,
    num_loops: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    policy: CachePolicy | None = None,
) -> int:
    """Keys and values of a full cache: kv_width numbers per token and slot.

    A prelude or coda layer has one slot, a recurrent one as many as the policy (default: exact)
    needs for num_loops.
    """
    loops = config.num_loops if num_loops is None else num_loops
    policy = ExactCache() if policy is None else policy
    slots = config.effective_depth(policy.slot(loops - 1) + 1)
    width = config.attention.kv_width(config.dim)
    return slots * batch * context * width * dtype.itemsize


class Flops:
    """2 x multiply-adds of the matrix products, per token of a sequence of `context` tokens.

    Causal attention is counted half: a token sees context / 2 others on average. Latent attention
    is counted by its naive path, which training and prefill take. Recomputation by activation
    checkpointing is not counted.
    """

    def __init__(self, config: MythosConfig, context: int) -> None:
        model, c = on_meta(config), config
        recurrent, lora = model.recurrent, model.recurrent.conditioning.lora
        outside = (model.prelude, recurrent.readout_map, model.coda)
        once = sum(map(multiply_adds, outside)) + c.vocab_size * c.dim
        once += recurrent.injection.maps_once()
        per_loop = multiply_adds(recurrent.layers) + recurrent.injection.maps_per_loop()
        per_loop += 0 if lora is None else lora.multiply_adds()
        window = min(c.attention.window or context, context)
        visible = window - window**2 / (2 * context)
        attention = visible * c.attention.multiply_adds_per_key(c.dim)
        outer = c.prelude_layers + c.coda_layers
        self._once = 2 * (once + outer * attention)
        self._per_loop = 2 * (per_loop + c.recurrent_layers * attention)

    def forward(self, num_loops: int) -> int:
        """Of a forward pass."""
        return round(self._once + num_loops * self._per_loop)

    def training(self, num_loops: int, backprop_loops: int = 0) -> float:
        """Forward and backward; the latter costs twice the former wherever gradient flows."""
        passes = num_loops + 2 * _grad_loops(num_loops, backprop_loops)
        return 3 * self._once + passes * self._per_loop


def training_memory(
    config: MythosConfig,
    *,
    batch: int,
    context: int,
    num_loops: int | None = None,
    backprop_loops: int = 0,
    checkpointing: bool = False,
    optimizer: Optimizer = "adamw",
    dtype: torch.dtype = torch.bfloat16,
) -> TrainingMemory:
    """Estimate the peak of a step; weights are fp32, `dtype` is what autocast computes in.

    weights      fp32, and a copy in `dtype` if that is another
    gradients    fp32
    optimizer    fp32; adamw: two moments, muon: one for the matrices of the layers, else two
    activations  what autograd keeps per token (`_layer_bytes`) and the state of every loop; loops
                 without gradient keep nothing; with checkpointing, one loop at a time is kept
    logits       of one chunk of the loss, as on an accelerator: one matrix in `dtype`, two in fp32
    """
    model, c, size = on_meta(config), config, dtype.itemsize
    total = numel(model)
    loops = _grad_loops(c.num_loops if num_loops is None else num_loops, backprop_loops)
    outer = c.prelude_layers + c.coda_layers
    # The norms before the loops and before the head keep their inputs, others their outputs.
    once = outer * _layer_bytes(c, c.feed_forward, size) + 2 * c.dim * (FP32 + size)
    inside = c.recurrent_layers * _layer_bytes(c, c.recurrent_feed_forward, size)
    per_token = once + loops * c.dim * FP32 + (1 if checkpointing else loops) * inside
    return TrainingMemory(
        weights=total * (FP32 + (size if dtype != torch.float32 else 0)),
        gradients=total * FP32,
        optimizer=FP32 * (2 * total - (_matrix_numel(model) if optimizer == "muon" else 0)),
        activations=batch * context * per_token,
        logits=min(batch * context, kernels.ACCELERATOR.chunk_tokens)
        * c.vocab_size
        * (size + 2 * FP32),
    )


def _grad_loops(num_loops: int, backprop_loops: int) -> int:
    return min(num_loops, backprop_loops) if backprop_loops else num_loops


@lru_cache(maxsize=4)
def on_meta(config: MythosConfig) -> OpenMythos:
    """The model on the meta device: shapes without values."""
    with torch.device("meta"):
        return OpenMythos(config)


def numel(module: nn.Module | LoopDeltas) -> int:
    """The number of weights of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def _matrix_numel(model: OpenMythos) -> int:
    layers = (model.prelude, model.recurrent.layers, model.coda)
    return sum(p.numel() for part in layers for p in part.parameters() if p.ndim >= 2)


def _layer_bytes(config: MythosConfig, feed_forward: FeedForward, size: int) -> int:
    """Bytes per token that one layer keeps for its backward pass.

    Residual stream (inputs of both norms) in fp32, their outputs in the dtype of `size` bytes.
    """
    narrow, wide = feed_forward.kept_numbers(config.dim, cast=size < FP32)
    norms = 2 * len(config.block_norms) * config.dim
    narrow += norms + config.attention.kept_numbers(config.dim)
    return narrow * size + (norms + wide) * FP32
