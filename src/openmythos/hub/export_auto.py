"""Registers the classes of an export with transformers: import this, and no copied code runs.

from openmythos.hub.export_auto import OpenMythosForCausalLM
model = AutoModelForCausalLM.from_pretrained(folder)     # without trust_remote_code
"""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from openmythos.hub import export_model
from openmythos.hub.export import write_code
from openmythos.hub.export_config import OpenMythosConfig


class _WritesCode:
    """`save_pretrained` adds the code, so that the folder also loads without this package."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        write_code(Path(save_directory))


class OpenMythosModel(_WritesCode, export_model.OpenMythosModel):
    """See `export_model`."""


class OpenMythosForCausalLM(_WritesCode, export_model.OpenMythosForCausalLM):
    """See `export_model`."""


AutoConfig.register("openmythos", OpenMythosConfig, exist_ok=True)
AutoModel.register(OpenMythosConfig, OpenMythosModel, exist_ok=True)
AutoModelForCausalLM.register(OpenMythosConfig, OpenMythosForCausalLM, exist_ok=True)
