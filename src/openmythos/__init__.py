"""Recurrent-depth transformers: build, train, study and sample from looped language models."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openmythos.config import ConfigError
    from openmythos.hub.load import load
    from openmythos.inference.sampling import Sampling
    from openmythos.model import presets
    from openmythos.model.config import MythosConfig
    from openmythos.model.mythos import OpenMythos
    from openmythos.model.outputs import MythosOutput

__all__ = [
    "ConfigError",
    "MythosConfig",
    "MythosOutput",
    "OpenMythos",
    "Sampling",
    "load",
    "presets",
]
__version__ = "0.1.0"

# Imported on first use, so that the command line answers `--help` and typos without torch.
_MODULES = {
    "ConfigError": "config",
    "MythosConfig": "model.config",
    "MythosOutput": "model.outputs",
    "OpenMythos": "model.mythos",
    "Sampling": "inference.sampling",
    "load": "hub.load",
    "presets": "model",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    # A submodule is not an attribute of its package until it is imported.
    value = getattr(module, name, None) or importlib.import_module(f"{module.__name__}.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
