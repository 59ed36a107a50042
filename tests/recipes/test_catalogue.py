"""The recipes are whole configs that survive being written down."""

from pathlib import Path
from typing import Any

import pytest

from openmythos.config import ConfigError
from openmythos.files import load_toml, save_toml
from openmythos.planning import cost
from openmythos.recipes import catalogue
from openmythos.train.config import RunConfig
from openmythos.train.optim import WSD, Muon


@pytest.mark.parametrize("name", catalogue.RECIPES)
def test_recipe_survives_its_file(name: str, tmp_path: Path) -> None:
    config = catalogue.get(name)
    save_toml(config, tmp_path / "config.toml")
    assert load_toml(RunConfig, tmp_path / "config.toml") == config
    assert catalogue.get(name) == config


@pytest.mark.parametrize("name", ["tiny", "demo", "small"])
def test_recipe_fits_a_laptop_and_uses_everything(name: str) -> None:
    config = catalogue.get(name)
    assert cost.parameters(config.model).total < 1e7
    assert config.model.recurrent_feed_forward.kind == "moe"
    assert config.model.injection.kind == "lti"
    assert config.train.seq_len <= config.model.context
    assert config.data.paths == ("stdlib",)


def test_parcaes_recipe_is_the_papers() -> None:
    config = catalogue.get("parcae-140m")
    train = config.train
    tokens = train.num_steps * train.batch_size * train.seq_len
    assert tokens == pytest.approx(11.2e9, rel=1e-4)
    assert (train.loops.mean_loops, train.loops.per, train.backprop_loops) == (8.0, "sequence", 4)
    assert train.schedule == WSD(warmup=0.0, decay=0.5, final=0.0)
    optimizer = train.optimizer
    assert isinstance(optimizer, Muon)
    # A matrix with 768 columns: their step has singular values of sqrt(rows / columns) times the
    # rate, ours of 0.2 sqrt(rows) times it; decay per step is rate times weight decay in both.
    assert optimizer.lr * 0.2 * 3072**0.5 == pytest.approx(8e-3 * (3072 / 768) ** 0.5)
    assert optimizer.lr * optimizer.adamw_lr_scale == pytest.approx(8e-3)
    assert optimizer.lr * optimizer.weight_decay == pytest.approx(8e-3 * 0.2)
    assert optimizer.final_decay == 0.0
    mini = catalogue.get("parcae-mini")
    assert cost.parameters(mini.model).total < 2e6
    assert mini.train.loops == train.loops and mini.train.schedule == train.schedule


@pytest.mark.parametrize("name", ["dem", "nonsense", ""])
def test_unknown_recipe_names_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError, match="recipe = ") as caught:
        catalogue.get(name)
    assert all(known in str(caught.value) for known in catalogue.RECIPES)


def test_recipes_cannot_be_changed_by_accident() -> None:
    recipes: Any = catalogue.RECIPES
    with pytest.raises(TypeError):
        recipes["other"] = catalogue.tiny
