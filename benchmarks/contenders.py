"""The models that `bench.py` times: this project's and its peers', behind one interface.

A contender has the shapes of a `Workload` and runs all its loops. The table omits what a peer does
not support. Peers are imported only here and only when they are timed.
"""

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openmythos import MythosConfig, OpenMythos
from openmythos.inference import generation
from openmythos.machine import Precision, autocast
from openmythos.nn.feed_forward import SwiGLU
from openmythos.nn.latent_attention import LatentAttention
from openmythos.nn.moe import MoE
from openmythos.recurrence.loop_lora import LoopLoRA


@dataclass(frozen=True)
class Workload:
    """Shapes common to all contenders; `shared_dim` is the total width of the shared experts."""

    name: str
    dim: int
    heads: int
    kv_latent: int
    q_latent: int
    rope: int
    nope: int
    value: int
    experts: int
    top_k: int
    shared_dim: int
    expert_dim: int
    loops: int
    batch: int
    seq: int
    vocab: int = 4096
    context: int = 2048

    @property
    def dense_dim(self) -> int:
        return self.dim * 4 // 3

    def config(self) -> MythosConfig:
        return MythosConfig(
            vocab_size=self.vocab,
            dim=self.dim,
            context=self.context,
            prelude_layers=1,
            coda_layers=1,
            num_loops=self.loops,
            attention=LatentAttention(
                num_heads=self.heads,
                kv_latent_dim=self.kv_latent,
                q_latent_dim=self.q_latent,
                nope_head_dim=self.nope,
                rope_head_dim=self.rope,
                value_head_dim=self.value,
            ),
            feed_forward=SwiGLU(hidden_dim=self.dense_dim),
            recurrent_feed_forward=MoE(
                num_experts=self.experts,
                top_k=self.top_k,
                expert_dim=self.expert_dim,
                num_shared_experts=self.shared_dim // self.expert_dim,
                score="softmax",
            ),
            loop_lora=LoopLoRA(rank=16, num_loops=self.loops, targets=("attention.output",)),
        )


S = Workload("S", 256, 8, 64, 128, 16, 32, 32, 16, 2, 256, 128, 4, 8, 256)
M = Workload("M", 512, 8, 128, 256, 32, 64, 64, 64, 4, 2048, 256, 8, 2, 512)
WORKLOADS = {"S": S, "M": M}
GPU_SIZES = {"S": replace(S, batch=32, seq=1024), "M": replace(M, batch=16, seq=1024)}


