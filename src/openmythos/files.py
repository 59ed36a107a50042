"""Files: configs as TOML and JSON, written as a whole or not at all, and checksums."""

import contextlib
import functools
import hashlib
import json
import os
import secrets
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tomli_w

from openmythos.config import ConfigError, from_dict, require, to_dict

T = TypeVar("T")
AnyPath = str | os.PathLike[str]


def dumps_toml(config: Any) -> str:
    """The config as TOML, every field written out."""
    return tomli_w.dumps(_loadable(config))


def save_toml(config: Any, path: AnyPath) -> None:
    """Write the config as TOML, atomically."""
    write_atomically(path, dumps_toml(config))


def load_toml(cls: type[T], path: AnyPath) -> T:
    """Read and validate a TOML file; every error names the file."""
    return _load(cls, path, "TOML", tomllib.loads)


def save_json(config: Any, path: AnyPath) -> None:
    """Write the config as indented JSON, atomically."""
    write_json(_loadable(config), path)


def write_json(data: Mapping[str, Any], path: AnyPath) -> None:
    """Write plain data as indented JSON, atomically."""
    write_atomically(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def read_json(path: AnyPath) -> dict[str, Any]:
    """Read a JSON object as plain data; every error names the file."""
    data = _read(path, "JSON", functools.partial(json.loads, object_pairs_hook=_unrepeated))
    require(isinstance(data, dict), str(path), type(data).__name__, "must hold a JSON object")
    return data


def load_json(cls: type[T], path: AnyPath) -> T:
    """Read and validate a JSON file; every error names the file."""
    return _load(cls, path, "JSON", functools.partial(json.loads, object_pairs_hook=_unrepeated))


def write_atomically(path: AnyPath, data: str | bytes) -> None:
    """Replace a file as a whole: whatever fails, the old one stays as it was."""
    with replacing(path) as temporary, open(temporary, "xb") as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def replacing(path: AnyPath) -> Iterator[Path]:
    """Yield a temporary path to write; it takes the place of `path` only if nothing failed."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # The new name survives a power cut only once its directory is on disk too. Some systems cannot
    # sync a directory, and by now the file is in place, so that is no failure.
    with contextlib.suppress(OSError):
        directory = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def sha256_of(path: AnyPath) -> str:
    """The sha256 of a file's bytes, as hexadecimal digits."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error


def _read(path: AnyPath, language: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(Path(path).read_bytes().decode())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid {language}: {error}") from error


def _load(cls: type[T], path: AnyPath, language: str, parse: Callable[[str], Any]) -> T:
    data = _read(path, language, parse)
    try:
        return from_dict(cls, data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # The json module would keep the last of two equal keys and drop the first without a word.
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"key {key!r} is given twice")
        table[key] = value
    return table


def _loadable(config: Any) -> dict[str, Any]:
    data = to_dict(config)
    # Better to fail now than when a finished run is read back.
    from_dict(type(config), data)
    return data
