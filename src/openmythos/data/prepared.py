"""Prepared folders: a corpus tokenised once (``prepare`` makes them), read by any number of runs.

    PREPARED/
    ├── prepared.json        what it was made from, its parts, hashes of the two index.json; last
    ├── tokenizer.json
    ├── train/  held_out/    token shards
    └── unfinished/          only while it is being made: what it is made from, finished parts

A run refers to such folders by their paths and the sha256 of their prepared.json, which stands for
every token in them.
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
    """What to prepare: as for ``open_corpus``, limit_bytes = 0 being none.

    The corpus is cut into parts of about part_bytes, which are worked on at the same time.
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
    """All that a prepared folder is a function of.

    ``tokenizer`` is a fingerprint, ``files`` a sha256 of names, sizes and times of the files read.
    """

    preparation: Preparation
    tokenizer: str
    files: str


@dataclass(frozen=True, kw_only=True)
class PartEntry:
    """A finished part: its text, what was left out for being no text, tokens per side.

    `skipped` counts files, `bad_rows` rows of the files that the part names.
    """

    sha256: str
    num_bytes: int
    skipped: int
    train: int
    held_out: int
    bad_rows: int = 0


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The content of prepared.json; ``train`` and ``held_out`` are the sha256 of index.json."""

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
    """What a run keeps of the prepared folders that it reads: the file prepared.json in tokens/."""

    sources: tuple[Reference, ...]

    @classmethod
    def of(cls, paths: Sequence[str]) -> "References | None":
        """References to paths that are all prepared folders; None if none of them is one."""
        found = [is_prepared(path) for path in paths]
        if not any(found):
            return None
        if not all(found):
            path, other = paths[found.index(False)], paths[found.index(True)]
            raise ConfigError(f"{path}: is not a prepared folder, which {other} is: prepare both")
        # Absolute: a run can move, or be resumed from elsewhere.
        folders = [Path(path).resolve() for path in paths]
        first, *others = [load_json(Prepared, folder / PREPARED_FILE) for folder in folders]
        for path, prepared in zip(paths[1:], others, strict=True):
            if prepared.origin.tokenizer != first.origin.tokenizer:
                raise ConfigError(f"{path}: was prepared with another tokenizer than {paths[0]}")
        return cls(
            sources=tuple(
                Reference(path=str(folder), sha256=sha256_of(folder / PREPARED_FILE))
                for folder in folders
            )
        )

    @classmethod
    def load(cls, folder: Path) -> "References | None":
        """Those that `save` wrote into a folder; None if there are none."""
        path = folder / PREPARED_FILE
        return load_json(cls, path) if path.is_file() else None

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_json(self, folder / PREPARED_FILE)

    def tokenizer(self) -> Tokenizer:
        """The one that all of them share."""
        return load_tokenizer(self.sources[0].path)

    def shards(self, side: str, *, verify: bool) -> list[TokenShards]:
        """The tokens of each, "train" or "held_out"; refused where a folder has changed or gone."""
        return [self._shards(source, side, verify) for source in self.sources]

    def _shards(self, source: Reference, side: str, verify: bool) -> TokenShards:
        folder = Path(source.path)
        if not is_prepared(folder):
            raise ConfigError(f"{folder}: the prepared folder that this run reads is not there")
        if sha256_of(folder / PREPARED_FILE) != source.sha256:
            raise ConfigError(f"{folder}: was prepared anew since this run was made")
        return open_prepared(folder, side, verify=verify)


def is_prepared(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a prepared folder; one that is not finished is refused."""
    folder = Path(path)
    if (folder / PREPARED_FILE).is_file():
        return True
    if (folder / UNFINISHED / ORIGIN_FILE).is_file():
        raise ConfigError(f"{path}: is not finished, go on with the same `openmythos data prepare`")
    return False


def open_prepared(folder: Path, side: str, *, verify: bool) -> TokenShards:
    """The tokens of a prepared folder; ``verify`` compares them with their hashes."""
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
