"""Recurrent-depth transformers: build, train, study and serve looped language models."""

from openmythos.config import ConfigError
from openmythos.model import presets
from openmythos.model.config import MythosConfig
from openmythos.model.mythos import MythosOutput, OpenMythos
from openmythos.model.sampling import Sampling

__all__ = ["ConfigError", "MythosConfig", "MythosOutput", "OpenMythos", "Sampling", "presets"]
__version__ = "0.1.0"
