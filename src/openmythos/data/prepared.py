"""Prepared folders: a corpus tokenised once (see ``prepare``), read by any number of runs.

    PREPARED/
    ├── prepared.json        settings, parts, hashes of the two index.json; written last
    ├── tokenizer.json
    ├── train/  held_out/    token shards
    └── unfinished/          while it is being made: settings, finished parts

A run refers to a prepared folder by path and the sha256 of prepared.json. That file covers
every token: it has the hashes of both index.json, which have the hashes of the token files.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from openmythos.config import ConfigError, require, require_int, require_number
from openmythos.data.shards import INDEX_FILE, TokenShards
from openmythos.data.tokenizer import Tokenizer, fingerprint, load_tokenizer
from openmythos.files import load_json, save_json, sha256_of

PREPARED_FILE = "prepared.json"
ORIGIN_FILE = "origin.json"
UNFINISHED = "unfinished"
SIDES = ("train", "held_out")


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What to prepare: the arguments of ``Corpus``; limit_bytes = 0 means no limit.

    The corpus is cut into parts of about part_bytes, which are tokenised in parallel.
    """

    paths: tuple[str, ...]
    field: str = "text"
    held_out: float = 0.04
    limit_bytes: int = 0
    part_bytes: int = 1 << 24
    skip_bad_rows: bool = False

    def __post_init__(self) -> None:
        require(len(self.paths) > 0, "paths", list(self.paths), "must name at least one source")
        require_number("held_out", self.held_out, above=0, at_most=0.2)
        require_int("limit_bytes", self.limit_bytes, minimum=0)
        require_int("part_bytes", self.part_bytes, minimum=1)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Everything that determines a prepared folder.

    ``tokenizer`` is its fingerprint, ``files`` a sha256 of the files' names, sizes and times.
    """

    preparation: Preparation
    tokenizer: str
    files: str


@dataclass(frozen=True, kw_only=True)
class PartEntry:
    """A finished part: sha256 and size of its text, numbers of training and held-out tokens.

    `skipped` is the number of files that are not text, `bad_rows` that of rows without text.
    """

    sha256: str
    num_bytes: int
    skipped: int
    train: int
    held_out: int
    bad_rows: int = 0


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The content of prepared.json; ``train`` and ``held_out`` are hashes of their index.json."""

    format_version: Literal[1] = 1
    origin: Origin
    parts: tuple[PartEntry, ...]
    train: str
    held_out: str


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A prepared folder and the sha256 of its prepared.json."""

    path: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class References:
    """The prepared folders that a run reads, saved as prepared.json in its tokens folder."""

    sources: tuple[Reference, ...]

    @classmethod
    def of(cls, paths: Sequence[str]) -> "References | None":
        """References to prepared folders; None if no path is one. Raises if only some are."""
        found = [is_prepared(path) for path in paths]
        if not any(found):
            return None
        if not all(found):
            path, other = paths[found.index(False)], paths[found.index(True)]
            raise ConfigError(f"{path}: is not a prepared folder, but {other} is: prepare both")
        # Absolute paths: the run folder can be moved, and resumed from another directory.
        folders = [Path(path).resolve() for path in paths]
        first, *others = [load_json(Prepared, folder / PREPARED_FILE) for folder in folders]
        for path, prepared in zip(paths[1:], others, strict=True):
            if prepared.origin.tokenizer != first.origin.tokenizer:
                raise ConfigError(f"{path}: was prepared with another tokenizer than {paths[0]}")
        hashes = [sha256_of(folder / PREPARED_FILE) for folder in folders]
        sources = [Reference(path=str(f), sha256=h) for f, h in zip(folders, hashes, strict=True)]
        return cls(sources=tuple(sources))

    @classmethod
    def load(cls, folder: Path) -> "References | None":
        """The references saved in a folder; None if there are none."""
        path = folder / PREPARED_FILE
        return load_json(cls, path) if path.is_file() else None

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_json(self, folder / PREPARED_FILE)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer, which is the same in all folders."""
        return load_tokenizer(self.sources[0].path)

    def shards(self, side: str, *, verify: bool) -> list[TokenShards]:
        """Each folder's "train" or "held_out" shards; raises if a folder changed or is missing."""
        for source in self.sources:
            if not is_prepared(source.path):
                text = "the prepared folder that this run reads is missing"
                raise ConfigError(f"{source.path}: {text}")
            if sha256_of(Path(source.path) / PREPARED_FILE) != source.sha256:
                raise ConfigError(f"{source.path}: was prepared again since this run was created")
        return [open_prepared(Path(s.path), side, verify=verify) for s in self.sources]


def is_prepared(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a prepared folder; raises if it is an unfinished one."""
    folder = Path(path)
    if (folder / PREPARED_FILE).is_file():
        return True
    if (folder / UNFINISHED / ORIGIN_FILE).is_file():
        raise ConfigError(f"{path}: is not finished, go on with the same `openmythos data prepare`")
    return False


def open_prepared(folder: Path, side: str, *, verify: bool) -> TokenShards:
    """The shards of one side of a prepared folder; ``verify`` checks the hashes of all files."""
    prepared = load_json(Prepared, folder / PREPARED_FILE)
    index = folder / side / INDEX_FILE
    if not index.is_file():
        raise ConfigError(f"{index}: is missing")
    if sha256_of(index) != getattr(prepared, side):
        raise ConfigError(f"{index}: is damaged, its sha256 is not that of {PREPARED_FILE}")
    shards = TokenShards.open(folder / side, verify=verify)
    tokenizer = folder / "tokenizer.json"
    if fingerprint(load_tokenizer(folder)) != shards.index.tokenizer:
        raise ConfigError(f"{tokenizer}: is not the tokenizer that made the tokens")
    return shards
