"""Exports for transformers, read back; `export.write` writes them."""

from collections.abc import Mapping
from typing import Any

import torch

from openmythos.config import ConfigError, from_dict
from openmythos.hub.export import native_json, to_hub
from openmythos.hub.fields import Fields
from openmythos.hub.format import Format
from openmythos.hub.rules import Rule, same
from openmythos.model.config import MythosConfig
from openmythos.model.mythos import OpenMythos


def _recognises(data: Mapping[str, Any]) -> bool:
    return data.get("model_type") == "openmythos" and "native" in data


def _read(fields: Fields) -> MythosConfig:
    fields.unrelated("*")  # from_dict below refuses unknown keys itself
    fields.table("native")
    try:
        return from_dict(MythosConfig, native_json(fields.data))
    except ConfigError as error:
        raise ConfigError(f"{fields.path}: {error}") from error


def _rules(config: MythosConfig) -> list[Rule]:
    with torch.device("meta"):
        state = OpenMythos(config).state_dict()
    return [same(to_hub([name])[0], name) for name in state]


EXPORT = Format(
    name="openmythos-hf",
    family="OpenMythos, exported for transformers",
    recognises=_recognises,
    read=_read,
    rules=_rules,
    ignored=(),
)
