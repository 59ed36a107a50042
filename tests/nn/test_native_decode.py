"""Native layers give the logits and tokens of the modules, and see changes of them."""

import copy
import logging
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from variants import FEW_VARIANT_IDS, FEW_VARIANTS, random_tokens, tiny_config, tiny_model

from openmythos import OpenMythos, kernels
from openmythos.inference.decode import Eager, Step
from openmythos.inference.generation import Request, decode_one_token, prefill, stream
from openmythos.kernels import native
from openmythos.kernels.few_rows import Places
from openmythos.kernels.few_rows_native import NativeLayer, PreparedLayer
from openmythos.model.config import MythosConfig
from openmythos.nn import few_rows
from openmythos.nn.block import Block, Layers
from openmythos.nn.moe import MoE
from openmythos.nn.value_embedding import NoValueEmbeddings
from openmythos.recurrence.exit_rules import StateChangeExit
from openmythos.recurrence.loop_lora import LoopLoRA

pytestmark = pytest.mark.skipif(native.library("few_rows") is None, reason="no C++ compiler")

PROMPT = random_tokens(3, 5)
# The second row has two tokens of padding on the left.
PADDED = torch.tensor([[True] * 5, [False, False, True, True, True], [True] * 5])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each native call."""
    rows: list[int] = []
    call = PreparedLayer.__call__

    def counted(self: PreparedLayer, x: Tensor, *rest: Any) -> Tensor:
        rows.append(len(x))
        return call(self, x, *rest)

    monkeypatch.setattr(PreparedLayer, "__call__", counted)
    return rows


def steps(model: OpenMythos, request: Request, mask: Tensor | None = None) -> list[Tensor]:
    """Logits of a few decoded tokens, the same whatever they are."""
    with torch.no_grad():
        cache = model.new_cache(len(PROMPT), 9, num_loops=request.num_loops)
        logits = [prefill(model, PROMPT, request, cache, mask)[0]]
        for column in random_tokens(len(PROMPT), 3, seed=4).unbind(1):
            logits.append(decode_one_token(model, column, request, cache)[0])
    return logits


def same_with_and_without(model: OpenMythos, mask: Tensor | None = None) -> None:
    request = Request(num_loops=3)
    with kernels.use("torch"):
        wanted = steps(model, request, mask)
    for found, one in zip(steps(model, request, mask), wanted, strict=True):
        torch.testing.assert_close(found, one, rtol=1e-5, atol=1e-5)


def expected_calls(config: MythosConfig) -> bool:
    """Whether every layer of a model has a native form."""
    return isinstance(config.value_embeddings, NoValueEmbeddings)


@pytest.mark.parametrize("config", FEW_VARIANTS, ids=FEW_VARIANT_IDS)
def test_every_variant_has_the_same_logits(config: MythosConfig, calls: list[int]) -> None:
    model = tiny_model(config).eval()
    same_with_and_without(model)
    same_with_and_without(model, PADDED)
    assert calls
    if expected_calls(config):
        # The prelude of three decoded tokens, at least, in both runs.
        assert len(calls) >= 6 * len(model.prelude)


def lora_model() -> OpenMythos:
    moe = MoE(num_experts=4, top_k=2, expert_dim=16)
    lora = LoopLoRA(rank=2, num_loops=2, targets=("*",))
    return tiny_model(tiny_config(recurrent_feed_forward=moe, loop_lora=lora)).eval()


def test_one_loop_index_serves_all_rows() -> None:
    """The kernel reads an index of every row: one past the end is anything."""
    lora = LoopLoRA(rank=2, num_loops=2, targets=("*",))
    for kind in ({}, {"recurrent_feed_forward": MoE(num_experts=4, top_k=2, expert_dim=16)}):
        model, request = tiny_model(tiny_config(loop_lora=lora, **kind)), Request(num_loops=3)
        caches = [model.new_cache(len(PROMPT), 9, num_loops=3) for _ in range(2)]
        with torch.no_grad():
            (logits, _), _ = [prefill(model, PROMPT, request, cache) for cache in caches]
            step = Step(model, caches[1], 3, request.exit_rule, Eager())
            wanted, _ = decode_one_token(model, logits.argmax(dim=-1), request, caches[0])
            found, _ = step(logits.argmax(dim=-1), caches[1])
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_the_kernel_is_given_a_number_for_every_row() -> None:
    lora = LoopLoRA(rank=2, num_loops=2, targets=("*",))
    model = tiny_model(tiny_config(loop_lora=lora))
    block = cast("Block", model.prelude[0])
    layer = NativeLayer(few_rows.layer_weights(block))
    kv = torch.zeros(1, 3, 4, block.attention.kv_width)
    with torch.no_grad(), pytest.raises(AssertionError, match="2 numbers for 3 rows"):
        layer(torch.zeros(3, 32), Places(kv=kv, column=torch.zeros(2, dtype=torch.long)), {})


def test_generated_tokens_are_the_same(calls: list[int]) -> None:
    model, request = lora_model(), Request(max_new_tokens=6, num_loops=3)
    found = [step.tokens for step in stream(model, PROMPT, request, PADDED)]
    assert len(calls) == 5 * (len(model.prelude) + 3 + len(model.coda))
    with kernels.use("torch"):
        wanted = [step.tokens for step in stream(model, PROMPT, request, PADDED)]
    assert torch.equal(torch.stack(found), torch.stack(wanted))


def test_with_an_exit_rule_the_loops_of_running_rows_are_native(calls: list[int]) -> None:
    model = lora_model()
    request = Request(max_new_tokens=6, num_loops=3, exit_rule=StateChangeExit(threshold=0.3))
    found = list(stream(model, PROMPT, request))
    assert calls
    with kernels.use("torch"):
        wanted = list(stream(model, PROMPT, request))
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.loops_used, b.loops_used)


@pytest.mark.parametrize("forms", ["torch", "reference"])
def test_the_off_switch(forms: Any, calls: list[int]) -> None:
    with kernels.use(forms):
        steps(lora_model(), Request(num_loops=3))
    assert not calls


def optimizer_step(model: OpenMythos) -> None:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.losses(PROMPT, PROMPT, num_loops=2).cross_entropy.backward()
    optimizer.step()
    model.eval()


def other_weights(model: OpenMythos) -> dict[str, Tensor]:
    other = tiny_model(model.config, seed=3)
    return other.state_dict()


class Doubled(nn.Linear):
    """An adapter that replaces a map, as peft does."""

    delta_key = ""

    def forward(self, x: Tensor, deltas: Any = None) -> Tensor:
        return 2 * super().forward(x)


def replace_a_map(model: OpenMythos) -> None:
    old = model.prelude[0].attention.output
    new = Doubled(old.in_features, old.out_features, bias=False)
    new.weight = old.weight
    model.prelude[0].attention.output = new


def hook(model: OpenMythos) -> None:
    model.prelude[0].feed_forward.register_forward_hook(lambda m, x, y: (2 * y[0], y[1]))


def patched_forward(model: OpenMythos) -> None:
    layer = model.prelude[0].feed_forward
    forward = layer.forward
    layer.forward = lambda x, view: (2 * forward(x, view)[0], None)


CHANGES: dict[str, Callable[[OpenMythos], object]] = {
    "optimizer step": optimizer_step,
    "load_state_dict": lambda model: model.load_state_dict(other_weights(model)),
    "assigned": lambda model: model.load_state_dict(other_weights(model), assign=True),
    "replaced map": replace_a_map,
    "hook": hook,
    "forward of its own": patched_forward,
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_seen(name: str, calls: list[int]) -> None:
    model = lora_model()
    before = steps(model, Request(num_loops=3))[1]
    CHANGES[name](model)
    count = len(calls)
    same_with_and_without(model)
    assert len(calls) > count
    assert not torch.allclose(steps(model, Request(num_loops=3))[1], before, atol=1e-4)


def test_a_copy_computes_with_its_own_weights() -> None:
    model = lora_model()
    wanted = steps(model, Request(num_loops=3))
    twin = copy.deepcopy(model)
    optimizer_step(model)
    assert all(map(torch.equal, steps(twin, Request(num_loops=3)), wanted))


def test_bf16_weights_are_native_and_close_to_torch(calls: list[int]) -> None:
    model, request = lora_model().to(torch.bfloat16), Request(num_loops=3)
    found = steps(model, request)[-1]
    assert calls
    with kernels.use("torch"):
        wanted = steps(model, request)[-1]
    torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.1)


def test_where_modules_must_run_they_do(calls: list[int], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model, request = lora_model(), Request(num_loops=3)
    with torch.autocast("cpu", torch.bfloat16):
        steps(model, request)
    steps(copy.deepcopy(model).double(), request)
    cache = model.new_cache(len(PROMPT), 9, num_loops=3)
    model(PROMPT, cache=cache, num_loops=3)  # with gradient
    model(PROMPT[:, :1], num_loops=3)
    assert not calls
    few_rows._REASONS.clear()
    few_rows.native_layer(copy.deepcopy(model).half().prelude[0])
    assert [r.message for r in caplog.records if r.name == few_rows.__name__] == [
        "a layer is decoded by torch, not by the native kernel: weights are torch.float16"
    ]
    assert Layers.decode is few_rows.decode
