"""torch.compile of the shared layers changes nothing: forward, backward and generation.

Code generation takes half a minute here, so the quick tests stop after tracing ("aot_eager").
"""

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from variants import (
    assert_gradients_close,
    gradients,
    members,
    name_of,
    random_tokens,
    tiny_config,
    tiny_model,
)

from openmythos.model.mythos import OpenMythos
from openmythos.nn.block import Attention, FeedForward
from openmythos.nn.moe import MoE
from openmythos.recurrence.halting import Halting
from openmythos.recurrence.loop_lora import LoopLoRA

pytestmark = [
    pytest.mark.compile,
    # Dynamo itself asks every input of a graph for its gradient.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
CLOSE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}
TRACED = {"backend": "aot_eager"}
ALONE = {"prelude_layers": 0, "coda_layers": 0}  # the looped layers: half as much to trace


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pair(options: dict[str, Any], **parts: Any) -> tuple[OpenMythos, OpenMythos]:
    """The same model twice, the second compiled."""
    config = tiny_config(loop_lora=LoopLoRA(rank=2, num_loops=2), **parts)
    eager, compiled = tiny_model(config), tiny_model(config)
    compiled.compile_layers(**options)
    return eager, compiled


def check_training(eager: OpenMythos, compiled: OpenMythos, num_loops: Any) -> None:
    results = []
    for model in (eager.train(), compiled.train()):
        out = model(random_tokens(2), num_loops=num_loops)
        loss = out.logits.square().sum()
        loss = loss + sum(stats.balance + stats.z for stats in out.router.values())
        loss.backward()
        results.append((out, gradients(model)))
    (wanted, wanted_gradients), (found, found_gradients) = results
    torch.testing.assert_close(found.logits, wanted.logits, **CLOSE)
    assert_gradients_close(found_gradients, wanted_gradients)
    for name, stats in wanted.router.items():
        assert torch.equal(found.router[name].counts, stats.counts)


@torch.no_grad()
def check_generation(eager: OpenMythos, compiled: OpenMythos) -> None:
    prompt = random_tokens(2, 6)
    tokens = [m.generate(prompt, max_new_tokens=5, num_loops=3) for m in (eager, compiled)]
    assert torch.equal(*tokens)
    logits = []
    for model in (eager.eval(), compiled.eval()):
        cache = model.new_cache(2, 11, num_loops=3)
        for part in (prompt, *tokens[0][:, :-1].split(1, dim=1)):
            logits.append(model(part, num_loops=3, cache=cache).logits)
            cache.advance(part.shape[1])
    ours, theirs = logits[: len(logits) // 2], logits[len(logits) // 2 :]
    torch.testing.assert_close(torch.cat(theirs, dim=1), torch.cat(ours, dim=1), **CLOSE)


def test_latent_attention_and_experts_train_as_in_eager_mode() -> None:
    experts = MoE(num_experts=4, top_k=2, expert_dim=16)
    check_training(*pair(TRACED, **ALONE, recurrent_feed_forward=experts), num_loops=3)


@pytest.mark.slow
def test_few_tokens_meet_their_experts_one_by_one_in_compiled_code_too() -> None:
    parts = {"recurrent_feed_forward": MoE(num_experts=24, top_k=2, expert_dim=16)}
    check_generation(*pair(TRACED, **parts))


def test_one_graph_of_each_layer_without_breaks_serves_all_loops() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    config = tiny_config()
    model = tiny_model(config)
    model.compile_layers(backend=counter, fullgraph=True)
    for num_loops in (1, 3, 9):
        model(random_tokens(2), num_loops=num_loops)
        # The shared layers; a layer of prelude or coda.
        assert counter.frame_count == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@torch.no_grad()
def test_a_copy_of_a_compiled_model_computes_with_its_own_weights(copied: Any) -> None:
    """As an average of weights needs it: the copy's are changed, the original's are not."""
    eager, compiled = pair(TRACED, **ALONE)
    tokens = random_tokens(2)
    kept = compiled(tokens, num_loops=3).logits
    copy_of = copied(compiled)
    torch.testing.assert_close(copy_of(tokens, num_loops=3).logits, kept, **CLOSE)
    for model in (copy_of, eager):
        for parameter in model.recurrent.parameters():
            parameter.zero_()
    wanted = eager(tokens, num_loops=3).logits
    assert (wanted - kept).abs().max() > 0.01
    torch.testing.assert_close(copy_of(tokens, num_loops=3).logits, wanted, **CLOSE)
    assert torch.equal(compiled(tokens, num_loops=3).logits, kept)
    copy_of.compile_layers(**TRACED)
    torch.testing.assert_close(copy_of(tokens, num_loops=3).logits, wanted, **CLOSE)


@pytest.mark.slow
def test_generated_code_trains_and_generates_as_in_eager_mode() -> None:
    models = pair({}, recurrent_feed_forward=MoE(num_experts=4, top_k=2, expert_dim=16))
    check_training(*models, num_loops=3)
    check_generation(*models)


@pytest.mark.slow
@pytest.mark.parametrize("halting", members(Halting), ids=name_of)
@pytest.mark.parametrize("feed_forward", members(FeedForward), ids=name_of)
@pytest.mark.parametrize("attention", members(Attention), ids=name_of)
def test_every_variant_trains_and_generates_as_in_eager_mode(
    attention: Attention, feed_forward: FeedForward, halting: Halting
) -> None:
    models = pair(TRACED, attention=attention, recurrent_feed_forward=feed_forward, halting=halting)
    check_training(*models, num_loops=torch.tensor([3, 2]))
    check_generation(*models)
