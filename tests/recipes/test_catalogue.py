"""The recipes are whole configs that survive being written down."""

from pathlib import Path
from typing import Any

import pytest

from openmythos.config import ConfigError, load_toml, save_toml
from openmythos.model import cost
from openmythos.recipes import catalogue
from openmythos.train.config import RunConfig


@pytest.mark.parametrize("name", catalogue.RECIPES)
def test_recipe_survives_its_file(name: str, tmp_path: Path) -> None:
    config = catalogue.get(name)
    save_toml(config, tmp_path / "config.toml")
    assert load_toml(RunConfig, tmp_path / "config.toml") == config
    assert catalogue.get(name) == config


@pytest.mark.parametrize("name", catalogue.RECIPES)
def test_recipe_fits_a_laptop_and_uses_everything(name: str) -> None:
    config = catalogue.get(name)
    assert cost.parameters(config.model).total < 1e7
    assert config.model.recurrent_feed_forward.kind == "moe"
    assert config.model.injection.kind == "lti"
    assert config.train.seq_len <= config.model.context
    assert config.data.paths == ("stdlib",)


@pytest.mark.parametrize("name", ["dem", "nonsense", ""])
def test_unknown_recipe_names_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError, match="recipe = ") as caught:
        catalogue.get(name)
    assert all(known in str(caught.value) for known in catalogue.RECIPES)


def test_recipes_cannot_be_changed_by_accident() -> None:
    recipes: Any = catalogue.RECIPES
    with pytest.raises(TypeError):
        recipes["other"] = catalogue.tiny
