"""What the plugin refuses, and settings of an engine that the requests must fit."""

from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from openmythos.config import require
from openmythos.hub.export_config import OpenMythosConfig
from openmythos.hub.export_model import native_config
from openmythos.model.config import MythosConfig
from openmythos.nn.cache import ExactCache, FirstLoopCache
from openmythos.nn.latent_attention import LatentAttention
from openmythos.recurrence.halting import NoHalting
from openmythos_vllm import loops

# Of vLLM's attention for CPUs; it has others for GPUs, but these too.
HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
POLICIES = {"exact": ExactCache, "first": FirstLoopCache}


class CheckedConfig(VerifyAndUpdateConfig):
    """vLLM calls this once for every engine, where its requests arrive."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Raise a ConfigError for what would be wrong or fail later."""
        config = vllm_config.model_config.hf_config
        check_model(config)
        check_engine(vllm_config)
        loops.limit_requests(config.num_loops, shares_prefixes=_shares_prefixes(vllm_config))


def check_model(config: OpenMythosConfig) -> None:
    """Raise a ConfigError for a model, or a cache policy, that the plugin cannot run."""
    native = native_config(config)
    text = "must be 'none' in vLLM, which runs a request's loops at all its positions"
    require(isinstance(native.halting, NoHalting), "halting", native.halting.kind, text)
    text = "must be 'exact' or 'first': with others tokens depend on a prompt's pieces"
    require(cache_policy(config) in POLICIES, "cache_policy", cache_policy(config), text)
    heads(native)


def check_engine(vllm_config: VllmConfig) -> None:
    """Raise a ConfigError for options of vLLM that the plugin does not support."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        size = getattr(parallel, name)
        require(size == 1, name, size, "must be 1: the plugin does not divide a model")
    text = "is not supported by openmythos-vllm"
    require(model.quantization is None, "quantization", model.quantization, text)
    require(not model.enable_prompt_embeds, "enable_prompt_embeds", True, text)
    require(vllm_config.lora_config is None, "enable_lora", True, text)
    # vLLM would silently ignore what requests say about loops.
    speculative = vllm_config.speculative_config
    method = None if speculative is None else speculative.method
    require(speculative is None, "speculative_config.method", method, text)
    text = "must be 0: loops per request need the first model runner"
    require(not vllm_config.use_v2_model_runner, "VLLM_USE_V2_MODEL_RUNNER", 1, text)
    eager = current_platform.is_cpu() or model.enforce_eager
    require(eager, "enforce_eager", False, "must be true: the loops of a batch vary")


def cache_policy(config: OpenMythosConfig) -> Any:
    """The kind of the cache policy that `hf_overrides` may set."""
    return getattr(config, "cache_policy", "exact")


@dataclass(frozen=True)
class Heads:
    """A layer's attention as vLLM computes it."""

    queries: int
    keys: int
    size: int  # the smallest of vLLM's that holds a head of the model
    scale: float


def heads(c: MythosConfig) -> Heads:
    """Latent attention has one head of keys: the latent beside the rotary key."""
    a = c.attention
    if isinstance(a, LatentAttention):
        size = _size("kv_latent_dim + rope_head_dim", a.kv_width(c.dim))
        return Heads(a.num_heads, 1, size, (a.nope_head_dim + a.rope_head_dim) ** -0.5)
    width = a.size(c.dim)
    return Heads(a.num_heads, a.num_kv_heads, _size("head_dim", width), width**-0.5)


def _size(name: str, needed: int) -> int:
    require(needed <= HEAD_SIZES[-1], name, needed, f"must be at most {HEAD_SIZES[-1]} in vLLM")
    return next(size for size in HEAD_SIZES if size >= needed)


def _shares_prefixes(vllm_config: VllmConfig) -> bool:
    """Whether a request may read keys that another one has computed."""
    caches = vllm_config.cache_config.enable_prefix_caching
    return bool(caches) or vllm_config.kv_transfer_config is not None