class Contender(ABC):
    """One model with its optimizer. Times are taken around these methods."""

    name: str
    model: nn.Module

    def to(self, device: torch.device) -> None:
        """Move the model to a device, before anything else is called."""
        self.model.to(device)

    def start_training(self) -> None:
        """Set up fused AdamW, the same optimizer for all contenders."""
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def train_step(self, tokens: Tensor, targets: Tensor) -> None:
        self.loss(tokens, targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @abstractmethod
    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor: ...

    @abstractmethod
    def forward(self, tokens: Tensor) -> Tensor: ...

    @abstractmethod
    def prefill(self, tokens: Tensor, room: int) -> Any:
        """Fill a new cache that has `room` for more tokens, as the model's own `generate` does.

        Computes logits of the last token only; the reference computes those of all tokens.
        """

    @abstractmethod
    def decode(self, cache: Any, tokens: Tensor) -> None:
        """Compute the logits of one more token, [batch, 1], and add it to the cache."""

    @abstractmethod
    def cache_bytes(self, cache: Any) -> int:
        """Bytes of all keys and values that a cache holds."""


class Ours(Contender):
    """OpenMythos in fp32, or in bf16: trained with autocast, served with bf16 weights."""

    def __init__(self, workload: Workload, precision: Precision, *, compiled: bool = False) -> None:
        self.name = f"openmythos {precision}" + (" compiled" if compiled else "")
        self.loops, self.precision, self.compiled = workload.loops, precision, compiled
        self.request = generation.Request(num_loops=workload.loops)
        self.served: OpenMythos | None = None
        self.model = OpenMythos(workload.config(), seed=0)
        if compiled:
            # This process uses more shapes and modes than training or serving would.
            torch._dynamo.config.recompile_limit = 64
            self.model.compile_layers()

    def _served(self) -> OpenMythos:
        if self.precision == "fp32":
            return self.model
        if self.served is None:
            self.served = OpenMythos(self.model.config, seed=0).eval()
            self.served.to(self.model.device, torch.bfloat16)
            if self.compiled:
                self.served.compile_layers()
        return self.served

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        with autocast(self.precision, tokens.device):
            return self.model.losses(tokens, targets, num_loops=self.loops).cross_entropy

    def forward(self, tokens: Tensor) -> Tensor:
        return self._served()(tokens, num_loops=self.loops).logits

    def prefill(self, tokens: Tensor, room: int) -> Any:
        (batch, seq), model = tokens.shape, self._served()
        cache = model.new_cache(batch, seq + room, num_loops=self.loops)
        generation.prefill(model, tokens, self.request, cache)
        return cache

    def decode(self, cache: Any, tokens: Tensor) -> None:
        generation.decode_one_token(self._served(), tokens[:, 0], self.request, cache)

    def cache_bytes(self, cache: Any) -> int:
        return cache.nbytes


class Reference(Contender):
    """open-mythos 0.5.0. Its halting threshold is unreachable, so that all loops run.

    In bf16 it computes under autocast: its rotations are complex numbers, which have no bf16.
    """

    name = "open-mythos 0.5.0"

    def __init__(self, workload: Workload, precision: Precision = "fp32") -> None:
        from open_mythos.main import MythosConfig as Config
        from open_mythos.main import OpenMythos as Model

        w = workload
        torch.manual_seed(0)
        self.loops, self.precision = w.loops, precision
        config = Config(
            vocab_size=w.vocab,
            dim=w.dim,
            n_heads=w.heads,
            max_seq_len=w.context,
            max_loop_iters=w.loops,
            prelude_layers=1,
            coda_layers=1,
            attn_type="mla",
            kv_lora_rank=w.kv_latent,
            q_lora_rank=w.q_latent,
            qk_rope_head_dim=w.rope,
            qk_nope_head_dim=w.nope,
            v_head_dim=w.value,
            n_experts=w.experts,
            n_experts_per_tok=w.top_k,
            n_shared_experts=w.shared_dim // (w.expert_dim * w.top_k),
            expert_dim=w.expert_dim,
            act_threshold=1e9,
        )
        self.model = Model(config)

    def _logits(self, tokens: Tensor, **words: Any) -> Tensor:
        with autocast(self.precision, tokens.device):
            logits: Tensor = self.model(tokens, n_loops=self.loops, **words)
        return logits

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        with autocast(self.precision, tokens.device):
            return F.cross_entropy(self._logits(tokens).flatten(0, 1), targets.flatten())

    def forward(self, tokens: Tensor) -> Tensor:
        return self._logits(tokens)

    def prefill(self, tokens: Tensor, room: int) -> Any:
        cache: dict[str, Any] = {}
        self._logits(tokens, kv_cache=cache)
        return cache

    def decode(self, cache: Any, tokens: Tensor) -> None:
        start = next(iter(cache["prelude_0"].values())).shape[1]
        self._logits(tokens, kv_cache=cache, start_pos=start)

    def cache_bytes(self, cache: Any) -> int:
        return sum(t.nbytes for slot in cache.values() for t in slot.values())


class DeepSeek(Contender):
    """DeepSeek-V3 of `transformers`, not looped, with as many layers as the others execute."""

    name = "transformers DeepSeek-V3"

    def __init__(self, workload: Workload) -> None:
        from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

        w = workload
        torch.manual_seed(0)
        config = DeepseekV3Config(
            vocab_size=w.vocab,
            hidden_size=w.dim,
            intermediate_size=w.dense_dim,
            moe_intermediate_size=w.expert_dim,
            num_hidden_layers=w.loops + 2,
            first_k_dense_replace=2,
            num_attention_heads=w.heads,
            num_key_value_heads=w.heads,
            n_routed_experts=w.experts,
            num_experts_per_tok=w.top_k,
            n_shared_experts=w.shared_dim // w.expert_dim,
            n_group=1,
            topk_group=1,
            kv_lora_rank=w.kv_latent,
            q_lora_rank=w.q_latent,
            qk_rope_head_dim=w.rope,
            qk_nope_head_dim=w.nope,
            v_head_dim=w.value,
            max_position_embeddings=w.context,
            tie_word_embeddings=True,
            attn_implementation="sdpa",
            experts_implementation="grouped_mm",
        )
        self.model = DeepseekV3ForCausalLM(config)
        # The argument was renamed in transformers 5.24.
        known = inspect.signature(self.model.forward).parameters
        self._cache_name = "cache" if "cache" in known else "past_key_values"

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = self.model(tokens, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=False).logits

    def prefill(self, tokens: Tensor, room: int) -> Any:
        return self.model(tokens, use_cache=True, logits_to_keep=1)[self._cache_name]

    def decode(self, cache: Any, tokens: Tensor) -> None:
        self.model(tokens, use_cache=True, **{self._cache_name: cache})

    def cache_bytes(self, cache: Any) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


CONTENDERS = {
    "openmythos-fp32": lambda workload: Ours(workload, "fp32"),
    "openmythos-bf16": lambda workload: Ours(workload, "bf16"),
    "openmythos-compiled": lambda workload: Ours(workload, "fp32", compiled=True),
    "openmythos-bf16-compiled": lambda workload: Ours(workload, "bf16", compiled=True),
    "open-mythos": Reference,
    "open-mythos-bf16": lambda workload: Reference(workload, "bf16"),
    "deepseek-v3": DeepSeek,
}
OURS = tuple(name for name in CONTENDERS if name.startswith("openmythos"))
CPU_CONTENDERS = (*OURS, "open-mythos", "deepseek-v3")
GPU_CONTENDERS = (*OURS, "open-mythos", "open-mythos-bf16")
REFERENCE, REFERENCE_BF16 = "open-mythos", "open-mythos-bf16"


def with_shape(workload: Workload, **changes: int) -> Workload:
    """The workload with changed sizes, which are added to its name."""
    name = workload.name + "".join(f" {key}={value}" for key, value in sorted(changes.items()))
    return replace(workload, name=name, **changes)
