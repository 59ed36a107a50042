"""One way to open any model: a run, a saved model, a public checkpoint, a GGUF file, a Hub id."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from openmythos.config import ConfigError, needs, to_dict
from openmythos.data.tokenizer import Tokenizer
from openmythos.files import read_json, write_json
from openmythos.hub import weights
from openmythos.hub.export_format import EXPORT
from openmythos.hub.fields import Fields
from openmythos.hub.format import Format
from openmythos.hub.gemma import GEMMA
from openmythos.hub.gguf import GGUF, SUFFIX, GGUFFile
from openmythos.hub.huginn import HUGINN
from openmythos.hub.llama import LLAMA
from openmythos.hub.nanbeige import NANBEIGE
from openmythos.hub.olmo2 import OLMO2
from openmythos.hub.ouro import OURO
from openmythos.hub.own import OWN
from openmythos.hub.parcae import PARCAE
from openmythos.hub.qwen3 import QWEN3
from openmythos.hub.retrofit import RETROFIT
from openmythos.hub.tokenizer import load_public_tokenizer
from openmythos.hub.xllm import XLLM
from openmythos.machine import Precision, choose_device, choose_precision
from openmythos.model.config import MythosConfig
from openmythos.model.mythos import OpenMythos
from openmythos.train.folder import CONFIG_FILE as RUN_FILE
from openmythos.train.run import Run

CONFIG_FILE = "config.json"
FORMATS: tuple[Format, ...] = (
    *(OWN, EXPORT, HUGINN, OURO, LLAMA, RETROFIT, PARCAE),
    *(QWEN3, OLMO2, GEMMA, NANBEIGE, XLLM, GGUF),
)
# Looped models that are known, and what this package lacks for them.
_NOT_YET = {
    "hrm_text": "two states, prefix attention and a gate on attention's output",
    "iquestloopcoder": "attention of the second loop to the first",
    "dory": "norms by length, learned interpolation and windows in some layers",
    "inkling2_loop": "images, short convolutions and attention sinks",
    "gemma2": "a softcap on attention scores, and windows in some layers",
    "gemma3_text": "windows in some layers",
}


@dataclass(frozen=True)
class Source:
    """A model that has been found and whose config has been read; its weights have not."""

    path: Path
    format: Format
    config: MythosConfig
    run: Run | None = None  # of a run folder
    gguf: GGUFFile | None = None

    def load(
        self,
        device: str | torch.device = "cpu",
        *,
        dtype: torch.dtype | None = None,
        step: int | None = None,
    ) -> OpenMythos:
        """The model in eval mode; dtype None keeps the checkpoint's. `step`: of a run only."""
        if self.run is not None:
            return self.run.load_model(device, step=step).to(dtype=dtype)
        if step is not None:
            raise ConfigError(f"step = {step}: {self.path} is not a run, it has no steps")
        chosen = choose_device(device)
        model = self._on_meta()
        self._fill(model, dtype=dtype, device=chosen)
        return model.eval()

    def check_names(self) -> None:
        """Raise a ConfigError unless the checkpoint has every tensor of the config, in its shape.

        Values are not read.
        """
        if self.run is None:
            self._fill(self._on_meta())

    def tensors(self) -> weights.Tensors:
        """The checkpoint's own tensors."""
        return weights.open_folder(self.path) if self.gguf is None else self.gguf

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises a ConfigError if there is none that this package can use."""
        if self.run is not None:
            return self.run.tokenizer
        if self.gguf is not None:
            return self.gguf.tokenizer(self.config.vocab_size)
        return load_public_tokenizer(self.path, self.config.vocab_size)

    def precision(self, asked: str, device: torch.device) -> Precision:
        """The precision to compute in, for "auto", "fp32" or "bf16"."""
        if self.run is not None:
            return self.run.choose_precision(asked, device)
        return choose_precision(asked, device)

    def _on_meta(self) -> OpenMythos:
        with torch.device("meta"):
            return OpenMythos(self.config)

    def _fill(self, model: OpenMythos, **options: Any) -> None:
        rules, ignored = self.format.rules(self.config), self.format.ignored
        weights.fill(model, rules, self.tensors(), ignored=ignored, **options)
        decay = None if options.get("device") is None else model.recurrent.injection.max_decay()
        if decay is not None and decay.item() >= 1:
            raise ConfigError(f"{self.path}: the injection's decay is 1, it must be below 1")


def load(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    ignore: Sequence[str] = (),
) -> OpenMythos:
    """The model of a folder, GGUF file or Hub id, in eval mode.

    Reads runs and saved models of this package and every format of docs/models.md. `dtype` None
    keeps the checkpoint's. `ignore`: keys of its config.json that are known not to matter. What
    this package cannot represent raises a ConfigError of one line.
    """
    return open_source(source, ignore=ignore).load(device, dtype=dtype)


def open_source(source: str | Path, *, ignore: Sequence[str] = ()) -> Source:
    """Find a model and read its config; see `load`."""
    path = find(source)
    if (path / RUN_FILE).is_file():
        run = Run.open(path)
        return Source(path, replace(OWN, family="OpenMythos, a run"), run.config.model, run)
    files = [path] if path.is_file() else sorted(path.glob(f"*{SUFFIX}"))
    if len(files) == 1 and not (path / CONFIG_FILE).exists() and files[0].suffix == SUFFIX:
        file = GGUFFile(files[0])
        return Source(path, GGUF, _config(GGUF, file.fields(), ignore), gguf=file)
    if not (path / CONFIG_FILE).is_file():
        missing = f"it has neither {RUN_FILE} nor {CONFIG_FILE}"
        raise ConfigError(f"{path}: is not the folder of a run or of a model: {missing}")
    data = read_json(path / CONFIG_FILE)
    found = recognise(path / CONFIG_FILE, data)
    return Source(path, found, _config(found, Fields(path / CONFIG_FILE, data), ignore))


def _config(found: Format, fields: Fields, ignore: Sequence[str]) -> MythosConfig:
    try:
        config = found.read(fields)
    except ConfigError as error:
        named = str(error).startswith(str(fields.path))
        raise error if named else ConfigError(f"{fields.path}: {error}") from error
    fields.finish(ignore)
    return config


def recognise(path: Path, data: dict[str, Any]) -> Format:
    """The format of a config.json; a ConfigError if there is none."""
    for found in FORMATS:
        if found.recognises(data):
            return found
    kind = data.get("model_type")
    if kind in _NOT_YET:
        raise ConfigError(f"{path}: model_type = {kind!r}: is not implemented: {_NOT_YET[kind]}")
    shown = {key: data[key] for key in ("model_type", "architectures") if key in data}
    known = ", ".join(found.name for found in FORMATS)
    raise ConfigError(f"{path}: {shown or 'no model_type'}: unknown kind of model; known: {known}")


def find(source: str | Path) -> Path:
    """The path itself if it exists, else the folder of a Hub id, downloaded if it must be."""
    path = Path(source)
    if path.exists():
        return path
    name = str(source)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ConfigError(f"{source}: no such folder or file, nor a Hub id (owner/name)")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ConfigError(f"{source}: no such folder; a Hub id {needs('hf')}") from error
    patterns = ["*.json", "*.safetensors", *weights.PICKLES, "*.bin", "README.md", "LICENSE*"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # of many kinds: offline, not found, gated, a full disk
        first = str(error).partition("\n")[0]
        raise ConfigError(f"{source}: no such folder, nor on the Hub: {first}") from error


def written_names() -> tuple[str, ...]:
    """The names of the formats that `save` writes."""
    return tuple(found.name for found in FORMATS if found.write is not None)


def save(model: OpenMythos, folder: str | Path, format_name: str = OWN.name) -> None:
    """Write a model to a folder in a public format, for the code that reads it.

    A model that the format cannot represent raises a ConfigError that names what differs.
    """
    known = {found.name: found for found in FORMATS if found.write is not None}
    if format_name not in known:
        raise ConfigError(f"format = {format_name!r}: must be one of {', '.join(known)}")
    found, path = known[format_name], Path(folder)
    data = written_config(found, model.config)
    tensors = weights.written(model, found.rules(model.config), f"format {found.name}")
    path.mkdir(parents=True, exist_ok=True)
    weights.write(tensors, path / weights.SAFETENSORS)
    write_json(data, path / CONFIG_FILE)


def written_config(found: Format, config: MythosConfig) -> dict[str, Any]:
    """The config.json of a format, after checking that it reads back as the same config."""
    assert found.write is not None
    try:
        data = found.write(config)
        again = found.read(Fields(Path(CONFIG_FILE), data))
    except (ConfigError, AssertionError, AttributeError) as error:
        text = f"format {found.name}: cannot represent this model: {error}"
        raise ConfigError(text.removesuffix(": ")) from error
    # How weights are initialised is no part of a checkpoint.
    again = replace(again, zero_init_outputs=config.zero_init_outputs)
    if again != config:
        ours, theirs = to_dict(config), to_dict(again)
        name = next(key for key, value in ours.items() if value != theirs[key])
        raise ConfigError(f"format {found.name}: cannot represent {name} = {ours[name]!r:.200}")
    return data


__all__ = ["FORMATS", "Source", "find", "load", "open_source", "save"]
