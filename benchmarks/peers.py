"""The peers of `bench.py`: open-mythos 0.5.0 and DeepSeek-V3 of transformers.

They are imported only when they are timed.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from contenders import Contender, Workload
from torch import Tensor, nn

from openmythos.machine import Precision, autocast


class Reference(Contender):
    """open-mythos 0.5.0. Its halting threshold is unreachable, so that all loops run.

    In bf16 it computes under autocast: its rotations are complex numbers, which have no bf16.
    Compiled are its attention, dense feed-forward layers, shared experts and injection, not the
    loop over experts in Python: whole layers at 8 rows were not compiled within five minutes.
    """

    name = "open-mythos 0.5.0"

    def __init__(
        self, workload: Workload, precision: Precision = "fp32", *, compiled: bool = False
    ) -> None:
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
        if compiled:
            torch._dynamo.config.recompile_limit = 64  # it is timed for several shapes
            for block in (*self.model.prelude, *self.model.coda):
                block.attn.compile()
                block.ffn.compile()
            looped = self.model.recurrent
            for module in (looped.block.attn, *looped.block.ffn.shared_experts, looped.injection):
                module.compile()

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


def cache_argument(model: nn.Module) -> str:
    """The name of the argument for the cache, which transformers 5.24 changed."""
    known = inspect.signature(model.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


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
        self._cache_name = cache_argument(self.model)

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
