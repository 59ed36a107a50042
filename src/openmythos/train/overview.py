"""Many runs at a glance: which folders are runs, how far each is, and in what their configs differ.

Only files are read, also while another process trains the run; no model is loaded.
"""

import functools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from openmythos.config import ConfigError, require, to_dict
from openmythos.data.tokenizer import TOKENIZER_FILE
from openmythos.files import load_toml, read_json
from openmythos.model.config import MythosConfig
from openmythos.planning import cost
from openmythos.train.config import RunConfig, TaskData
from openmythos.train.folder import CONFIG_FILE
from openmythos.train.metrics import FILE as METRICS_FILE
from openmythos.train.metrics import read_metrics, recent_median
from openmythos.train.state import State, progress, read_state

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """A run in one line. Unknown fields are None; `error` says what cannot be read.

    `age` is seconds since the last step, `bits_per_byte` the best of eval.json, at `loops` loops.
    """

    folder: str
    state: State
    step: int = 0  # steps done
    num_steps: int | None = None
    loss: float | None = None
    bits_per_byte: float | None = None
    loops: int | None = None
    tokens_per_second: float | None = None
    age: float | None = None
    parameters: int | None = None
    error: str = ""


def find_runs(folder: Path) -> Iterator[Path]:
    """The folder itself if it is a run, else all runs below it, in order of their names.

    Links are followed, each folder once.
    """
    require(folder.is_dir(), "folder", str(folder), "is not a folder")
    seen: set[str] = set()
    for path, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(path)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        if CONFIG_FILE in files and (TOKENIZER_FILE in files or _learns_a_task(Path(path))):
            yield Path(path)
            folders.clear()
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def _learns_a_task(run: Path) -> bool:
    """Whether the config is of a run on a task; other programs use that file name, too."""
    try:
        return isinstance(load_toml(RunConfig, run / CONFIG_FILE).data, TaskData)
    except ConfigError:
        return False


def summarize(run: Path) -> RunSummary:
    """The summary of a run; a damaged file leaves only its own fields empty."""
    errors: list[str] = []

    def known(read: Callable[[], T]) -> T | None:
        try:
            return read()
        except (ConfigError, OSError) as error:
            errors.append(str(error))
        except (KeyError, TypeError, ValueError) as error:
            errors.append(f"{run}: {type(error).__name__}: {error}")
        return None

    begun = (run / METRICS_FILE).is_file()
    config = known(lambda: load_toml(RunConfig, run / CONFIG_FILE))
    parameters = known(functools.partial(_parameters, config.model)) if config else None
    metrics = (known(lambda: read_metrics(run)) if begun else None) or []
    record = known(lambda: read_state(run))
    best = known(lambda: _best_evaluation(run / "eval.json"))
    num_steps = config.train.num_steps if config else None
    state, step = progress(record, metrics, num_steps)
    signs = [record.stepped] if record else []
    signs += [(run / METRICS_FILE).stat().st_mtime] if begun else []
    last = metrics[-1] if metrics else {}
    return RunSummary(
        folder=str(run),
        state=state,
        step=step,
        num_steps=num_steps,
        loss=float(last["loss"]) if "loss" in last else None,
        tokens_per_second=recent_median(metrics, "tokens_per_second") if metrics else None,
        age=max(0.0, time.time() - max(signs)) if signs else None,
        parameters=parameters,
        error="; ".join(dict.fromkeys(" ".join(error.split()) for error in errors)),
        **(best or {}),
    )


def _best_evaluation(path: Path) -> dict[str, Any]:
    """Bits per byte and loops of the best row; nothing for a run on a task."""
    found = read_json(path) if path.is_file() else {"accuracy": ()}
    if "accuracy" in found:
        return {}
    best = min(found["held_out"], key=lambda row: _bits(row["bits_per_byte"]))
    return {"bits_per_byte": best["bits_per_byte"], "loops": best["num_loops"]}


def _bits(value: float | None) -> float:
    """Bits per byte for comparisons: infinity for None, which a diverged model has."""
    return math.inf if value is None else float(value)


@functools.lru_cache
def _parameters(model: MythosConfig) -> int:
    # Cached: counting builds the model (on the meta device), and many runs share one.
    return cost.parameters(model).total


def names_of(runs: Sequence[Path]) -> list[str]:
    """A short name per run: its folder's, or its path if two folders have the same name."""
    folders = [run.resolve().name for run in runs]
    return [
        str(run) if folders.count(folder) > 1 else folder
        for run, folder in zip(runs, folders, strict=True)
    ]


def differences(configs: Sequence[RunConfig]) -> list[dict[str, str]]:
    """For each config the values that differ from the others, under the shortest clear names."""
    flat = [dict(_flattened(to_dict(config))) for config in configs]
    keys = dict.fromkeys(key for config in flat for key in config)
    # Values are compared where they exist: a part of another kind has other fields.
    shown = [key for key in keys if len({str(c[key]) for c in flat if key in c}) > 1]
    names = {key: key.removesuffix(".kind") for key in shown}
    lasts = [name.rpartition(".")[2] for name in names.values()]
    short = {
        key: last if lasts.count(last) == 1 else names[key]
        for (key, last) in zip(shown, lasts, strict=True)
    }
    return [{short[key]: _text(config[key]) for key in shown if key in config} for config in flat]


def _flattened(table: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        kinds = [item.get("kind", item) if isinstance(item, Mapping) else item for item in value]
        return "+".join(map(str, kinds)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
