"""Costs against what they stand for: a real cache, torch's FLOP counter, what autograd keeps."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from openmythos import ConfigError, MythosConfig, OpenMythos, kernels, presets
from openmythos.config import apply_overrides
from openmythos.kernels import few_keys
from openmythos.nn.cache import CachePolicy, ExactCache, LastLoopCache
from openmythos.nn.latent_attention import LatentAttention
from openmythos.planning import cost

GQA = ["attention.kind=grouped_query", "attention.num_heads=4", "attention.num_kv_heads=2"]
NO_LORA = ["loop_lora=none"]
VARIANTS = {
    "as it is": [],
    "grouped query": GQA,
    "qk norm": [*GQA, "attention.qk_norm=true"],
    "parcae": [*GQA, "value_embeddings=gated", "readout_map=true", "coda_layers=2"],
    "direct queries": ["attention.q_latent_dim=0", 'loop_lora.targets=["attention.query"]'],
    "lora on all maps": ['loop_lora.targets=["*"]'],
    "swiglu": ["recurrent_feed_forward=swiglu"],
    "relu2": ["recurrent_feed_forward=relu2", "feed_forward=relu2", *NO_LORA],
    "mixture outside": ["feed_forward=moe", "feed_forward.num_experts=4"],
    "no shared expert": ["recurrent_feed_forward.num_shared_experts=0"],
    "full input map": ["injection.input_map=dense"],
    "add": ["injection=add"],
    "concat": ["injection=concat"],
    "no injection": ["injection=none", "state_init=encoded"],
    "untied, embedding": ["tie_embeddings=false", "loop_embedding=learned"],
    "halting": ["halting=act"],
    "deep": ["prelude_layers=2", "recurrent_layers=3", "coda_layers=0"],
}


def tiny(*overrides: str) -> MythosConfig:
    return apply_overrides(presets.tiny(), overrides)


@pytest.fixture(params=VARIANTS)
def config(request: pytest.FixtureRequest) -> MythosConfig:
    return tiny(*VARIANTS[request.param])


def on_meta(config: MythosConfig) -> OpenMythos:
    with torch.device("meta"):
        return OpenMythos(config)


def test_the_parts_add_up(config: MythosConfig) -> None:
    count = cost.parameters(config)
    parts = (count.embedding, count.prelude, count.recurrent, count.coda, count.norm, count.head)
    assert sum(parts) == count.total
    assert count.total == sum(p.numel() for p in OpenMythos(config).parameters())


def test_active_counts_the_chosen_experts_only() -> None:
    count = cost.parameters(tiny("recurrent_feed_forward.top_k=2"))
    assert count.routed_experts == 8 * 3 * 64 * 32
    assert count.active == count.total - count.routed_experts * 6 // 8
    dense = cost.parameters(tiny("recurrent_feed_forward=swiglu"))
    assert dense.active == dense.total
    assert dense.routed_experts == 0


def test_deltas_grow_with_their_loops() -> None:
    few, many = (cost.parameters(tiny(f"loop_lora.num_loops={n}")) for n in (2, 6))
    assert many.loop_lora == 3 * few.loop_lora > 0
    assert many.total - few.total == many.loop_lora - few.loop_lora


@pytest.mark.parametrize("policy", [kind() for kind in get_args(CachePolicy)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", [[], GQA])
def test_a_real_cache_has_the_predicted_size(
    policy: CachePolicy, dtype: torch.dtype, attention: list[str]
) -> None:
    config = tiny("recurrent_layers=2", *attention)
    cache = on_meta(config).new_cache(3, 32, num_loops=5, prefill=policy, dtype=dtype)
    predicted = cost.cache_bytes(
        config, context=32, batch=3, num_loops=5, dtype=dtype, policy=policy
    )
    assert predicted == cache.nbytes
    shared = OpenMythos(config).new_cache(3, 32, num_loops=5, decode=policy, dtype=dtype)
    shared.begin_decode()
    assert predicted == shared.nbytes


def grouped_linear_flops(
    x: Sequence[int], weight: Sequence[int], *_: Any, out_shape: object = None, **__: Any
) -> int:
    return 2 * x[0] * weight[1] * weight[2]


def grouped_outer_flops(
    left: Sequence[int], right: Sequence[int], *_: Any, out_shape: object = None, **__: Any
) -> int:
    return 2 * left[0] * left[1] * right[1]


def counter() -> FlopCounterMode:
    ops = torch.ops.openmythos
    return FlopCounterMode(
        display=False,
        custom_mapping={
            ops.grouped_linear: grouped_linear_flops,
            ops.grouped_outer: grouped_outer_flops,
        },
    )


BATCH, SEQ = 2, 48


def padding_flops(config: MythosConfig, loops: int) -> int:
    """Values that are padded to the width of the keys cost the counter what is no use to us."""
    c = config.attention
    if not isinstance(c, LatentAttention):
        return 0
    padding = c.nope_head_dim + c.rope_head_dim - c.value_head_dim
    return config.effective_depth(loops) * 2 * SEQ * c.num_heads * padding


@pytest.mark.usefixtures("torch_attention")
def test_forward_flops_are_what_torch_counts(config: MythosConfig) -> None:
    loops = 3
    tokens = torch.zeros(BATCH, SEQ, dtype=torch.long)
    # The CPU's fused attention is none of the operations that the counter knows.
    with sdpa_kernel(SDPBackend.MATH), counter() as counted:
        OpenMythos(config).train()(tokens, num_loops=loops)
    # The counter knows no causal mask: to it, each of SEQ tokens sees SEQ.
    predicted = cost.Flops(config, 2 * SEQ).forward(loops)
    padding = padding_flops(config, loops)
    assert counted.get_total_flops() == BATCH * SEQ * (predicted + padding)


@pytest.mark.usefixtures("torch_attention")
@pytest.mark.parametrize(
    ("variant", "backprop_loops"),
    [*(("as it is", loops) for loops in (0, 2, 5)), ("full input map", 2), ("relu2", 0)]
    + [("deep", loops) for loops in (2, 5)],
)
def test_training_flops_are_what_torch_counts(variant: str, backprop_loops: int) -> None:
    # The counter's own hooks fail on deltas that are taken from their stack without gradient.
    lora = NO_LORA if backprop_loops == 2 else []
    config = tiny(*VARIANTS[variant], "attention.value_head_dim=24", *lora)
    tokens = torch.zeros(BATCH, SEQ, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), counter() as counted:
        out = OpenMythos(config).train()(tokens, num_loops=3, backprop_loops=backprop_loops)
        out.logits.sum().backward()
    predicted = cost.Flops(config, 2 * SEQ).training(3, backprop_loops)
    assert counted.get_total_flops() == BATCH * SEQ * predicted


def test_a_window_saves_attention() -> None:
    full = cost.Flops(tiny(), 256).forward(3)
    pairs = cost.Flops(tiny(), 512).forward(3) - full
    windowed = cost.Flops(tiny("attention.window=64"), 256).forward(3)
    # Mean number of visible tokens: 128, and 64 less the missing half of the first 64.
    assert full - windowed == round(pairs * (128 - (64 - 64 * 64 / 512)) / 128)
    assert cost.Flops(tiny("attention.window=256"), 256).forward(3) == full


@pytest.fixture
def torch_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attention kernels of an accelerator, whose costs the plan states."""
    monkeypatch.setattr(kernels, "CPU", replace(kernels.CPU, blocks=False))
    monkeypatch.setattr(few_keys, "MOST_KEYS", 0)


