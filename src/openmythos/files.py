"""Atomic files: configs as TOML and JSON, plain data as JSON, checksums."""

import contextlib
import functools
import hashlib
import json
import os
import secrets
import shutil
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tomli_w

from openmythos.config import ConfigError, from_dict, require, to_dict

T = TypeVar("T")
AnyPath = str | os.PathLike[str]


def dumps_toml(config: Any) -> str:
    """The config as TOML, including fields with default values."""
    return tomli_w.dumps(_checked(config))


def save_toml(config: Any, path: AnyPath) -> None:
    """Write the config as TOML, atomically."""
    write_atomically(path, dumps_toml(config))


def load_toml(cls: type[T], path: AnyPath) -> T:
    """Read and validate a TOML file; every error names the file."""
    return _load(cls, path, "TOML", tomllib.loads)


def save_json(config: Any, path: AnyPath) -> None:
    """Write the config as indented JSON, atomically."""
    write_json(_checked(config), path)


def write_json(data: Mapping[str, Any], path: AnyPath) -> None:
    """Write plain data as indented JSON, atomically."""
    write_atomically(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def read_json(path: AnyPath) -> dict[str, Any]:
    """Read a JSON object as plain data; every error names the file."""
    data = _read(path, "JSON", _parse_json)
    require(isinstance(data, dict), str(path), type(data).__name__, "must hold a JSON object")
    return data


def load_json(cls: type[T], path: AnyPath) -> T:
    """Read and validate a JSON file; every error names the file."""
    return _load(cls, path, "JSON", _parse_json)


def write_atomically(path: AnyPath, data: str | bytes) -> None:
    """Replace a file; if that fails, the old file is unchanged."""
    with replacing(path) as temporary, open(temporary, "xb") as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def replacing(path: AnyPath) -> Iterator[Path]:
    """Yield a temporary path; it replaces `path` unless the block raises."""
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
    # Some systems cannot do this; the file is already in place, so errors are ignored.
    with contextlib.suppress(OSError):
        sync_folder(target.parent)


def sync_folder(folder: AnyPath) -> None:
    """Write a folder's entries to disk, so that new names survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Delete a folder, a file or a link, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def reading(path: AnyPath) -> Iterator[None]:
    """Turn an OSError into a ConfigError that names the file."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error


def sha256_of(path: AnyPath) -> str:
    """The sha256 of a file, as hexadecimal digits."""
    with reading(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: AnyPath, language: str, parse: Callable[[str], Any]) -> Any:
    with reading(path):
        data = Path(path).read_bytes()
    try:
        return parse(data.decode())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid {language}: {error}") from error


def _load(cls: type[T], path: AnyPath, language: str, parse: Callable[[str], Any]) -> T:
    data = _read(path, language, parse)
    try:
        return from_dict(cls, data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # The json module silently keeps only the last of two equal keys.
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"key {key!r} is given twice")
        table[key] = value
    return table


_parse_json = functools.partial(json.loads, object_pairs_hook=_unique_keys)


def _checked(config: Any) -> dict[str, Any]:
    data = to_dict(config)
    # An invalid config should fail here, not when a finished run is loaded.
    from_dict(type(config), data)
    return data
