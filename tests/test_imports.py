"""Every module of the package can be imported, those no other test touches included."""

import importlib
import pkgutil

import pytest

import openmythos

MODULES = [module.name for module in pkgutil.walk_packages(openmythos.__path__, "openmythos.")]


@pytest.mark.parametrize("name", MODULES)
def test_module_can_be_imported(name: str) -> None:
    importlib.import_module(name)


def test_public_names_exist() -> None:
    missing = [name for name in openmythos.__all__ if not hasattr(openmythos, name)]
    assert not missing
