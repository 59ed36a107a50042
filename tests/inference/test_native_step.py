"""Steps of native calls that are arranged once give what the model gives, and see its changes."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from variants import FEW_VARIANT_IDS, FEW_VARIANTS, random_tokens, tiny_config, tiny_model

from openmythos import OpenMythos, kernels
from openmythos.inference import native_step
from openmythos.inference.contrast import NoContrast
from openmythos.inference.generation import Request, decode_one_token, prefill
from openmythos.kernels import native
from openmythos.model.config import MythosConfig
from openmythos.nn.cache import FirstLoopCache, GroupedLoopCache, KVCache, LastLoopCache
from openmythos.recurrence.exit_rules import FixedExit, StateChangeExit
from openmythos.recurrence.loop_embedding import LoopEmbedding
from openmythos.recurrence.loop_lora import LoopLoRA

pytestmark = pytest.mark.skipif(native.library("few_rows") is None, reason="no C++ compiler")

PADDED = torch.tensor([[True] * 5, [False, False, True, True, True]])
Change = Callable[[OpenMythos, KVCache], object]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The loops of each step that is arranged."""
    found: list[int] = []
    start = native_step.NativeStep.__init__

    def counted(self: Any, model: Any, cache: Any, num_loops: int, *rest: Any) -> None:
        found.append(num_loops)
        start(self, model, cache, num_loops, *rest)

    monkeypatch.setattr(native_step.NativeStep, "__init__", counted)
    return found


def decoded(
    model: OpenMythos,
    request: Request,
    *,
    rows: int = 2,
    mask: Tensor | None = None,
    change: Change = lambda model, cache: None,
) -> list[tuple[Tensor, Tensor]]:
    """(logits, loops) of six tokens, the same whatever is computed; `change` is after three."""
    model, found = copy.deepcopy(model), []
    with torch.no_grad():
        cache = model.new_cache(
            rows, 12, num_loops=4, prefill=request.prefill, decode=request.decode
        )
        prefill(model, random_tokens(rows, 5), request, cache, mask)
        for index, column in enumerate(random_tokens(rows, 6, seed=4).unbind(1)):
            if index == 3:
                change(model, cache)
            found.append(decode_one_token(model, column, request, cache))
    return found


def check(model: OpenMythos, request: Request, **options: Any) -> None:
    with kernels.use("torch"):
        wanted = decoded(model, request, **options)
    found = decoded(model, request, **options)
    for (logits, loops), (own, used) in zip(found, wanted, strict=True):
        torch.testing.assert_close(logits, own, rtol=1e-5, atol=1e-5)
        assert torch.equal(loops, used)


@pytest.mark.parametrize("config", FEW_VARIANTS, ids=FEW_VARIANT_IDS)
def test_every_variant(config: MythosConfig) -> None:
    for mask in (None, PADDED):
        check(tiny_model(config).eval(), Request(num_loops=3), mask=mask)


def full_model() -> OpenMythos:
    """With all that differs between loops, a window, and norms around the loop."""
    parts = {"prelude_norm": True, "loop_norm": "weighted", "readout_norm": True}
    own = {"loop_embedding": LoopEmbedding(num_loops=2), "loop_lora": LoopLoRA(rank=2, num_loops=2)}
    return tiny_model(tiny_config(**parts, **own, readout_map=True)).eval()


@pytest.mark.parametrize(
    "policy", [LastLoopCache(), FirstLoopCache(), GroupedLoopCache(group=2)], ids=lambda p: p.kind
)
def test_cache_policies(policy: Any, made: list[int]) -> None:
    check(full_model(), Request(num_loops=3, decode=policy))
    check(full_model(), Request(num_loops=3, prefill=policy, decode=policy))
    assert made == [3, 3]


def test_one_row_may_stop_early(made: list[int]) -> None:
    rule = StateChangeExit(threshold=0.5)
    request = Request(num_loops=4, exit_rule=rule)
    loops = {int(used) for _, used in decoded(full_model(), request, rows=1)}
    assert made == [4] and min(loops) < 4
    check(full_model(), request, rows=1)
    check(full_model(), request, rows=2)  # rows that stop at different loops: by the model


def reordered(model: OpenMythos, cache: KVCache) -> None:
    cache.select_rows(torch.tensor([1, 0]))


def hooked(model: OpenMythos, cache: KVCache) -> None:
    model.recurrent.layers[0].feed_forward.register_forward_hook(lambda m, x, y: (2 * y[0], y[1]))


def hooked_part(model: OpenMythos, cache: KVCache) -> None:
    model.coda.register_forward_hook(lambda m, x, y: (2 * y[0], y[1]))


def other_rates(model: OpenMythos, cache: KVCache) -> None:
    injection = model.recurrent.injection
    for parameter in injection.parameters():
        parameter.data.mul_(0.5)


def other_deltas(model: OpenMythos, cache: KVCache) -> None:
    lora = model.recurrent.conditioning.lora
    for key in lora.up:
        lora.up[key] = nn.Parameter(torch.ones_like(lora.up[key]))


def other_weights(model: OpenMythos, cache: KVCache) -> None:
    state = tiny_model(model.config, seed=3).state_dict()
    model.load_state_dict(state, assign=True)


CHANGES: dict[str, tuple[Change, int]] = {
    "rows in another order": (reordered, 2),
    "more room": (lambda model, cache: cache.reserve(40), 2),
    "hook of a layer": (hooked, 1),
    "hook of a part": (hooked_part, 1),
    "other rates": (other_rates, 1),
    "other deltas": (other_deltas, 2),
    "other weights": (other_weights, 2),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_between_tokens_are_seen(name: str, made: list[int]) -> None:
    change, steps = CHANGES[name]
    for mask in (None, PADDED):
        made.clear()
        check(full_model(), Request(num_loops=3), mask=mask, change=change)
        assert made == [3] * steps


@pytest.mark.parametrize("first", [False, True])
def test_more_loops_than_a_cache_has_places_for_are_refused(first: bool) -> None:
    model = full_model()
    cache = model.new_cache(1, 8, num_loops=2)
    text = "^num_loops = 3: the cache was made for at most 2 loops$"

    def next_logits(tokens: list[int], num_loops: int) -> None:
        model.next_logits(
            torch.tensor([tokens]),
            num_loops=num_loops,
            exit_rule=FixedExit(),
            attention_mask=None,
            cache=cache,
            contrast=NoContrast(),
        )

    with torch.inference_mode():
        if not first:
            next_logits([1, 2], 2)
        with pytest.raises(ValueError, match=text):
            next_logits([3], 3)
        assert cache.length == (0 if first else 2)
