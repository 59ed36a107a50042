"""Reading documents from files, folders, globs, JSONL, Parquet, Hugging Face data sets, the stdlib.

To add a file format, write a function that yields rows and add it to `FORMATS`.
"""

import glob
import gzip
import itertools
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openmythos.config import ConfigError, needs, require
from openmythos.data import gcide

_NOT_SOURCE = frozenset({"__pycache__"})
# Not read for `stdlib`: installed packages, and tests, which are not typical programs.
_NOT_STDLIB = _NOT_SOURCE | {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".lz4", ".7z", ".tar")
# Files that mark a run folder and a prepared folder. They are skipped, so that `--data .` does not
# read the runs made from it.
_RUN = {"config.toml", "tokenizer.json"}
_PREPARED = ("prepared.json", "unfinished/origin.json")
SUPPORTED = "plain UTF-8 text, .jsonl, .ndjson (these also as .gz) and .parquet"


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text and its name, which is relative to its source: the same on every machine."""

    name: str
    text: str


class NotTextError(ConfigError):
    """A file is not UTF-8 text."""


class BadRowError(ConfigError):
    """A row has no text."""


@dataclass
class BadRows:
    """Rows without text that were skipped: how many, and the error of the first."""

    count: int = 0
    first: str = ""


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file of a source. `named`: the user gave this very path, so it must be text."""

    path: Path
    name: str
    named: bool

    @property
    def format(self) -> "Format | None":
        """The entry of `FORMATS` for this file; None for plain text, which is one document."""
        name = self.name.lower()
        return next((f for suffixes, f in FORMATS.items() if name.endswith(suffixes)), None)

    @property
    def compressed(self) -> bool:
        """Whether the file is compressed, so that its size is not the size of its text."""
        return self.name.lower().endswith((".gz", ".parquet"))

    def read(self, field: str, bad: BadRows | None = None) -> Iterator[Document]:
        """The documents of the file.

        Raises NotTextError if it is not text. A row without text is counted in `bad`, or raises
        BadRowError if `bad` is None.
        """
        try:
            if self.format is None:
                yield Document(name=self.name, text=_decode(self.path.read_bytes(), self.path))
            else:
                unit, rows = self.format
                yield from _documents(
                    rows(self.path, field), field, self.name, f"{self.path}, {unit}", bad
                )
        except OSError as error:
            reason = error.strerror or error
            wrong = "is damaged" if isinstance(error, gzip.BadGzipFile) else "cannot be read"
            raise ConfigError(f"{self.path}: {wrong}: {reason}") from error
        except (EOFError, zlib.error) as error:
            raise ConfigError(f"{self.path}: is damaged: {error}") from error


class Reader:
    """Reads sources one after the other; a file that occurs in several sources is read once."""

    def __init__(self, field: str, *, skip_bad_rows: bool = False) -> None:
        self.skipped = 0  # files that are not text
        self.bad_rows = BadRows()
        self._bad = self.bad_rows if skip_bad_rows else None
        self._field = field
        self._read: set[Path] = set()

    def read(self, source: str) -> Iterator[Document]:
        """The documents of a source, as ``Corpus`` describes it."""
        if source == "gcide":
            for number, text in enumerate(gcide.texts(), 1):
                yield Document(name=f"gcide:{number}", text=text)
            return
        if is_stream(source):
            name, rows = _hugging_face(source)
            yield from _documents(rows, self._field, name, f"{source}, row", self._bad)
            return
        for file in self.files(source):
            try:
                yield from file.read(self._field, self._bad)
            except NotTextError:
                if file.named:
                    raise
                self.skipped += 1

    def files(self, source: str) -> Iterator[SourceFile]:
        """The files of a source that is not a stream, without those already read."""
        path = Path(source)
        if source == "stdlib":
            root = Path(sysconfig.get_path("stdlib"))
            yield from self._new(_stdlib(root), root)
        elif path.is_file():
            yield from self._new([path], path.parent, named=True)
        elif path.is_dir():
            yield from self._new(_walk(path), path)
        elif glob.has_magic(source):
            yield from self._new(*_match(source))
        elif path.exists():
            raise ConfigError(f"{source}: is not a regular file; text is read more than once")
        else:
            raise ConfigError(f"{source}: no such file or folder")

    def _new(
        self, paths: Iterable[Path], root: Path, *, named: bool = False
    ) -> Iterator[SourceFile]:
        for path in paths:
            resolved = path.resolve()
            if path.is_file() and resolved not in self._read:
                self._read.add(resolved)
                yield SourceFile(path=path, name=path.relative_to(root).as_posix(), named=named)


