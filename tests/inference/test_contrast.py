"""Contrast of the last loop with an early one: by its formula, with a cache, from the settings."""

import pytest
import torch
from torch import Tensor
from variants import (
    EXIT_RULES,
    SEQ,
    VOCAB,
    members,
    name_of,
    random_tokens,
    tiny_config,
    tiny_model,
)

from openmythos.config import ConfigError, apply_overrides
from openmythos.inference.contrast import LoopContrast
from openmythos.inference.generation import Request, decode_one_token, prefill, stream
from openmythos.inference.sampling import Sampling
from openmythos.model.inputs import ModelInputs
from openmythos.model.mythos import OpenMythos
from openmythos.recurrence.exit_rules import ExitRule, FixedExit
from openmythos.recurrence.halting import Halting, NoHalting

LOOPS, EARLY = 5, 3


def request_with(contrast: LoopContrast, **changes: object) -> Request:
    return Request(num_loops=LOOPS, sampling=Sampling(contrast=contrast), **changes)  # type: ignore[arg-type]


def test_the_formula_by_hand() -> None:
    last = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, -9.0]])
    early = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, -9.0]])
    exp = [torch.e**2, torch.e, 1.0]
    unsure = 1 - (exp[0] - exp[1]) / sum(exp)
    by_hand = torch.tensor(
        [[2 + 0.5 * unsure, 1.0, -0.5 * unsure], [0.0, -0.5, -9.0]]  # the second row's tie: w = cap
    )
    torch.testing.assert_close(LoopContrast(cap=0.5).adjusted(last, early), by_hand)


def uncached(model: OpenMythos, tokens: Tensor, rule: ExitRule, contrast: LoopContrast) -> Tensor:
    """Logits of all positions: a position that stopped before the early loop keeps its state."""
    how = None if isinstance(rule, FixedExit) else rule
    out = model(tokens, num_loops=LOOPS, exit_rule=how, collect_loops=(EARLY,))
    inputs = ModelInputs.check(model.config, tokens, False, num_loops=LOOPS)
    stopped = (out.recurrence.loops_used < EARLY)[..., None]
    state = torch.where(stopped, out.recurrence.state, out.recurrence.outputs[EARLY])
    return contrast.adjusted(out.logits, model.logits(model.hidden(state, inputs)))


@pytest.mark.parametrize("coda_layers", [0, 2])
@pytest.mark.parametrize(
    ("halting", "rule"),
    [(halting, FixedExit()) for halting in members(Halting)]
    + [(NoHalting(), rule) for rule in EXIT_RULES],
    ids=name_of,
)
@torch.no_grad()
def test_cached_equals_uncached(halting: Halting, rule: ExitRule, coda_layers: int) -> None:
    config = tiny_config(halting=halting, coda_layers=coda_layers)
    model, tokens = tiny_model(config, scale=0.15), random_tokens(2)
    contrast = LoopContrast(cap=2.0, early=EARLY)
    full = uncached(model, tokens, rule, contrast)
    request = request_with(contrast, exit_rule=rule, prefill_chunk=3)
    cache = model.new_cache(2, SEQ, num_loops=LOOPS)
    cached = [prefill(model, tokens[:, :7], request, cache)[0]]
    for column in range(7, SEQ):
        cached.append(decode_one_token(model, tokens[:, column], request, cache)[0])
    torch.testing.assert_close(torch.stack(cached, dim=1), full[:, 6:], atol=1e-4, rtol=1e-4)
    plain = model(tokens, num_loops=LOOPS).logits
    assert not torch.allclose(full, plain, atol=1e-3)


@torch.no_grad()
def test_generation_follows_the_contrast() -> None:
    model, prompt = tiny_model(tiny_config(), scale=0.3), random_tokens(2)[:, :5]
    contrast, tokens = LoopContrast(cap=5.0, early=EARLY), prompt
    for _ in range(5):
        following = uncached(model, tokens, FixedExit(), contrast)[:, -1].argmax(dim=-1)
        tokens = torch.cat((tokens, following[:, None]), dim=1)
    steps = list(stream(model, prompt, request_with(contrast, max_new_tokens=5)))
    assert torch.equal(torch.stack([step.tokens for step in steps], dim=1), tokens[:, 5:])
    plain = model.generate(prompt, max_new_tokens=5, num_loops=LOOPS)
    assert not torch.equal(plain, tokens[:, 5:])


def test_settings_and_refusals() -> None:
    chosen = ["sampling.contrast=loops", "sampling.contrast.early=2", "sampling.contrast.cap=0.5"]
    request = apply_overrides(Request(num_loops=4), chosen)
    assert request.sampling.contrast == LoopContrast(cap=0.5, early=2)
    assert [LoopContrast(early=0.25).early_loops(n) for n in (2, 4, 16)] == [1, 1, 4]
    with pytest.raises(
        ConfigError, match=r"early = 2\S*: gives 2 early loops, which must be fewer"
    ):
        apply_overrides(request, ["num_loops=2"])
    with pytest.raises(
        ConfigError, match=r"early = 1.5: must be a whole number of loops, or below"
    ):
        LoopContrast(early=1.5)
    with pytest.raises(ConfigError, match="cap = 0"):
        LoopContrast(cap=0)


@torch.no_grad()
def test_a_cache_that_lacks_the_early_loop_is_refused() -> None:
    model, tokens = tiny_model(tiny_config(coda_layers=1)), random_tokens(2) % VOCAB
    cache = model.new_cache(2, SEQ, num_loops=LOOPS)
    prefill(model, tokens[:, :5], Request(num_loops=LOOPS), cache)
    with pytest.raises(ValueError, match="contrast: reads the logits after 3 loops"):
        decode_one_token(model, tokens[:, 5], request_with(LoopContrast(early=EARLY)), cache)
