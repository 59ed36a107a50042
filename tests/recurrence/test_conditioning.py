"""What differs between loops: low-rank deltas equal merged weights, the last is used again."""

from fnmatch import fnmatchcase

import pytest
import torch
from torch import nn
from variants import DIM, members, name_of, random_tokens, tiny_config, tiny_model

from openmythos.config import ConfigError
from openmythos.model.mythos import OpenMythos
from openmythos.nn.block import Attention, FeedForward
from openmythos.nn.linear import NO_DELTAS, Linear
from openmythos.recurrence.loop_embedding import LoopEmbedding, NoLoopEmbedding
from openmythos.recurrence.loop_lora import LoopLoRA, LoopLoRALayer, NoLoopLoRA


def without_lora(model: OpenMythos, loop: int) -> OpenMythos:
    """The same model with the deltas of one loop added to its weights."""
    plain = tiny_model(tiny_config(**parts(model) | {"loop_lora": NoLoopLoRA()}))
    state = {k: v for k, v in model.state_dict().items() if ".lora." not in k}
    plain.load_state_dict(state)
    deltas = model.recurrent.conditioning.lora(loop)
    with torch.no_grad():
        for key, delta in deltas.items():
            module = plain.recurrent.layers.get_submodule(key)
            assert isinstance(module, Linear)
            module.weight += delta.up @ delta.down
    return plain


def parts(model: OpenMythos) -> dict[str, object]:
    names = ("attention", "recurrent_feed_forward", "recurrent_layers", "loop_lora")
    return {name: getattr(model.config, name) for name in names}


@pytest.mark.parametrize("feed_forward", members(FeedForward), ids=name_of)
@pytest.mark.parametrize("attention", members(Attention), ids=name_of)
@torch.no_grad()
def test_low_rank_deltas_equal_merged_weights(
    attention: Attention, feed_forward: FeedForward
) -> None:
    """One loop of a model with deltas everywhere; also decoding, where they merge into kv_up."""
    config = tiny_config(
        attention=attention,
        recurrent_feed_forward=feed_forward,
        recurrent_layers=2,
        loop_lora=LoopLoRA(rank=3, num_loops=2, targets=("*",)),
    )
    model, tokens = tiny_model(config), random_tokens(2)
    merged = without_lora(model, 0)
    wanted = merged(tokens, num_loops=1).logits
    torch.testing.assert_close(model(tokens, num_loops=1).logits, wanted, rtol=1e-4, atol=1e-5)
    cache = model.new_cache(2, 12, num_loops=1)
    for i in range(12):
        logits = model(tokens[:, i : i + 1], num_loops=1, cache=cache).logits
        cache.advance(1)
        torch.testing.assert_close(logits[:, 0], wanted[:, i], rtol=1e-4, atol=2e-5)
    changed = tiny_model(config, scale=0.0)(tokens, num_loops=1).logits
    assert not torch.allclose(changed, wanted, atol=0.01)


def test_loops_have_deltas_of_their_own_and_share_the_last() -> None:
    lora = tiny_model(tiny_config(loop_lora=LoopLoRA(num_loops=3))).recurrent.conditioning.lora
    assert isinstance(lora, LoopLoRALayer)
    deltas = [lora(loop) for loop in (0, 1, 2, 3, 1000)]
    key = next(iter(deltas[0]))
    for i in range(2):
        assert not torch.equal(deltas[i][key].up, deltas[i + 1][key].up)
    for later in deltas[3:]:
        assert all(torch.equal(later[k].up, deltas[2][k].up) for k in later)
        assert all(torch.equal(later[k].down, deltas[2][k].down) for k in later)