def is_stream(source: str) -> bool:
    """Whether a source has no files of its own to survey: hf:NAME, and gcide's package."""
    return source.startswith("hf:") or source == "gcide"


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
        # _sysconfigdata differs between machines: it describes the build of Python.
        if path.suffix == ".py" and not path.name.startswith("_sysconfigdata"):
            yield path


def _match(pattern: str) -> tuple[Iterator[Path], Path]:
    """(files that a glob matches, including those in matched folders, folder it starts in)."""
    fixed = itertools.takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts)
    found = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
    require(bool(found), "path", pattern, "matches no file")
    files = (file for path in found for file in (_walk(path) if path.is_dir() else [path]))
    return files, Path(*fixed)


def _decode(data: bytes, path: Path) -> str:
    try:
        if b"\0" not in data:
            return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        pass
    if path.name.lower().endswith(_COMPRESSED):
        raise NotTextError(f"{path}: is compressed; supported: {SUPPORTED}")
    raise NotTextError(f"{path}: is not UTF-8 text")


def _documents(
    rows: Iterable[Any], field: str, name: str, where: str, bad: BadRows | None
) -> Iterator[Document]:
    """A document per row (a dict or a line of JSON). Errors say `where` and the row's number.

    Blank lines are skipped, but count for the numbers.
    """
    for number, row in enumerate(rows, 1):
        if isinstance(row, bytes) and not row.strip():
            continue
        try:
            text = _text(_json(row) if isinstance(row, bytes) else row, field)
        except ValueError as error:
            wrong = BadRowError(f"{where} {number}: {error}")
            if bad is None:
                raise wrong from error
            bad.count, bad.first = bad.count + 1, bad.first or str(wrong)
        else:
            yield Document(name=f"{name}:{number}", text=text)


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
    except UnicodeEncodeError as error:  # JSON can hold half of a surrogate pair
        raise ValueError(f"is not UTF-8 text: {error}") from error
    return text


def _json(line: bytes) -> Any:
    try:
        return json.loads(line.rstrip().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text: {error.reason} at byte {error.start + 1}") from error
    except json.JSONDecodeError as error:
        # Not str(error): its line number is relative to the row.
        reason = f"{error.msg} at character {error.pos + 1}"
        raise ValueError(f"is not valid JSON: {reason}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not valid JSON: {error}") from error


def _jsonl(path: Path, _field: str) -> Iterator[bytes]:
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        yield from file


def _parquet(path: Path, field: str) -> Iterator[Any]:
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
            for batch in file.iter_batches(columns=[field]):
                yield from batch.to_pylist()
    except ArrowException as error:
        raise ConfigError(f"{path}: is not a readable Parquet file: {error}") from error


def _hugging_face(source: str) -> tuple[str, Iterator[Any]]:
    """The name and the rows of a streamed data set."""
    name, config, split, *rest = [*source.removeprefix("hf:").split(":"), "", ""]
    if not name or any(rest):
        raise ConfigError(f"{source}: must be written hf:NAME[:CONFIG][:SPLIT]")
    split = split or "train"

    def rows() -> Iterator[Any]:
        try:
            import datasets
        except ImportError as error:
            raise ConfigError(f"{source}: {needs('data')}") from error
        try:
            yield from datasets.load_dataset(name, config or None, split=split, streaming=True)
        except (OSError, ValueError) as error:  # no network, data set, configuration or split
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"{source}: cannot be loaded: {reason}") from error

    return f"{name}:{config}:{split}", rows()


# By ending of the file's name: the word for a row in error messages, and the reader of the rows.
Format = tuple[str, Callable[[Path, str], Iterator[Any]]]
FORMATS: Mapping[tuple[str, ...], Format] = {
    (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz"): ("line", _jsonl),
    (".parquet",): ("row", _parquet),
}
