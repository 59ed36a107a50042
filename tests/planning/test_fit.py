"""What fits which devices: sums that must hold, and settings that training accepts."""

import pytest
import torch

from openmythos.config import ConfigError, apply_overrides
from openmythos.model import presets
from openmythos.planning import cost, fit
from openmythos.recipes import catalogue

SMALL, LARGE = presets.get("small"), presets.get("10b")


def settings(**changes: int) -> fit.Settings:
    usual = {"gpus": 8, "batch": 4, "micro_batch": 4, "checkpoint_loops": False}
    return fit.Settings(**(usual | changes))  # type: ignore[arg-type]


def test_one_device_needs_what_a_step_without_shards_needs() -> None:
    alone = fit.device_memory(SMALL, settings(gpus=1))
    whole = cost.training_memory(SMALL, batch=4, context=SMALL.context, dtype=torch.bfloat16)
    assert alone.total == whole.total
    assert alone.reduced == 0


def test_what_is_in_shards_is_shared_and_what_is_computed_is_not() -> None:
    few, many = (fit.device_memory(LARGE, settings(gpus=n)) for n in (8, 32))
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(many, name) == getattr(few, name) // 4
    for name in ("gathered", "reduced", "activations", "logits"):
        assert getattr(many, name) == getattr(few, name)


def test_each_way_out_saves_what_it_is_for() -> None:
    usual = fit.device_memory(LARGE, settings())
    checkpointed = fit.device_memory(LARGE, settings(checkpoint_loops=True))
    assert checkpointed.activations < usual.activations / 4
    total = cost.parameters(LARGE).total
    smaller = fit.device_memory(LARGE, settings(micro_batch=1))
    assert smaller.activations == usual.activations // 4
    # Until the last micro-batch every device keeps the gradients of all weights, in fp32.
    assert smaller.reduced - usual.reduced == 4 * (total - cost.parameters(LARGE).recurrent)
    shared = fit.device_memory(LARGE, settings(experts=8))
    routed = cost.parameters(LARGE).routed_experts
    assert usual.reduced - shared.reduced == 6 * (routed - routed // 8)
    assert shared.weights == usual.weights


@pytest.mark.parametrize("name", ["small", "1b", "10b"])
def test_what_is_found_fits_and_more_memory_needs_no_slower_settings(name: str) -> None:
    config = presets.get(name)
    former: fit.Fit | None = None
    order = list(fit._candidates(config, 8, 4))
    for gib in (1, 4, 16, 40, 80, 200, 1000):
        found = fit.find(config, gpus=8, memory=gib * 2**30, batch=4)
        assert found.fits == (found.memory.total <= found.usable)
        assert found.memory == fit.device_memory(config, found.settings)
        if former is not None and former.fits:
            assert found.fits
            assert order.index(found.settings) <= order.index(former.settings)
        former = found
    assert former is not None and former.settings == order[0]
    assert not fit.find(config, gpus=8, memory=2**20, batch=4).fits


def test_settings_are_those_of_training() -> None:
    recipe = catalogue.get("small")
    for chosen in fit._candidates(recipe.model, 4, 2):
        config = apply_overrides(recipe, chosen.overrides())
        assert config.train.batch_size == 8
        assert config.train.micro_batch_size == chosen.micro_batch
        assert config.train.checkpoint_loops == chosen.checkpoint_loops
        assert config.train.parallel.experts == chosen.experts
        assert config.train.parallel.gather == "bf16"


def test_experts_are_held_by_numbers_that_divide() -> None:
    # 16 experts on 24 devices
    assert {c.experts for c in fit._candidates(SMALL, 24, 1)} == {1, 2, 4, 8}
    dense = presets.get("140m")
    assert {c.experts for c in fit._candidates(dense, 24, 1)} == {1}


def test_wrong_sizes_are_named() -> None:
    with pytest.raises(ConfigError, match="gpus = 0"):
        fit.find(SMALL, gpus=0, memory=2**30)
    with pytest.raises(ConfigError, match="batch = 0"):
        fit.find(SMALL, gpus=1, memory=2**30, batch=0)
    with pytest.raises(ConfigError, match="memory = -1"):
        fit.find(SMALL, gpus=1, memory=-1)