@torch.no_grad()
def test_untrained_deltas_change_nothing() -> None:
    """`up` starts at zero, so a model with LoRA starts as the model without, but for rounding."""
    tokens = random_tokens(2)
    with_lora = OpenMythos(tiny_config(loop_lora=LoopLoRA(targets=("*",))), seed=0).eval()
    plain = OpenMythos(tiny_config(loop_lora=NoLoopLoRA()), seed=1).eval()
    plain.load_state_dict({k: v for k, v in with_lora.state_dict().items() if ".lora." not in k})
    ours, theirs = (m(tokens, num_loops=4).logits for m in (with_lora, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", ["attention.output", "attention.*", "*down*", "*"])
def test_patterns_choose_linear_maps(target: str) -> None:
    model = OpenMythos(tiny_config(loop_lora=LoopLoRA(targets=(target,)), recurrent_layers=2))
    lora, layers = model.recurrent.conditioning.lora, model.recurrent.layers
    expected = {
        f"{index}.{name}"
        for index, layer in enumerate(layers)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and fnmatchcase(name, target)
    }
    assert set(lora(0)) == expected != set()
    for key, delta in lora(0).items():
        linear = layers.get_submodule(key)
        assert (delta.up @ delta.down).shape == linear.weight.shape
    # Only maps inside the loop can be told apart by it.
    outside = [*model.prelude.modules(), *model.coda.modules()]
    assert not any(module.delta_key for module in outside if isinstance(module, Linear))


def test_a_target_that_names_nothing_is_refused() -> None:
    config = tiny_config(loop_lora=LoopLoRA(targets=("attention.outptu",)))
    message = (
        r"targets = 'attention\.outptu': names no linear map of a recurrent layer; "
        r"known: attention\.kv_down, .*attention\.output"
    )
    with pytest.raises(ConfigError, match=message):
        OpenMythos(config)


@torch.no_grad()
def test_the_embedding_is_added_to_the_state_of_its_loop() -> None:
    config = tiny_config(loop_embedding=LoopEmbedding(num_loops=3))
    model = tiny_model(config)
    embedding = model.recurrent.conditioning.embedding
    assert [embedding(loop).tolist() for loop in range(5)] == [
        embedding.table[min(loop, 2)].tolist() for loop in range(5)
    ]
    # With silent layers, the state after a loop is the injection's output plus the embedding.
    for layer in model.recurrent.layers:
        layer.attention.output.weight.zero_()
        for parameter in layer.feed_forward.parameters():
            parameter.zero_()
    out = model(random_tokens(2), num_loops=5, collect_loops=range(1, 6))
    embedding.table.zero_()
    plain = model(random_tokens(2), num_loops=1).recurrence.state
    expected = torch.zeros_like(plain)
    decay, _ = model.recurrent.injection.discretize()
    table = tiny_model(config).recurrent.conditioning.embedding.table
    for loop, state in enumerate(out.recurrence.states.values()):
        expected = decay * expected + plain + table[min(loop, 2)]
        torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-5)


def test_every_trained_loop_gets_gradients_and_later_rows_none() -> None:
    parts = {"loop_embedding": LoopEmbedding(num_loops=4), "loop_lora": LoopLoRA(num_loops=4)}
    model = tiny_model(tiny_config(**parts))
    model(random_tokens(2), num_loops=3).logits.square().sum().backward()
    conditioning = model.recurrent.conditioning
    for parameter in conditioning.parameters():
        assert parameter.shape[0] == 4
        per_loop = parameter.grad.flatten(1).abs().sum(1)
        assert (per_loop[:3] > 0).all() and per_loop[3] == 0


def test_none_means_none() -> None:
    assert NoLoopEmbedding().build(DIM) is None
    parts = {"loop_embedding": NoLoopEmbedding(), "loop_lora": NoLoopLoRA()}
    conditioning = OpenMythos(tiny_config(**parts)).recurrent.conditioning
    assert conditioning(3) == (None, NO_DELTAS)
    assert not list(conditioning.parameters())


@pytest.mark.parametrize(
    "cls, field", [(LoopEmbedding, "num_loops"), (LoopLoRA, "num_loops"), (LoopLoRA, "rank")]
)
def test_sizes_are_positive(cls: type, field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} = 0: must be an integer, at least 1"):
        cls(**{field: 0})
