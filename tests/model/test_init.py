"""The initialisation table: complete, with the promised distributions, reproducible."""

import math

import pytest
import torch
from torch import Tensor, nn
from variants import (
    FEW_VARIANT_IDS,
    FEW_VARIANTS,
    SEQ,
    members,
    name_of,
    random_tokens,
    tiny_config,
)

from openmythos.model.config import MythosConfig
from openmythos.model.init import init_weights
from openmythos.model.mythos import OpenMythos
from openmythos.nn.block import Attention, FeedForward
from openmythos.nn.moe import MoE
from openmythos.recurrence.halting import ACT
from openmythos.recurrence.injections import Concat
from openmythos.recurrence.loop_embedding import LoopEmbedding
from openmythos.recurrence.loop_lora import LoopLoRA

EVERYTHING = {
    "loop_embedding": LoopEmbedding(num_loops=8),
    "loop_lora": LoopLoRA(num_loops=8, targets=("*",)),
    "halting": ACT(bias_init=-1.5),
    "recurrent_feed_forward": MoE(num_experts=8, expert_dim=64),
}


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


@pytest.mark.parametrize("config", FEW_VARIANTS, ids=FEW_VARIANT_IDS)
def test_every_parameter_and_buffer_is_filled(config: MythosConfig) -> None:
    model = OpenMythos(config, seed=0)
    with torch.no_grad():
        for tensor in tensors(model).values():
            tensor.fill_(torch.nan)
    init_weights(model, zero_outputs=True)
    assert all(torch.isfinite(tensor).all() for tensor in tensors(model).values())


def test_a_vector_whose_module_states_nothing_is_an_error() -> None:
    model = OpenMythos(tiny_config())
    model.register_parameter("novelty", nn.Parameter(torch.ones(2)))
    with pytest.raises(TypeError, match="novelty: its module must state in fills"):
        init_weights(model, zero_outputs=True)


@pytest.mark.parametrize("zero_init_outputs", [True, False])
@pytest.mark.parametrize("feed_forward", members(FeedForward), ids=name_of)
@pytest.mark.parametrize("attention", members(Attention), ids=name_of)
def test_distributions(
    attention: Attention, feed_forward: FeedForward, zero_init_outputs: bool
) -> None:
    parts = EVERYTHING | {"attention": attention, "feed_forward": feed_forward}
    config = tiny_config(dim=64, injection=Concat(), zero_init_outputs=zero_init_outputs, **parts)
    for name, tensor in tensors(OpenMythos(config, seed=0)).items():
        outputs = name.endswith("attention.output.weight") or (
            "feed_forward" in name and (".down" in name)
        )
        if "norm.weight" in name:
            assert (tensor == 1).all(), name
        elif ".lora.up." in name or "router_bias" in name or name.endswith("halting.weight"):
            assert (tensor == 0).all(), name
        elif name.endswith("halting.bias"):
            assert tensor == -1.5
        elif outputs and zero_init_outputs and ".lora." not in name:
            assert (tensor == 0).all(), name
        else:
            embedding = name.startswith(("embed.", "head.")) or name.endswith("embedding.table")
            std = math.sqrt(2 / (5 * (64 if embedding else tensor.shape[-1])))
            check_truncated_normal(name, tensor.detach(), std)


def check_truncated_normal(name: str, tensor: Tensor, std: float) -> None:
    assert tensor.abs().max() <= 3 * std + 1e-6, name
    size = tensor.numel()
    # Cutting a normal at three standard deviations leaves 0.987 of its own.
    assert abs(tensor.std() / (0.9866 * std) - 1) < 5 / math.sqrt(2 * size), name
    assert abs(tensor.mean()) < 5 * std / math.sqrt(size), name


def test_experts_and_loops_differ() -> None:
    model = OpenMythos(tiny_config(**EVERYTHING), seed=0)
    experts = model.recurrent.layers[0].feed_forward.experts
    for stacked in (experts.gate_up, experts.down, model.recurrent.conditioning.embedding.table):
        assert len(stacked.flatten(1).unique(dim=0)) == len(stacked)
    for down in model.recurrent.conditioning.lora.down.values():
        assert len(down.flatten(1).unique(dim=0)) == 8
    first, second = (layer.attention.output.weight for layer in (model.prelude[0], model.coda[0]))
    assert not torch.equal(first, second)


def test_a_seed_makes_the_weights_reproducible() -> None:
    config = tiny_config(**EVERYTHING)
    one = tensors(OpenMythos(config, seed=7))
    torch.rand(5)
    two, other = tensors(OpenMythos(config, seed=7)), tensors(OpenMythos(config, seed=8))
    assert all(torch.equal(two[name], one[name]) for name in one)
    assert not torch.equal(other["embed.weight"], one["embed.weight"])


def test_without_a_seed_torch_s_own_state_decides() -> None:
    config = tiny_config()
    torch.manual_seed(3)
    one, two = (OpenMythos(config).embed.weight for _ in range(2))
    torch.manual_seed(3)
    again = OpenMythos(config).embed.weight
    assert torch.equal(one, again) and not torch.equal(one, two)


@pytest.mark.parametrize("feed_forward", members(FeedForward), ids=name_of)
@torch.no_grad()
def test_zero_outputs_make_the_block_a_pure_injection(feed_forward: FeedForward) -> None:
    config = tiny_config(
        zero_init_outputs=True, recurrent_feed_forward=feed_forward, prelude_layers=2
    )
    model, tokens = OpenMythos(config, seed=0).eval(), random_tokens(2)
    encoded = model.recurrent.prelude_norm(model.embed(tokens))
    drive = model.recurrent.injection.prepare(encoded)
    state = torch.zeros_like(encoded)
    for num_loops in range(1, 5):
        state = model.recurrent.injection(state, drive)
        out = model(tokens, num_loops=num_loops)
        torch.testing.assert_close(out.recurrence.state, state)
    # Hence at rest, with a rate and a gain of 1, the state is the normed embedding itself.
    rest = model(tokens, num_loops=64).recurrence.state
    torch.testing.assert_close(rest, encoded, rtol=1e-4, atol=1e-5)


def test_zero_outputs_can_still_learn() -> None:
    model = OpenMythos(tiny_config(zero_init_outputs=True), seed=0)
    model(random_tokens(2)).logits.square().sum().backward()
    layer = model.recurrent.layers[0]
    assert layer.attention.output.weight.grad.any()
    assert layer.feed_forward.experts.down.grad.any()


@pytest.mark.parametrize("zero_init_outputs", [True, False])
@torch.no_grad()
def test_the_first_loss_is_that_of_guessing(zero_init_outputs: bool) -> None:
    config = tiny_config(zero_init_outputs=zero_init_outputs, tie_embeddings=False)
    logits = OpenMythos(config, seed=0)(random_tokens(16)).logits
    targets = random_tokens(16, SEQ, seed=9)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    # Logits of variance 2 / 5, and half of that comes on top of ln 50.
    assert abs(loss - (math.log(50) + 0.2)) < 0.15


def test_on_the_meta_device_nothing_is_drawn() -> None:
    state = torch.get_rng_state()
    with torch.device("meta"):
        model = OpenMythos(tiny_config(**EVERYTHING))
    assert all(tensor.is_meta for tensor in tensors(model).values())
    assert torch.equal(torch.get_rng_state(), state)
