"""Presets keep the promise of their names, without a single weight being allocated."""

import pytest
import torch

from openmythos import ConfigError, MythosConfig, OpenMythos, presets
from openmythos.config import from_dict, to_dict
from openmythos.nn.latent_attention import LatentAttention
from openmythos.planning import cost
from openmythos.recurrence.loop_lora import LoopLoRA

NAMED_BY_SIZE = [name for name in presets.names() if name[0].isdigit()]
UNITS = {"m": 1e6, "b": 1e9, "t": 1e12}

# As announced: loops, context, numbers cached per token and slot, parameters, active parameters.
ANNOUNCED = {
    "1b": (16, 2**12, 288, 1.06e9, 0.31e9),
    "3b": (16, 2**12, 416, 3.04e9, 0.78e9),
    "10b": (24, 2**13, 576, 9.98e9, 1.40e9),
    "50b": (32, 2**13, 576, 50.4e9, 5.2e9),
    "100b": (32, 2**20, 576, 99.6e9, 16.9e9),
    "500b": (48, 2**20, 1088, 498e9, 70e9),
    "1t": (64, 2**20, 1088, 999e9, 143e9),
}


def build(config: MythosConfig) -> OpenMythos:
    with torch.device("meta"):
        return OpenMythos(config)


@pytest.mark.parametrize("name", NAMED_BY_SIZE)
def test_the_name_states_the_measured_number_of_parameters(name: str) -> None:
    count = sum(parameter.numel() for parameter in build(presets.get(name)).parameters())
    assert count == pytest.approx(float(name[:-1]) * UNITS[name[-1]], rel=0.05)


@pytest.mark.parametrize("name", ANNOUNCED)
def test_the_large_presets_are_the_announced_ones(name: str) -> None:
    config = presets.get(name)
    loops, context, cached, total, active = ANNOUNCED[name]
    assert (config.num_loops, config.context) == (loops, context)
    assert config.attention.kv_width(config.dim) == cached
    assert isinstance(config.attention, LatentAttention)
    count = cost.parameters(config)
    assert count.total == pytest.approx(total, rel=0.05)
    assert count.active == pytest.approx(active, rel=0.05)


def test_presets_stand_in_order_of_size() -> None:
    totals = [cost.parameters(presets.get(name)).total for name in presets.names()]
    assert totals == sorted(totals)
    assert totals[0] < 1e6
    assert 4e6 < totals[1] < 6e6


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_built_on_the_meta_device_allocates_nothing(name: str) -> None:
    model = build(presets.get(name))
    assert all(x.is_meta for x in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("name", presets.names())
def test_every_loop_of_a_preset_has_deltas_of_its_own(name: str) -> None:
    config = presets.get(name)
    if isinstance(config.loop_lora, LoopLoRA):
        assert config.loop_lora.num_loops == config.num_loops


@pytest.mark.parametrize("name", presets.names())
def test_presets_survive_being_written_down(name: str) -> None:
    config = presets.get(name)
    assert from_dict(MythosConfig, to_dict(config)) == config


def test_tiny_runs() -> None:
    config = presets.tiny()
    tokens = torch.randint(config.vocab_size, (2, 8))
    assert OpenMythos(config, seed=0)(tokens).logits.isfinite().all()


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"'tinny': unknown preset, did you mean 'tiny'\? known: tiny, s"
    ):
        presets.get("tinny")
    with pytest.raises(ConfigError, match="'7b': unknown preset"):
        presets.get("7b")
