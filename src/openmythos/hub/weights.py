"""The tensors of a checkpoint, read one by one into a model and written back.

safetensors files are mapped into memory, and every tensor is converted on its own: no second copy
of the model exists at any time. Pickles are read with `weights_only`, so they run no code.
"""

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import reduce
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from openmythos.config import ConfigError
from openmythos.files import read_json, replacing
from openmythos.hub.rules import MismatchError, Rule
from openmythos.model.mythos import OpenMythos
from openmythos.model.storage import check_finite

SAFETENSORS = "model.safetensors"
PICKLES = ("pytorch_model.bin", "model.pt")
_INDEX = ".index.json"


class Tensors(Protocol):
    """The tensors of a checkpoint by name, each read when it is asked for."""

    path: Path  # to name in errors

    def names(self) -> Iterable[str]: ...
    def header(self, name: str) -> Tensor:
        """A tensor on the meta device: shape and dtype without values."""

    def get(self, name: str) -> Tensor:
        """The tensor on the CPU."""


class SafeTensors:
    """One safetensors file, or the shards that an index lists."""

    def __init__(self, path: Path, files: Iterable[Path]) -> None:
        self.path = path
        self._files: dict[str, Any] = {}
        for part in files:
            with readable(part):
                file = safe_open(part, framework="pt")
                names = file.keys()  # type: ignore[no-untyped-call]
            for name in names:
                if name in self._files:
                    raise ConfigError(f"{part}: tensor {name} is also in another file")
                self._files[name] = file

    def names(self) -> Iterable[str]:
        return self._files

    def header(self, name: str) -> Tensor:
        part = self._files[name].get_slice(name)
        dtype = _DTYPES.get(part.get_dtype())
        if dtype is None:
            raise ConfigError(
                f"{self.path}: tensor {name} has dtype {part.get_dtype()}, not a float"
            )
        return torch.empty(part.get_shape(), dtype=dtype, device="meta")

    def get(self, name: str) -> Tensor:
        with readable(self.path):
            tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class Pickled:
    """Pickles of a state dict, read with `weights_only`."""

    def __init__(self, path: Path, files: Iterable[Path]) -> None:
        self.path = path
        self._tensors: dict[str, Tensor] = {}
        for part in files:
            found = _unpickled(part)
            # Some training code wraps the state dict.
            inner = found.get("model", found) if isinstance(found, dict) else found
            if not isinstance(inner, dict) or not all(
                isinstance(x, Tensor) for x in inner.values()
            ):
                raise ConfigError(f"{part}: does not hold a state dict of tensors")
            self._tensors |= inner

    def names(self) -> Iterable[str]:
        return self._tensors

    def header(self, name: str) -> Tensor:
        return self._tensors[name].to("meta")

    def get(self, name: str) -> Tensor:
        return self._tensors[name]