def kept_bytes(
    config: MythosConfig, loops: int, backprop_loops: int, dtype: torch.dtype = torch.float32
) -> int:
    """Bytes of the distinct storages that autograd keeps, parameters excepted."""
    model = OpenMythos(config, seed=0).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept.setdefault(x.untyped_storage().data_ptr(), x)
        return x

    tokens = torch.randint(config.vocab_size, (2, 128))
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), autocast:
        model(tokens, num_loops=loops, backprop_loops=backprop_loops)
        return sum(x.untyped_storage().nbytes() for x in kept.values())


def memory(config: MythosConfig, loops: int, backprop_loops: int = 0, **options: Any) -> Any:
    return cost.training_memory(
        config,
        batch=2,
        context=128,
        num_loops=loops,
        backprop_loops=backprop_loops,
        **{"dtype": torch.float32} | options,
    )


LOOPS = [(3, 0), (4, 2)]


@pytest.mark.usefixtures("torch_attention")
@pytest.mark.parametrize(("loops", "backprop_loops"), LOOPS)
def test_activations_of_small_are_within_a_quarter(loops: int, backprop_loops: int) -> None:
    config = presets.small()
    measured = kept_bytes(config, loops, backprop_loops)
    assert memory(config, loops, backprop_loops).activations == pytest.approx(measured, rel=0.25)


