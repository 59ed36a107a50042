"""A saved model: a folder with config.json and model.safetensors, no pickle."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from openmythos.config import ConfigError, from_dict, to_dict
from openmythos.files import read_json, replacing, write_json
from openmythos.machine import choose_device
from openmythos.model.config import MythosConfig

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def save(folder: Path, config: MythosConfig, state: Mapping[str, Tensor]) -> None:
    """Write both files under temporary names; rename them when both are complete.

    Values that are not finite raise a ConfigError, and nothing is written.
    """
    weights = folder / WEIGHTS_FILE
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}
    for name, tensor in tensors.items():
        check_finite(weights, name, tensor)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / CONFIG_FILE) as new_config, replacing(weights) as new_weights:
        write_config(config, new_config)
        try:
            save_file(tensors, new_weights)
        except SafetensorError as error:
            # safetensors wraps errors of the system, such as a full disk or no permission.
            raise OSError(f"{weights}: cannot be written: {error}") from error


def write_config(config: MythosConfig, path: Path) -> None:
    """Write only config.json."""
    header = {"model_type": "openmythos", "format_version": FORMAT_VERSION}
    write_json(header | to_dict(config), path)


def load_config(folder: Path) -> MythosConfig:
    """The config of a saved model."""
    path = folder / CONFIG_FILE
    data: dict[str, Any] = read_json(path)
    if data.pop("model_type", None) != "openmythos":
        raise ConfigError(f"{path}: is not the config of an OpenMythos model")
    version = data.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ConfigError(f"{path}: format_version = {version!r}: must be {FORMAT_VERSION}")
    try:
        return from_dict(MythosConfig, data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def load_weights(folder: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a saved model, checked against the names and shapes of the config."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise ConfigError(f"{path}: is missing")
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            _check_names(path, found, expected)
            weights = {name: file.get_tensor(name) for name in expected}
    except SafetensorError as error:
        raise ConfigError(f"{path}: is damaged or no safetensors file: {error}") from error
    for name, tensor in weights.items():
        if not tensor.dtype.is_floating_point:
            raise ConfigError(f"{path}: tensor {name} has dtype {tensor.dtype}, not a float")
        check_finite(path, name, tensor)
    return weights


def check_finite(path: Path | str, name: str, tensor: Tensor) -> None:
    """Raise a ConfigError for a tensor of a weights file with a value that is not finite."""
    if not torch.isfinite(tensor).all():
        raise ConfigError(f"{path}: tensor {name} holds values that are not finite")


def _check_names(
    path: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, Tensor]
) -> None:
    for name, tensor in expected.items():
        if name not in found:
            raise ConfigError(f"{path}: tensor {name} is missing")
        if found[name] != tuple(tensor.shape):
            raise ConfigError(
                f"{path}: tensor {name} has shape {list(found[name])}, "
                f"the config wants {list(tensor.shape)}"
            )
    surplus = sorted(set(found) - set(expected))
    if surplus:
        raise ConfigError(f"{path}: tensor {surplus[0]} is not part of this model")


M = TypeVar("M", bound="Pretrained")


class Pretrained(nn.Module):
    """The part of the model that saves it to a folder and loads it."""

    config: MythosConfig

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, each replaced atomically."""
        save(Path(folder), self.config, self.state_dict())

    @classmethod
    def from_pretrained(
        cls: type[M], folder: str | Path, *, device: str | torch.device = "cpu"
    ) -> M:
        """Load what `save_pretrained` wrote onto a device; "auto" is the accelerator, if any.

        A file that does not match, or a missing device, raises a ConfigError.
        """
        chosen = choose_device(device)
        config = load_config(Path(folder))
        with torch.device("meta"):
            model = cls(config)
        weights = load_weights(Path(folder), model.state_dict())
        model.load_state_dict(weights, assign=True)
        return model.to(chosen).eval()
