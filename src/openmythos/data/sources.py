"""Reading documents where they are: files, folders, globs, JSONL, Parquet, Hugging Face, stdlib."""

import glob
import gzip
import itertools
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from openmythos.config import ConfigError, needs, require

_NOT_SOURCE = frozenset({"__pycache__"})
# site-packages is not the library, and tests are not how people write programs.
_NOT_STDLIB = _NOT_SOURCE | {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_ROWS = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".lz4", ".7z", ".tar")
# What tells a run folder, and a prepared folder (unfinished too), from a folder of text. Who reads
# "." means neither: the runs made of its text lie there as well.
_RUN = {"config.toml", "tokenizer.json"}
_PREPARED = ("prepared.json", "unfinished/origin.json")
READ = "plain UTF-8 text, .jsonl, .ndjson (these also as .gz) and .parquet"


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text and its name, which is relative to its source and thus the same on every machine."""

    name: str
    text: str


class NotTextError(ConfigError):
    """A file holds something else than UTF-8 text."""


class BadRowError(ConfigError):
    """A row has no text."""


@dataclass
class BadRows:
    """Rows without text that were left out: how many, and what was wrong with the first."""

    count: int = 0
    first: str = ""

    def add(self, error: BadRowError) -> None:
        self.count += 1
        self.first = self.first or str(error)


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file of a source; ``named`` by the user himself, who then means it to be text."""

    path: Path
    name: str
    named: bool

    @property
    def has_rows(self) -> bool:
        """Whether it holds many documents rather than one."""
        return self.name.lower().endswith((*_ROWS, ".parquet"))

    @property
    def is_packed(self) -> bool:
        """Whether its size says little about that of its text."""
        return self.name.lower().endswith((".gz", ".parquet"))

    def read(self, field: str, bad: BadRows | None = None) -> Iterator[Document]:
        """Its documents; NotTextError if it is no text, BadRowError for a row that `bad` does not
        count."""
        return _file(self.path, self.name, field, bad)


class Reader:
    """Reads sources one after the other, each file once although sources may overlap."""

    def __init__(self, field: str, *, skip_bad_rows: bool = False) -> None:
        self.skipped = 0
        self.bad_rows = BadRows()
        self._bad = self.bad_rows if skip_bad_rows else None
        self._field = field
        self._seen: set[Path] = set()

    def read(self, source: str) -> Iterator[Document]:
        """The documents of a source as ``open_corpus`` describes it."""
        if is_remote(source):
            yield from _hugging_face(source, self._field, self._bad)
            return
        for file in self.files(source):
            try:
                yield from file.read(self._field, self._bad)
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
        elif Path(source).exists():
            raise ConfigError(f"{source}: is no regular file; text is read more than once")
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
        if set(files) >= _RUN or any(Path(folder, mark).is_file() for mark in _PREPARED):
            subfolders.clear()
            continue
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


def _file(path: Path, name: str, field: str, bad: BadRows | None) -> Iterator[Document]:
    suffix = name.lower()
    try:
        if suffix.endswith(_ROWS):
            yield from _jsonl(path, name, field, bad)
        elif suffix.endswith(".parquet"):
            yield from _parquet(path, name, field, bad)
        else:
            yield Document(name=name, text=_decode(path.read_bytes(), path))
    except OSError as error:
        reason = error.strerror or error
        said = "is damaged" if isinstance(error, gzip.BadGzipFile) else "cannot be read"
        raise ConfigError(f"{path}: {said}: {reason}") from error
    except (EOFError, zlib.error) as error:
        raise ConfigError(f"{path}: is damaged: {error}") from error


def _decode(data: bytes, path: Path) -> str:
    try:
        if b"\0" not in data:
            return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        pass
    if path.name.lower().endswith(_PACKED):
        raise NotTextError(f"{path}: is compressed; read are {READ}")
    raise NotTextError(f"{path}: is not UTF-8 text")


def _documents(
    rows: Iterable[tuple[str, str, Callable[[], Any]]], field: str, bad: BadRows | None
) -> Iterator[Document]:
    """Documents of (name, place, what gives the row)."""
    for name, where, row in rows:
        try:
            text = _text(row(), field)
        except ValueError as error:
            wrong = BadRowError(f"{where}: {error}")
            if bad is None:
                raise wrong from error
            bad.add(wrong)
            continue
        yield Document(name=name, text=text)


def _jsonl(path: Path, name: str, field: str, bad: BadRows | None) -> Iterator[Document]:
    with gzip.open(path) if name.lower().endswith(".gz") else path.open("rb") as file:
        rows = (
            (f"{name}:{number}", f"{path}, line {number}", partial(_json, line))
            for number, line in enumerate(file, 1)
            if line.strip()
        )
        yield from _documents(rows, field, bad)


def _json(line: bytes) -> Any:
    try:
        return json.loads(line.rstrip().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text: {error.reason} at byte {error.start + 1}") from error
    except json.JSONDecodeError as error:
        # Its own line number is that within the row.
        reason = f"{error.msg} at character {error.pos + 1}"
        raise ValueError(f"is not valid JSON: {reason}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not valid JSON: {error}") from error


def _parquet(path: Path, name: str, field: str, bad: BadRows | None) -> Iterator[Document]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ConfigError(f"{path}: {needs('data')}") from error
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if field not in columns:
                names = ", ".join(columns)
                raise ConfigError(f"{path}: has no column {field!r}; its columns: {names}")
            batches = file.iter_batches(columns=[field])
            found = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            rows = (
                (f"{name}:{number}", f"{path}, row {number}", partial(_same, row))
                for number, row in enumerate(found, 1)
            )
            yield from _documents(rows, field, bad)
    except ArrowException as error:
        raise ConfigError(f"{path}: is not a readable Parquet file: {error}") from error


def _hugging_face(source: str, field: str, bad: BadRows | None) -> Iterator[Document]:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"{source}: {needs('data')}") from error
    name, config, split, *rest = [*source.removeprefix("hf:").split(":"), "", ""]
    if not name or any(rest):
        raise ConfigError(f"{source}: must be written hf:NAME[:CONFIG][:SPLIT]")
    split = split or "train"
    try:
        found = datasets.load_dataset(name, config or None, split=split, streaming=True)
        rows = (
            (f"{name}:{config}:{split}:{number}", f"{source}, row {number}", partial(_same, row))
            for number, row in enumerate(found, 1)
        )
        yield from _documents(rows, field, bad)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:  # no network, no such data set, configuration or split
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{source}: cannot be loaded: {reason}") from error


def _same(row: Any) -> Any:
    return row


def _text(row: Any, field: str) -> str:
    if not isinstance(row, dict):
        raise ValueError("is not an object with fields")
    if field not in row:
        raise ValueError(f"has no field {field!r}; its fields: {', '.join(map(str, row))}")
    text = row[field]
    if not isinstance(text, str):
        kind = "null" if text is None else f"of type {type(text).__name__}"
        raise ValueError(f"field {field!r} is {kind}, must be a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise ValueError(f"is not UTF-8 text: {error}") from error
    return text
