"""This package's own folders: config.json with every field, tensors under their own names."""

from collections.abc import Mapping
from typing import Any

import torch

from openmythos.config import ConfigError, from_dict, to_dict
from openmythos.hub.fields import Fields
from openmythos.hub.format import Format
from openmythos.hub.rules import Rule, same
from openmythos.model import storage
from openmythos.model.config import MythosConfig
from openmythos.model.mythos import OpenMythos

_MODEL_TYPE = "openmythos"


def _recognises(data: Mapping[str, Any]) -> bool:
    return data.get("model_type") == _MODEL_TYPE and "format_version" in data


def _read(fields: Fields) -> MythosConfig:
    fields.fixed("format_version", storage.FORMAT_VERSION)
    fields.unrelated("*")  # from_dict below refuses unknown keys itself
    data = {k: v for k, v in fields.data.items() if k not in ("model_type", "format_version")}
    try:
        return from_dict(MythosConfig, data)
    except ConfigError as error:
        raise ConfigError(f"{fields.path}: {error}") from error


def _rules(config: MythosConfig) -> list[Rule]:
    with torch.device("meta"):
        return [same(name, name) for name in OpenMythos(config).state_dict()]


def _write(config: MythosConfig) -> dict[str, Any]:
    header = {"model_type": _MODEL_TYPE, "format_version": storage.FORMAT_VERSION}
    return header | to_dict(config)


OWN = Format(
    name="openmythos",
    family="OpenMythos",
    recognises=_recognises,
    read=_read,
    rules=_rules,
    write=_write,
    ignored=(),
)
