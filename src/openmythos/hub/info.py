"""What a model is, before its weights are read: family, sizes, cache, licence, whether it loads."""

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from openmythos.config import ConfigError, to_dict
from openmythos.files import read_json
from openmythos.hub.export_format import EXPORT
from openmythos.hub.load import CONFIG_FILE, Source
from openmythos.hub.own import OWN
from openmythos.model.config import MythosConfig
from openmythos.nn.cache import LastLoopCache
from openmythos.planning import cost
from openmythos.recurrence.halting import NoHalting
from openmythos.recurrence.initial_state import NormalState, SineHashState

# Fields that only say how large a model is.
_SIZES = {
    *("vocab_size", "dim", "context", "prelude_layers", "recurrent_layers", "coda_layers"),
    *("num_loops", "hidden_dim", "num_heads", "num_kv_heads", "num_experts", "expert_dim"),
    *("norm_eps", "zero_init_outputs"),
}
_PARTS = ("embedding", "prelude", "recurrent", "coda", "norm", "head")


def describe(source: Source) -> dict[str, str]:
    """Rows of a table about a model, as names and texts."""
    config, count = source.config, cost.parameters(source.config)
    parts = {name: getattr(count, name) for name in _PARTS if getattr(count, name)}
    shape = f"{config.prelude_layers} / {config.recurrent_layers} / {config.coda_layers}"
    exact, shared = (
        cost.cache_bytes(config, context=1, dtype=torch.bfloat16, policy=policy)
        for policy in (None, LastLoopCache())
    )
    return {
        "family": f"{source.format.family} (format {source.format.name})",
        "licence": licence(source) or "not stated",
        "parameters": f"{count.total:,}" + (f" ({count.active:,} active)" if routed(count) else ""),
        "by part": ", ".join(f"{name} {number:,}" for name, number in parts.items()),
        "layers": f"{shape} in prelude / recurrent block / coda, width {config.dim}",
        "loops": f"{config.num_loops}, so {config.effective_depth(config.num_loops)} layers deep",
        "context": f"{config.context:,} tokens, vocabulary of {config.vocab_size:,}",
        "cache": f"{exact:,} B per token in bf16"
        + (f"; {shared:,} B if all loops share a slot" if shared != exact else ""),
        "not our default": ", ".join(differences(config)) or "nothing",
        "exit rules": exits(source),
        "first state": _first_state(config),
        "tokenizer": _attempt(lambda: f"{source.tokenizer.vocab_size:,} ids"),
        "loads": _attempt(partial(_fits, source)),
    }


def routed(count: cost.ParameterCount) -> bool:
    return count.active != count.total


def exits(source: Source) -> str:
    """Which exit rules suit the model."""
    if source.format.name not in (OWN.name, EXPORT.name):
        return source.format.exits
    if not isinstance(source.config.halting, NoHalting):
        return f"its own halting: {source.config.halting.kind}"
    if source.config.num_loops == 1:
        return "none: the model runs each layer once"
    return "state_change, kl, kl_entropy or argmax: they need no training"


def _fits(source: Source) -> str:
    source.check_names()
    return "yes: names and shapes fit"


def _first_state(config: MythosConfig) -> str:
    random = isinstance(config.state_init, NormalState | SineHashState)
    kind = config.state_init.kind
    return f"{kind}: a fixed function of the position here, not random" if random else kind


def _attempt(text: Any) -> str:
    try:
        return str(text())
    except ConfigError as error:
        return f"no: {error}"


def differences(config: MythosConfig) -> Iterator[str]:
    """Each setting that is not the default, but sizes; a part by its kind and its own settings."""
    default = MythosConfig()
    for field in fields(config):
        value, usual = getattr(config, field.name), getattr(default, field.name)
        if value == usual or field.name in _SIZES:
            continue
        if not is_dataclass(value):
            yield f"{field.name} = {value}"
            continue
        kind: Any = type(value)
        same = isinstance(usual, kind)
        changed = ", ".join(_changed(value, usual if same else kind()))
        kind = to_dict(value)["kind"]
        if changed or not same:
            yield f"{field.name} = {kind}" + (f" ({changed})" if changed else "")


def _changed(value: Any, usual: Any) -> Iterator[str]:
    ours, theirs = to_dict(value), to_dict(usual)
    for name, setting in ours.items():
        if setting != theirs[name] and name not in _SIZES:
            yield f"{name} {setting['kind'] if isinstance(setting, dict) else setting}"


def licence(source: Source) -> str:
    """The licence that the folder states: in its model card, config or licence file; "" if none."""
    if source.gguf is not None:
        return str(source.gguf.value("general.license", ""))
    card, config = source.path / "README.md", source.path / CONFIG_FILE
    if card.is_file():
        front = re.match(r"---\n(.*?)\n---", _text(card), re.DOTALL)
        named = re.search(r"^license: *(\S+)", front[1], re.MULTILINE) if front else None
        if named:
            return named[1].strip("\"'")
    if config.is_file() and isinstance(read_json(config).get("license"), str):
        return str(read_json(config)["license"])
    for path in sorted(source.path.glob("LICEN[SC]E*")):
        lines = [line.strip() for line in _text(path).splitlines() if line.strip()]
        if lines:
            return f"{lines[0]:.60} ({path.name})"
    return ""


def _text(path: Path) -> str:
    return path.read_text(errors="replace")[:10_000]
