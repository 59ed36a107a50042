"""Named model configs: `presets.get("1b")`, `presets.names()`, or each by its function.

A name states the measured number of parameters (`cost.parameters`) within 5 %. Three families:

tiny, small        everything our own model has, at the size of a unit test and of a laptop
140m 370m 770m     after Parcae's (arXiv 2604.12946): dense, with a full input map, but twice its
                   layers in place of its value embeddings
1b ... 1t          latent attention and a mixture of experts in one recurrent layer. Totals, active
                   parameters, loops and contexts are the announced ones. Nobody has trained the
                   large ones: they are arithmetic, not a recommendation.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from openmythos.config import ConfigError, unknown_name
from openmythos.model.config import MythosConfig
from openmythos.nn.feed_forward import ReLU2, SwiGLU
from openmythos.nn.grouped_query import GroupedQueryAttention
from openmythos.nn.latent_attention import LatentAttention
from openmythos.nn.moe import MoE
from openmythos.recurrence.initial_state import NormalState
from openmythos.recurrence.injection import LTI
from openmythos.recurrence.loop_lora import LoopLoRA, NoLoopLoRA


def hops() -> MythosConfig:
    """For `tasks.KHop`: width 64, one prelude, one recurrent and one coda layer.

    The attention window is 8 tokens, so that one layer cannot follow a chain. Not in `names()`.
    """
    feed_forward = SwiGLU(hidden_dim=168)
    return MythosConfig(
        vocab_size=26,
        dim=64,
        context=128,
        num_loops=20,
        attention=GroupedQueryAttention(num_heads=4, num_kv_heads=4, window=8),
        feed_forward=feed_forward,
        recurrent_feed_forward=feed_forward,
        loop_lora=NoLoopLoRA(),
        # With zero_init_outputs the curriculum starts a thousand steps later.
        zero_init_outputs=False,
    )


def tiny() -> MythosConfig:
    """Byte vocabulary, milliseconds per step: for tests and for trying out code."""
    return MythosConfig(
        vocab_size=257,
        dim=64,
        context=256,
        num_loops=4,
        attention=LatentAttention(
            num_heads=4,
            kv_latent_dim=16,
            q_latent_dim=32,
            nope_head_dim=16,
            rope_head_dim=8,
            value_head_dim=16,
        ),
        feed_forward=SwiGLU(hidden_dim=176),
        recurrent_feed_forward=MoE(num_experts=8, top_k=2, expert_dim=32),
        loop_lora=LoopLoRA(rank=2, num_loops=4),
    )


def small() -> MythosConfig:
    """4.4 M parameters: trains on a laptop."""
    return MythosConfig(
        vocab_size=4096,
        dim=256,
        context=1024,
        num_loops=4,
        attention=LatentAttention(
            num_heads=8,
            kv_latent_dim=64,
            q_latent_dim=128,
            nope_head_dim=32,
            rope_head_dim=16,
            value_head_dim=32,
        ),
        feed_forward=SwiGLU(hidden_dim=704),
        recurrent_feed_forward=MoE(num_experts=16, top_k=2, expert_dim=128),
        loop_lora=LoopLoRA(rank=4, num_loops=4),
    )


def parcae_140m() -> MythosConfig:
    """Parcae-140M: width 768, 6 heads."""
    return _parcae(dim=768, layers=4)


def parcae_370m() -> MythosConfig:
    """Parcae-370M: width 1024, 8 heads."""
    return _parcae(dim=1024, layers=8)


def parcae_770m() -> MythosConfig:
    """Parcae-770M: width 1280, 10 heads."""
    return _parcae(dim=1280, layers=12)


def mythos_1b() -> MythosConfig:
    """1 B parameters, 0.31 B of them active per token; 16 loops, 4k context."""
    return MythosConfig(
        vocab_size=32_768,
        dim=2048,
        context=4096,
        prelude_layers=2,
        coda_layers=2,
        num_loops=16,
        attention=_latent(2048, kv=256, rope=32, head=64, context=4096),
        feed_forward=SwiGLU(hidden_dim=5632),
        recurrent_feed_forward=MoE(num_experts=64, top_k=4, num_shared_experts=2, expert_dim=1984),
        loop_lora=LoopLoRA(rank=8, num_loops=16),
    )


def mythos_3b() -> MythosConfig:
    """3 B parameters, 0.78 B active; 16 loops, 4k context."""
    return MythosConfig(
        vocab_size=32_768,
        dim=3072,
        context=4096,
        prelude_layers=2,
        coda_layers=2,
        num_loops=16,
        attention=_latent(3072, kv=384, rope=32, head=96, context=4096),
        feed_forward=SwiGLU(hidden_dim=8192),
        recurrent_feed_forward=MoE(num_experts=64, top_k=6, num_shared_experts=2, expert_dim=4096),
        loop_lora=LoopLoRA(rank=8, num_loops=16),
    )


def mythos_10b() -> MythosConfig:
    """10 B parameters, 1.4 B active; 24 loops, 8k context."""
    return MythosConfig(
        vocab_size=32_768,
        dim=4096,
        context=8192,
        prelude_layers=2,
        coda_layers=2,
        num_loops=24,
        attention=_latent(4096, kv=512, rope=64, head=128, context=8192),
        feed_forward=SwiGLU(hidden_dim=11_008),
        recurrent_feed_forward=MoE(num_experts=128, top_k=4, num_shared_experts=2, expert_dim=5632),
        loop_lora=LoopLoRA(rank=16, num_loops=24),
        tie_embeddings=False,
    )


def mythos_50b() -> MythosConfig:
    """50 B parameters, 5.3 B active; 32 loops, 8k context."""
    return MythosConfig(
        vocab_size=32_768,
        dim=6144,
        context=8192,
        prelude_layers=3,
        coda_layers=3,
        num_loops=32,
        attention=_latent(6144, kv=512, rope=64, head=128, context=8192),
        feed_forward=SwiGLU(hidden_dim=18_432),
        recurrent_feed_forward=MoE(num_experts=256, top_k=8, num_shared_experts=5, expert_dim=9728),
        loop_lora=LoopLoRA(rank=16, num_loops=32),
        tie_embeddings=False,
    )


def mythos_100b() -> MythosConfig:
    """100 B parameters, 17 B active; 32 loops, 1M context."""
    return MythosConfig(
        vocab_size=65_536,
        dim=8192,
        context=2**20,
        prelude_layers=4,
        coda_layers=4,
        num_loops=32,
        attention=_latent(8192, kv=512, rope=64, head=128, context=2**20),
        feed_forward=SwiGLU(hidden_dim=28_672),
        recurrent_feed_forward=MoE(
            num_experts=256, top_k=16, num_shared_experts=10, expert_dim=14_336
        ),
        loop_lora=LoopLoRA(rank=32, num_loops=32),
        tie_embeddings=False,
    )


def mythos_500b() -> MythosConfig:
    """500 B parameters, 68 B active; 48 loops, 1M context."""
    return MythosConfig(
        vocab_size=131_072,
        dim=12_288,
        context=2**20,
        prelude_layers=4,
        coda_layers=4,
        num_loops=48,
        attention=_latent(12_288, kv=1024, rope=64, head=128, context=2**20),
        feed_forward=SwiGLU(hidden_dim=49_152),
        recurrent_feed_forward=MoE(
            num_experts=512, top_k=32, num_shared_experts=20, expert_dim=24_576
        ),
        loop_lora=LoopLoRA(rank=32, num_loops=48),
        tie_embeddings=False,
    )


def mythos_1t() -> MythosConfig:
    """1 T parameters, 144 B active; 64 loops, 1M context."""
    return MythosConfig(
        vocab_size=131_072,
        dim=16_384,
        context=2**20,
        prelude_layers=6,
        coda_layers=6,
        num_loops=64,
        attention=_latent(16_384, kv=1024, rope=64, head=128, context=2**20),
        feed_forward=SwiGLU(hidden_dim=65_536),
        recurrent_feed_forward=MoE(
            num_experts=512, top_k=32, num_shared_experts=20, expert_dim=36_864
        ),
        loop_lora=LoopLoRA(rank=64, num_loops=64),
        tie_embeddings=False,
    )


def names() -> tuple[str, ...]:
    """All presets, the smallest first."""
    return tuple(PRESETS)


def get(name: str) -> MythosConfig:
    """The preset of that name."""
    if name not in PRESETS:
        known = unknown_name("preset", name, PRESETS, as_listed=True)
        raise ConfigError(f"preset = {name!r}: {known}")
    return PRESETS[name]()


def _parcae(*, dim: int, layers: int) -> MythosConfig:
    # Parcae counts a third to a half of its parameters in value embeddings, a table of vocab_size x
    # dim for every other layer, and ties its head; these presets have neither.
    return MythosConfig(
        vocab_size=32_768,
        dim=dim,
        context=2048,
        prelude_layers=layers,
        recurrent_layers=layers,
        coda_layers=layers,
        num_loops=8,
        attention=GroupedQueryAttention(
            num_heads=dim // 128, num_kv_heads=dim // 128, qk_norm=True, rope_base=50_000.0
        ),
        feed_forward=ReLU2(hidden_dim=4 * dim),
        recurrent_feed_forward=ReLU2(hidden_dim=4 * dim),
        injection=LTI(discretization="euler", input_map="dense"),
        loop_lora=NoLoopLoRA(),
        state_init=NormalState(),
        tie_embeddings=False,
    )


def _latent(dim: int, *, kv: int, rope: int, head: int, context: int) -> LatentAttention:
    return LatentAttention(
        num_heads=dim // 128,
        kv_latent_dim=kv,
        q_latent_dim=dim // 4,
        nope_head_dim=head,
        rope_head_dim=rope,
        value_head_dim=head,
        # The lowest rotary frequencies must distinguish the first token from the last.
        rope_base=500_000.0 if context <= 8192 else 10_000_000.0,
    )


PRESETS: Mapping[str, Callable[[], MythosConfig]] = MappingProxyType(
    {
        "tiny": tiny,
        "small": small,
        "140m": parcae_140m,
        "370m": parcae_370m,
        "770m": parcae_770m,
        "1b": mythos_1b,
        "3b": mythos_3b,
        "10b": mythos_10b,
        "50b": mythos_50b,
        "100b": mythos_100b,
        "500b": mythos_500b,
        "1t": mythos_1t,
    }
)