def _unpickled(path: Path) -> Any:
    with readable(path):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format of old versions cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn the errors of reading a file of weights into one line that names it."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ConfigError(f"{path}: holds more than tensors, so it is not read") from error
    except (SafetensorError, RuntimeError, EOFError) as error:
        first = str(error).partition("\n")[0]
        raise ConfigError(f"{path}: is damaged or not a file of weights: {first}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error


def open_folder(folder: Path) -> Tensors:
    """The weights of a folder: safetensors before pickles, one file or shards with an index."""
    kinds: list[tuple[str, Callable[[Path, Iterable[Path]], Tensors]]] = [
        (SAFETENSORS, SafeTensors),
        *((name, Pickled) for name in PICKLES),
    ]
    for name, kind in kinds:
        if (folder / name).is_file():
            return kind(folder / name, [folder / name])
        if (folder / (name + _INDEX)).is_file():
            return kind(folder / (name + _INDEX), _shards(folder / (name + _INDEX)))
    raise ConfigError(f"{folder}: has no {SAFETENSORS}, {', '.join(PICKLES)} or index of shards")


def _shards(index: Path) -> list[Path]:
    """The files that an index names: all in its own folder."""
    table = read_json(index).get("weight_map")
    names = sorted({*table.values()}) if isinstance(table, dict) and table else []
    for name in names or [None]:
        if not isinstance(name, str) or Path(name).name != name or not name:
            raise ConfigError(f"{index}: weight_map: must map tensors to files of its own folder")
        if not (index.parent / name).is_file():
            raise ConfigError(f"{index.parent / name}: is missing, {index.name} lists it")
    return [index.parent / name for name in names]


def fill(
    model: OpenMythos,
    rules: Sequence[Rule],
    source: Tensors,
    *,
    ignored: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> None:
    """Fill a model on the meta device from a checkpoint, one rule at a time.

    `dtype` None keeps the checkpoint's; matrices of several dtypes get the widest of them. `device`
    None only compares names and shapes. A tensor that is missing, left over, not finite or of
    another shape raises a ConfigError that names it.
    """
    names, expected = set(source.names()), model.state_dict()
    used = [rule for rule in rules if not rule.optional or rule.theirs[0] in names]
    read = {name for rule in used for name in rule.theirs}
    for name in sorted(read - names):
        raise ConfigError(f"{source.path}: tensor {name} is missing")
    for name in sorted(names - read):
        if not any(fnmatchcase(name, pattern) for pattern in ignored):
            raise ConfigError(f"{source.path}: tensor {name} is not part of this model")
    matrices = dtype or _widest(source, read)
    get = source.header if device is None else source.get
    for rule in used:
        made = _changed(rule.forward, [get(name) for name in rule.theirs], rule.theirs, source.path)
        for name, tensor in zip(rule.ours, made, strict=True):
            wanted = expected.pop(name).shape
            _check(source.path, " + ".join(rule.theirs), name, tensor, wanted)
            if device is not None:
                chosen = dtype if tensor.ndim < 2 else matrices
                _assign(model, name, tensor.to(device=device, dtype=chosen))
    if expected:
        raise TypeError(f"no rule of this format fills {sorted(expected)[0]}")


def _widest(source: Tensors, names: Iterable[str]) -> torch.dtype | None:
    """The dtype that holds all matrices exactly; None if there are none."""
    headers = (source.header(name) for name in names)
    dtypes = {header.dtype for header in headers if header.ndim >= 2}
    return reduce(torch.promote_types, dtypes) if dtypes else None


def _changed(
    change: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    tensors: Sequence[Tensor],
    names: Sequence[str],
    where: Path | str,
) -> Sequence[Tensor]:
    try:
        return change(tensors)
    except (MismatchError, RuntimeError) as error:
        text = str(error).partition("\n")[0]
        raise ConfigError(f"{where}: tensor {' + '.join(names)}: {text}") from error


def _check(path: Path, theirs: str, ours: str, tensor: Tensor, wanted: torch.Size) -> None:
    if tensor.shape != wanted:
        raise ConfigError(
            f"{path}: tensor {theirs or ours} has shape {list(tensor.shape)} as {ours}, the config "
            f"wants {list(wanted)}"
        )
    if not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
        raise ConfigError(f"{path}: tensor {theirs or ours} holds values that are not finite")


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in place of a parameter or buffer on the meta device."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor)
    else:
        module._buffers[leaf] = tensor


def written(model: OpenMythos, rules: Sequence[Rule], where: str) -> dict[str, Tensor]:
    """The model's tensors under the names of a format; errors start with `where`."""
    state, made = model.state_dict(), dict[str, Tensor]()
    for name, tensor in state.items():
        check_finite(where, name, tensor)
    for rule in rules:
        if not rule.optional:
            ours = [state[name].detach().cpu() for name in rule.ours]
            tensors = _changed(rule.back, ours, rule.ours, where)
            made |= zip(rule.theirs, [x.contiguous() for x in tensors], strict=True)
    return made


def write(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors to one safetensors file."""
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
