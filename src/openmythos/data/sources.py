"""Reading documents where they are: files, folders, globs, JSONL, Parquet, Hugging Face, stdlib."""

import glob
import gzip
import itertools
import json
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openmythos.config import ConfigError, require

_NOT_SOURCE = frozenset({"__pycache__"})
# site-packages is not the library, and tests are not how people write programs.
_NOT_STDLIB = _NOT_SOURCE | {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_ROWS = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text and its name, which is relative to its source and thus the same on every machine."""

    name: str
    text: str


class NotTextError(ConfigError):
    """A file holds something else than UTF-8 text."""


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file of a source; ``named`` by the user himself, who then means it to be text."""

    path: Path
    name: str
    named: bool

    @property
    def has_rows(self) -> bool:
        """Whether it holds many documents rather than one."""
        return self.name.endswith((*_ROWS, ".parquet"))

    @property
    def is_packed(self) -> bool:
        """Whether its size says little about that of its text."""
        return self.name.endswith((".gz", ".parquet"))

    def read(self, field: str) -> Iterator[Document]:
        """Its documents; NotTextError if it is not text."""
        return _file(self.path, self.name, field)


class Reader:
    """Reads sources one after the other, each file once although sources may overlap."""

    def __init__(self, field: str) -> None:
        self.skipped = 0
        self._field = field
        self._seen: set[Path] = set()

    def read(self, source: str) -> Iterator[Document]:
        """The documents of a source as ``open_corpus`` describes it."""
        if is_remote(source):
            yield from _hugging_face(source, self._field)
            return
        for file in self.files(source):
            try:
                yield from file.read(self._field)
            except NotTextError:
                if file.named:
                    raise
                self.skipped += 1

    def files(self, source: str) -> Iterator[SourceFile]:
        """The files of a source that is not remote, but for those seen before."""
        if source == "stdlib":
            root = Path(sysconfig.get_path("stdlib"))
            yield from self._files(_stdlib(root), root)
        elif Path(source).is_file():
            path = Path(source)
            if self._is_new(path):
                yield SourceFile(path=path, name=path.name, named=True)
        elif Path(source).is_dir():
            yield from self._files(_walk(Path(source)), Path(source))
        elif _is_pattern(source):
            yield from self._files(*_match(source))
        else:
            raise ConfigError(f"{source}: no such file or folder")

    def _files(self, paths: Iterable[Path], root: Path) -> Iterator[SourceFile]:
        for path in paths:
            if path.is_file() and self._is_new(path):
                name = path.relative_to(root).as_posix()
                yield SourceFile(path=path, name=name, named=False)

    def _is_new(self, path: Path) -> bool:
        resolved = path.resolve()
        known = resolved in self._seen
        self._seen.add(resolved)
        return not known


def is_remote(source: str) -> bool:
    """Whether a source is streamed from elsewhere, not made of files here."""
    return source.startswith("hf:")


def _walk(root: Path, skipped: frozenset[str] = _NOT_SOURCE) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root, onerror=_raise):
        subfolders[:] = sorted(
            name for name in subfolders if not name.startswith(".") and name not in skipped
        )
        yield from (Path(folder, name) for name in sorted(files) if not name.startswith("."))


def _raise(error: OSError) -> None:
    raise ConfigError(f"{error.filename}: cannot be read: {error.strerror}") from error


def _stdlib(root: Path) -> Iterator[Path]:
    for path in _walk(root, _NOT_STDLIB):
        # _sysconfigdata describes the machine that Python was built on.
        if path.suffix == ".py" and not path.name.startswith("_sysconfigdata"):
            yield path


def _is_pattern(path: str) -> bool:
    return any(character in path for character in "*?[")


def _match(pattern: str) -> tuple[Iterator[Path], Path]:
    """What a glob names, folders with all their files, and the folder it starts from."""
    fixed = itertools.takewhile(lambda part: not _is_pattern(part), Path(pattern).parts)
    found = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
    require(bool(found), "path", pattern, "matches no file")
    files = (file for path in found for file in (_walk(path) if path.is_dir() else [path]))
    return files, Path(*fixed)


def _file(path: Path, name: str, field: str) -> Iterator[Document]:
    try:
        if name.endswith(_ROWS):
            yield from _jsonl(path, name, field)
        elif name.endswith(".parquet"):
            yield from _parquet(path, name, field)
        else:
            yield Document(name=name, text=_decode(path.read_bytes(), path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (EOFError, zlib.error) as error:
        raise ConfigError(f"{path}: is damaged: {error}") from error


def _decode(data: bytes, path: Path) -> str:
    try:
        if b"\0" not in data:
            return data.decode()
    except UnicodeDecodeError:
        pass
    raise NotTextError(f"{path}: is not UTF-8 text")


def _jsonl(path: Path, name: str, field: str) -> Iterator[Document]:
    with gzip.open(path) if name.endswith(".gz") else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line.decode())
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{where}: is not valid JSON: {error}") from error
            yield Document(name=f"{name}:{number}", text=_text(row, field, where))


def _parquet(path: Path, name: str, field: str) -> Iterator[Document]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ConfigError(f"{path}: needs: pip install 'openmythos[data]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if field not in columns:
                names = ", ".join(columns)
                raise ConfigError(f"{path}: has no column {field!r}; its columns: {names}")
            batches = file.iter_batches(columns=[field])
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, row in enumerate(rows, 1):
                text = _text(row, field, f"{path}, row {number}")
                yield Document(name=f"{name}:{number}", text=text)
    except ArrowException as error:
        raise ConfigError(f"{path}: is not a readable Parquet file: {error}") from error


def _hugging_face(source: str, field: str) -> Iterator[Document]:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"{source}: needs: pip install 'openmythos[data]'") from error
    name, config, split, *rest = [*source.removeprefix("hf:").split(":"), "", ""]
    if not name or any(rest):
        raise ConfigError(f"{source}: must be written hf:NAME[:CONFIG][:SPLIT]")
    split = split or "train"
    try:
        rows = datasets.load_dataset(name, config or None, split=split, streaming=True)
        for number, row in enumerate(rows, 1):
            text = _text(row, field, f"{source}, row {number}")
            yield Document(name=f"{name}:{config}:{split}:{number}", text=text)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:  # no network, no such data set, configuration or split
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{source}: cannot be loaded: {reason}") from error


def _text(row: Any, field: str, where: str) -> str:
    text = row.get(field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        names = ", ".join(map(str, row)) if isinstance(row, dict) else "none"
        raise ConfigError(f"{where}: has no text in field {field!r}; its fields: {names}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise ConfigError(f"{where}: is not UTF-8 text: {error}") from error
    return text
