"""Checkpoints of a run: folders that are either whole or not there.

    RUN/checkpoints/step-00000200/
        config.json  model.safetensors      what `OpenMythos.from_pretrained` reads
        training.pt                         optimiser state and step, to go on from

A checkpoint is written under a temporary name and renamed when it is complete, so a crash or a
full disk leaves the former one as it was.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from openmythos.config import ConfigError
from openmythos.model.mythos import OpenMythos

FOLDER = "checkpoints"
TRAINING_FILE = "training.pt"


def save_checkpoint(run: Path, model: OpenMythos, training: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of training["step"], then remove all but the newest `keep`."""
    final = run / FOLDER / f"step-{training['step']:08d}"
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary)
        with open(temporary / TRAINING_FILE, "xb") as file:
            torch.save(training, file)
            file.flush()
            os.fsync(file.fileno())
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in list_checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return final


def list_checkpoints(run: Path) -> list[Path]:
    """All whole checkpoints, oldest first."""
    return sorted((run / FOLDER).glob("step-*"))


def latest_checkpoint(run: Path) -> Path:
    """The newest whole checkpoint of a run folder."""
    found = list_checkpoints(run)
    if not found:
        raise ConfigError(f"{run}: holds no checkpoint of a run")
    return found[-1]


def load_training(checkpoint: Path) -> dict[str, Any]:
    """What `save_checkpoint` was given; only tensors and plain values are unpickled."""
    path = checkpoint / TRAINING_FILE
    try:
        loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"{path}: is missing") from None
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        raise ConfigError(f"{path}: is damaged: {first_line}") from error
    return loaded