@pytest.mark.usefixtures("torch_attention")
@pytest.mark.parametrize(("loops", "backprop_loops"), LOOPS)
def test_activations_are_what_autograd_keeps(
    config: MythosConfig, loops: int, backprop_loops: int
) -> None:
    measured = kept_bytes(config, loops, backprop_loops)
    assert memory(config, loops, backprop_loops).activations == pytest.approx(measured, rel=0.06)


@pytest.mark.usefixtures("torch_attention")
@pytest.mark.parametrize("overrides", [[], [*GQA, "recurrent_feed_forward=swiglu"]])
def test_activations_in_bfloat16(overrides: list[str]) -> None:
    config = apply_overrides(presets.small(), overrides)
    estimate = memory(config, 1, dtype=torch.bfloat16)
    copies = estimate.weights - memory(config, 1).weights
    measured = kept_bytes(config, 1, 0, torch.bfloat16)
    assert estimate.activations + copies == pytest.approx(measured, rel=0.1)


def test_checkpointed_loops_cost_their_initial_state() -> None:
    config = presets.small()
    one, two, nine = (memory(config, loops, checkpointing=True) for loops in (1, 2, 9))
    state = 2 * 128 * config.dim * 4
    assert one == memory(config, 1)
    assert two.activations - one.activations == state
    assert nine.activations - one.activations == 8 * state


def test_weights_gradients_and_moments() -> None:
    config = tiny()
    total = cost.parameters(config).total
    adamw, muon = (memory(config, 4, optimizer=name) for name in ("adamw", "muon"))
    assert (adamw.weights, adamw.gradients, adamw.optimizer) == (4 * total, 4 * total, 8 * total)
    layers = on_meta(config)
    matrices = sum(
        p.numel()
        for part in (layers.prelude, layers.recurrent.layers, layers.coda)
        for p in part.parameters()
        if p.ndim > 1
    )
    assert muon.optimizer == 8 * total - 4 * matrices
    assert memory(config, 4, dtype=torch.bfloat16).weights == 6 * total
    assert adamw.total == 16 * total + adamw.activations + adamw.logits
    assert adamw.logits == 2 * 128 * config.vocab_size * 12


def test_a_plan_holds_what_the_functions_say() -> None:
    config = presets.small()
    plan = cost.plan(config, context=512, batch=3, num_loops=6, backprop_loops=2)
    assert plan.parameters == cost.parameters(config)
    assert plan.weight_bytes == 2 * plan.parameters.total
    assert plan.effective_depth == 8
    assert (plan.num_loops, plan.backprop_loops) == (6, 2)
    sized = {"context": 512, "batch": 3, "num_loops": 6}
    assert plan.cache_bytes == cost.cache_bytes(config, **sized, policy=ExactCache())
    assert plan.shared_cache_bytes == cost.cache_bytes(config, **sized, policy=LastLoopCache())
    assert plan.forward_flops == cost.Flops(config, 512).forward(6)
    assert plan.training_flops < 3 * plan.forward_flops
    assert plan.training == cost.training_memory(config, **sized, backprop_loops=2)
    assert plan.checkpointed.total < plan.training.total


class OnlyMeta(TorchDispatchMode):
    """Fails where an operation of torch returns a tensor with memory of its own."""

    def __torch_dispatch__(
        self, func: Any, _types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        assert not isinstance(result, Tensor) or result.is_meta, f"{func} allocates"
        return result


def test_planning_a_trillion_parameters_allocates_nothing() -> None:
    with OnlyMeta():
        plan = cost.plan(presets.get("1t"))
    assert plan.context == 2**20
    assert plan.effective_depth == 76
    # 76 slots of 1088 numbers in bf16: 162 KiB per token.
    assert plan.cache_bytes == 2**20 * 76 * 1088 * 2


@pytest.mark.parametrize("field", ["context", "batch", "num_loops"])
def test_a_plan_for_nothing_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} = 0: must be an integer, at least 1"):
        cost.plan(presets.tiny(), **{field: 0})
