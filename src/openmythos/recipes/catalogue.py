"""The recipes: functions that return the config of a whole run.

All recipes on text train with Muon: at these sizes its loss is lower than AdamW's after the same
number of steps. Its extra cost is per step, not per token, so it is highest with small batches.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from openmythos.config import ConfigError, unknown_name
from openmythos.data.tokenizer import BPE, Bytes
from openmythos.model import presets
from openmythos.model.config import MythosConfig
from openmythos.nn.feed_forward import ReLU2
from openmythos.nn.grouped_query import GroupedQueryAttention
from openmythos.nn.latent_attention import LatentAttention
from openmythos.nn.moe import MoE
from openmythos.recurrence.loop_embedding import LoopEmbedding
from openmythos.recurrence.loop_lora import NoLoopLoRA
from openmythos.recurrence.loop_sampling import LinearCurriculum, PoissonLoops
from openmythos.tasks import KHop
from openmythos.train.config import RunConfig, TaskData, TextData, TiedLoops, TrainConfig
from openmythos.train.optim import WSD, AdamW, Muon


def tiny() -> RunConfig:
    """Seconds: 20 steps of a byte-level model, to see that everything works.

    Like the larger recipes it uses Muon, with AdamW for parameters that are not matrices of layers.
    """
    return RunConfig(
        model=presets.tiny(),
        tokenizer=Bytes(),
        train=TrainConfig(num_steps=20, batch_size=4, seq_len=64, optimizer=Muon()),
    )


def demo() -> RunConfig:
    """About two minutes on two cores: the whole architecture at 1.4 M parameters.

    All layers are in the loop and the head is tied to the embedding. With a prelude and a coda, or
    with an untied head, loops bring little in so short a training (`openmythos study loop-use`).
    Muon reaches a lower loss than AdamW in as many steps (same study), an embedding of the loop a
    lower one than LoRA per loop in each of 3 seeds (results/demo-lora; study experts-by-loop).
    Because there are few steps, the learning rate is high and the router bias is updated faster
    than by default.
    """
    return RunConfig(
        model=MythosConfig(
            vocab_size=4096,
            dim=192,
            context=1024,
            prelude_layers=0,
            coda_layers=0,
            num_loops=8,
            attention=LatentAttention(
                num_heads=6,
                kv_latent_dim=64,
                q_latent_dim=96,
                nope_head_dim=16,
                rope_head_dim=32,
                value_head_dim=32,
            ),
            recurrent_feed_forward=MoE(num_experts=8, top_k=2, expert_dim=96, bias_rate=5e-3),
            loop_embedding=LoopEmbedding(num_loops=8),
            loop_lora=NoLoopLoRA(),
        ),
        tokenizer=BPE(vocab_size=4096),
        train=TrainConfig(
            num_steps=440,
            batch_size=8,
            seq_len=128,
            loops=PoissonLoops(mean_loops=7.0, max_loops=16),
            curriculum=LinearCurriculum(start_loops=2.0, fraction=0.5),
            backprop_loops=3,
            optimizer=Muon(lr=8e-3, adamw_lr_scale=2.0),
            schedule=WSD(warmup=0.03, decay=0.6),
        ),
    )


def hops() -> RunConfig:
    """Half a minute on one core: a task, chains of up to 20 lookups in memorised tables.

    The main model of study depth-extrapolation; `openmythos eval` tests it on longer chains. It
    trains in fp32, because it is too small to gain from bf16.
    """
    return RunConfig(
        model=presets.hops(),
        data=TaskData(task=KHop()),
        train=TrainConfig(
            num_steps=1600,
            batch_size=32,
            seq_len=21,
            loops=TiedLoops(),
            optimizer=AdamW(lr=3e-3, weight_decay=0.05, beta1=0.9, beta2=0.98),
            schedule=WSD(warmup=0.03, decay=0.3, final=0.05),
            precision="fp32",
            log_every=10,
            save_every=400,
        ),
    )


def small() -> RunConfig:
    """16 M tokens, hours on two cores: the preset small with an untied head, 5.5 M parameters.

    The untied head lowers the loss (study loop-use, at a smaller size). Muon, as in the demo.
    """
    model = presets.small()
    assert isinstance(model.recurrent_feed_forward, MoE)
    experts = replace(model.recurrent_feed_forward, bias_rate=5e-3)
    return RunConfig(
        model=replace(model, tie_embeddings=False, recurrent_feed_forward=experts),
        tokenizer=BPE(vocab_size=4096),
        train=TrainConfig(
            num_steps=4000,
            batch_size=16,
            seq_len=256,
            loops=PoissonLoops(mean_loops=4.0, max_loops=16),
            backprop_loops=4,
            optimizer=Muon(lr=3e-3, adamw_lr_scale=4.0),
            schedule=WSD(warmup=0.02, decay=0.6),
        ),
    )


def _parcae_muon(dim: int) -> Muon:
    """Learning rate 8e-3 for all weights; weight decay falls from 0.2 to 0.

    Our Muon scales updates to AdamW's RMS. For `dim` columns, their learning rate is `unit` * ours.
    """
    unit = 0.2 * dim**0.5
    return Muon(
        lr=8e-3 / unit,
        adamw_lr_scale=unit,
        weight_decay=0.2 * unit,
        final_decay=0.0,
        momentum=0.95,
        beta1=0.8,
        beta2=0.95,
    )


def parcae_140m() -> RunConfig:
    """Parcae-140M (arXiv 2604.12946) as its authors train it: 11.2 B tokens of FineWeb-Edu.

    256 sequences of 2048 tokens per step. Poisson(8) loops per sequence, the last 4 with gradient.
    Learning rate 8e-3: Muon, with their scaling of updates, for matrices, and AdamW for the rest.
    No warmup; linear decay to 0 in the second half. Weight decay falls from 0.2 to 0. Not included:
    value embeddings (the preset has more layers instead), "cautious" weight decay and the
    normalised update of their Muon.
    """
    return RunConfig(
        model=presets.parcae_140m(),
        tokenizer=BPE(vocab_size=32_768),
        data=TextData(paths=("hf:HuggingFaceFW/fineweb-edu:sample-100BT",), held_out=0.001),
        train=TrainConfig(
            num_steps=21_362,
            batch_size=256,
            micro_batch_size=32,
            seq_len=2048,
            loops=PoissonLoops(mean_loops=8.0, max_loops=32, per="sequence"),
            backprop_loops=4,
            optimizer=_parcae_muon(dim=768),
            schedule=WSD(warmup=0.0, decay=0.5, final=0.0),
            clip_norm=1.0,
            compile=True,
            save_every=1024,
            keep_every=1024 * 5,
        ),
    )


def parcae_mini() -> RunConfig:
    """Parcae's recipe at 1.7 M parameters, with its Muon, on a laptop in minutes."""
    base = parcae_140m()
    attention = GroupedQueryAttention(num_heads=4, num_kv_heads=4, qk_norm=True)
    feed_forward = ReLU2(hidden_dim=512)
    model = replace(
        base.model,
        dim=128,
        context=256,
        prelude_layers=1,
        recurrent_layers=1,
        coda_layers=1,
        attention=attention,
        feed_forward=feed_forward,
        recurrent_feed_forward=feed_forward,
        vocab_size=4096,
    )
    return replace(
        base,
        model=model,
        tokenizer=BPE(vocab_size=4096),
        data=TextData(),
        train=replace(
            base.train,
            num_steps=400,
            batch_size=8,
            micro_batch_size=0,
            seq_len=256,
            optimizer=_parcae_muon(dim=128),
            compile=False,
            save_every=100,
            keep_every=0,
        ),
    )


RECIPES: Mapping[str, Callable[[], RunConfig]] = MappingProxyType(
    {
        "tiny": tiny,
        "demo": demo,
        "hops": hops,
        "small": small,
        "parcae-140m": parcae_140m,
        "parcae-mini": parcae_mini,
    }
)


def get(name: str) -> RunConfig:
    """The recipe of that name."""
    if name not in RECIPES:
        raise ConfigError(f"recipe = {name!r}: {unknown_name('recipe', name, RECIPES)}")
    return RECIPES[name]()
