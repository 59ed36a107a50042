"""What `bench.py` times: the shapes, the interface of a contender, and this project's models.

A contender has the shapes of a `Workload` and runs all its loops. Its peers are in `peers.py`,
dense models without loops in `yardsticks.py`, and the names of all in `roster.py`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from openmythos import MythosConfig, OpenMythos, kernels
from openmythos.inference import generation
from openmythos.inference.generation import DecodableModel
from openmythos.machine import Precision, autocast
from openmythos.nn.cache import ExactCache, KVCache
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


def with_shape(workload: Workload, **changes: int) -> Workload:
    """The workload with changed sizes, which are added to its name."""
    name = workload.name + "".join(f" {key}={value}" for key, value in sorted(changes.items()))
    return replace(workload, name=name, **changes)


class SkippedError(Exception):
    """A contender cannot run here; the text says why."""


class Contender(ABC):
    """One model with its optimizer. Times are taken around these methods."""

    name: str
    model: nn.Module
    figures: tuple[str, ...] = ("forward", "training", "prefill", "decode")  # that it is timed for
    inference: Any = torch.no_grad  # what its `generate` runs in

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

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError  # by contenders whose `figures` leave out training

    def forward(self, tokens: Tensor) -> Tensor:
        raise NotImplementedError

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
    """OpenMythos in fp32, or in bf16: trained with autocast, served with bf16 weights.

    `forms` are those of `openmythos.kernels`: "torch" leaves out the native kernel. `compiled`:
    layers by torch.compile in training, whole decoding steps by `CompiledModel`, without native
    layers.
    """

    inference = torch.inference_mode

    def __init__(
        self,
        workload: Workload,
        precision: Precision,
        *,
        compiled: bool = False,
        forms: kernels.Forms = "auto",
    ) -> None:
        self.name = f"openmythos {precision}" + (" compiled" if compiled else "")
        self.loops, self.precision, self.compiled = workload.loops, precision, compiled
        if compiled or forms != "auto":  # for this process; a block per call would take its time
            self._forms = kernels.use("torch" if compiled else forms)
            self._forms.__enter__()
        self.request = generation.Request(num_loops=workload.loops)
        self.served: OpenMythos | None = None
        self.decoder: DecodableModel | None = None
        self.model = OpenMythos(workload.config(), seed=0)
        if compiled:
            # This process uses more shapes and modes than training or serving would.
            torch._dynamo.config.recompile_limit = 64
            self.model.compile_layers()

    @torch.inference_mode(False)  # may be made in a block of inference
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

    @torch.inference_mode(False)
    def _decoder(self) -> DecodableModel:
        """The model that prefills and decodes: as it is, or compiled."""
        if not self.compiled:
            return self._served()
        if self.decoder is None:  # a model of its own: its layers are not compiled one by one
            from openmythos.inference.compiled import CompiledModel

            model = OpenMythos(self.model.config, seed=0).eval()
            model.to(self.model.device, None if self.precision == "fp32" else torch.bfloat16)
            self.decoder = CompiledModel(model, say=_said)
        return self.decoder

    def prefill(self, tokens: Tensor, room: int) -> Any:
        return self._filled(self._decoder(), tokens, room)

    def _filled(self, model: DecodableModel, tokens: Tensor, room: int) -> KVCache:
        batch, seq = tokens.shape
        loops, policy = self.loops, ExactCache()
        cache = model.new_cache(batch, seq + room, num_loops=loops, prefill=policy, decode=policy)
        generation.prefill(model, tokens, self.request, cache)
        return cache

    def decode(self, cache: Any, tokens: Tensor) -> None:
        generation.decode_one_token(self._decoder(), tokens[:, 0], self.request, cache)

    def cache_bytes(self, cache: Any) -> int:
        return cache.nbytes


def _said(line: str) -> None:
    """Print a line of the compiled model; an error if it goes on without compiled code."""
    print(line)
    if "is not compiled" in line:
        raise RuntimeError(line)


class Bf16Weights(Ours):
    """OpenMythos decoding with weights and cache in bf16; the native kernel computes in fp32.

    The prompt is read in fp32, since torch computes in bf16, which not every processor does.
    """

    figures = ("decode",)

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload, "bf16")

    def prefill(self, tokens: Tensor, room: int) -> Any:
        cache = self._filled(self.model, tokens, room)
        cache._replace_storage(lambda numbers: numbers.to(torch.bfloat16))
        return cache
