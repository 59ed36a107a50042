"""A decoding step of fixed shapes computes what the model computes, however it is run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from variants import (
    CACHE_POLICIES,
    COMBINATIONS,
    EXIT_RULES,
    VARIANTS,
    random_tokens,
    tiny_config,
    tiny_model,
)

from openmythos.inference import graphs
from openmythos.inference.compiled import CompiledModel
from openmythos.inference.contrast import NoContrast
from openmythos.inference.decode import Eager, Step, begin, one_loop, unsupported
from openmythos.inference.generation import Request, decode_one_token, prefill, stream
from openmythos.inference.sampling import Sampling
from openmythos.model.mythos import OpenMythos
from openmythos.nn.cache import ExactCache
from openmythos.recurrence.exit_rules import KLExit, StateChangeExit

RULES = [rule for rule in EXIT_RULES if not unsupported(rule, NoContrast())]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def left_padded(rows: int, seq: int) -> Tensor:
    mask = torch.ones(rows, seq, dtype=torch.bool)
    mask[0, : seq // 2] = False
    return mask


def tokens_of(model: Any, prompt: Tensor, request: Request, mask: Tensor | None = None) -> Tensor:
    """The new tokens [batch, seq] and, below them, the loops that they took."""
    steps = list(stream(model, prompt, request, mask))
    return torch.stack([torch.cat((x.tokens, x.loops_used)) for x in steps], dim=1)


@given(
    config=st.sampled_from([*VARIANTS, *COMBINATIONS]),
    policy=st.sampled_from(CACHE_POLICIES),
    rule=st.sampled_from(RULES),
    padded=st.booleans(),
    fixed=st.booleans(),
    rows=st.integers(1, 3),
)
@torch.no_grad()
def test_a_step_equals_the_pass_of_one_token(
    config: Any, policy: Any, rule: Any, padded: bool, fixed: bool, rows: int
) -> None:
    model = tiny_model(config)
    request = Request(num_loops=4, exit_rule=rule, prefill=policy, decode=policy)
    prompt, mask = random_tokens(rows, 5), left_padded(rows, 5) if padded else None
    caches = [
        model.new_cache(rows, 10, num_loops=4, prefill=policy, decode=policy) for _ in range(2)
    ]
    logits, _ = [prefill(model, prompt, request, cache, mask) for cache in caches][-1]
    step = Step(model, caches[1], 4, rule, Eager(fixed=fixed, bucket=4))
    for _ in range(4):
        token = logits.argmax(dim=-1)
        logits, loops = decode_one_token(model, token, request, caches[0])
        found, used = step(token, caches[1])
        torch.testing.assert_close(found, logits, **CLOSE)
        assert torch.equal(used, loops)


@pytest.mark.parametrize("config", COMBINATIONS[::5])
@torch.no_grad()
def test_rows_in_different_loops_share_a_step(config: Any) -> None:
    """Each row is at a loop and in a slot of its own, and computes what it computes alone."""
    model, exact, depths = tiny_model(config), ExactCache(), (0, 2, 1)
    request, prompt = Request(num_loops=4), random_tokens(3, 5)
    cache = model.new_cache(3, 8, num_loops=4, prefill=exact, decode=exact)
    prefill(model, prompt, request, cache)
    step = Step(model, cache, 4, request.exit_rule, Eager(fixed=True, bucket=8))
    places, masked = step.places(torch.tensor([3, 4, 5]), cache)
    kv = [view.storage for view in cache.views("prelude", 1)]
    state, drive, seen = begin(model, places, kv, masked, can_stop=False)
    slots = cache.slots("recurrent")
    starts, ends = [], []
    for row, depth in enumerate(depths):  # all rows together, up to the loop of this one
        own = state
        for loop in range(depth + 1):
            index = torch.full((3,), loop)
            before, own = own, one_loop(model, own, drive, seen, places, index, slots, index, None)
        starts.append(before.map(lambda x, row=row: x[row : row + 1]))
        ends.append(own.hidden[row])
    mixed = starts[0].map(lambda *x: torch.cat(x), *starts[1:])
    index = torch.tensor(depths)
    found = one_loop(model, mixed, drive, seen, places, index, slots, index, None)
    torch.testing.assert_close(found.hidden, torch.stack(ends), **CLOSE)


def test_without_a_compiler_decoding_is_eager_after_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Any, path: Path) -> None:
        raise RuntimeError("no C++ compiler\nlong text")

    monkeypatch.setattr(graphs._Traced, "compile", fails)
    model, said = tiny_model(tiny_config()), list[str]()
    request, prompt = Request(num_loops=3, max_new_tokens=5), random_tokens(2, 5)
    compiled = CompiledModel(model, tmp_path, said.append)
    assert torch.equal(tokens_of(compiled, prompt, request), tokens_of(model, prompt, request))
    refused = [line for line in said if "not compiled" in line]
    assert len(refused) == 3  # once for each region
    assert all(line.endswith("no C++ compiler") for line in refused)
    assert not list(tmp_path.iterdir())


def test_what_a_step_does_not_cover_is_said_once(tmp_path: Path) -> None:
    model, said = tiny_model(tiny_config()), list[str]()
    prompt = random_tokens(2, 5)
    compiled = CompiledModel(model, tmp_path, said.append)
    request = Request(num_loops=3, max_new_tokens=4, exit_rule=KLExit(threshold=0.01))
    for _ in range(2):
        assert torch.equal(tokens_of(compiled, prompt, request), tokens_of(model, prompt, request))
    assert said == ["decoding is not compiled: exit_rule kl reads the logits of every loop"]


COMPILED = [
    {},
    *({"halting": c.halting, "attention": c.attention} for c in COMBINATIONS[1::7]),
]


def check_all_modes(model: OpenMythos, compiled: CompiledModel) -> None:
    """Greedy and sampled, one row and several, padded, with and without an exit rule."""
    for rows in (1, 3):
        prompt = random_tokens(rows, 5)
        for request, mask in (
            (Request(num_loops=3, max_new_tokens=6), None),
            (Request(num_loops=5, max_new_tokens=6), left_padded(rows, 5)),
            (
                Request(
                    num_loops=4,
                    max_new_tokens=6,
                    sampling=Sampling(temperature=1.0, seed=3),
                    exit_rule=StateChangeExit(threshold=0.12),
                ),
                None,
            ),
        ):
            found = tokens_of(compiled, prompt, request, mask)
            assert torch.equal(found, tokens_of(model, prompt, request, mask))


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.parametrize("parts", COMPILED)
def test_compiled_code_generates_the_same_tokens(parts: dict[str, Any], tmp_path: Path) -> None:
    model, said = tiny_model(tiny_config(**parts)), list[str]()
    check_all_modes(model, CompiledModel(model, tmp_path, said.append))
    assert said and all(line.startswith("compiling") for line in said)
    again = list[str]()
    other = tiny_model(tiny_config(**parts), seed=5)
    loaded = CompiledModel(other, tmp_path, again.append)
    check_all_modes(other, loaded)
    assert not again  # the code is another model's, which has the same shapes
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    check_all_modes(other, loaded)
    other.load_state_dict(model.state_dict(), assign=True)
    check_all_modes(other, loaded)
    assert not again


@pytest.mark.gpu
@pytest.mark.parametrize("parts", COMPILED)
def test_captured_graphs_generate_the_same_tokens(parts: dict[str, Any]) -> None:
    said = list[str]()
    model = tiny_model(tiny_config(**parts)).to("cuda")
    compiled = CompiledModel(model, say=said.append)
    for _ in range(2):  # the second time in the first one's memory
        check_all_modes(model, compiled)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    check_all_modes(model, compiled)
    assert not said
