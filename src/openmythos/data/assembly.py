"""Putting parts of a prepared folder together: their files of ids only move."""

import itertools
import os
import shutil
from pathlib import Path

import numpy as np

from openmythos.config import ConfigError
from openmythos.data.prepared import PREPARED_FILE, SIDES, UNFINISHED, Origin, PartEntry, Prepared
from openmythos.data.shards import (
    DOCUMENTS_FILE,
    INDEX_FILE,
    ShardIndex,
    TokenShards,
    shard_name,
)
from openmythos.files import load_json, save_json, sha256_of, write_atomically


def part_folder(out: Path, number: int) -> Path:
    """Where a part lies until all are whole."""
    return out / UNFINISHED / f"part-{number:05d}"


def index_parts(out: Path, origin: Origin, entries: list[PartEntry]) -> None:
    """Write what the whole folder's own files will hold; the last says that all parts are whole."""
    unfinished = out / UNFINISHED
    hashes: dict[str, str] = {}
    for side in SIDES:
        parts = [
            _unmapped(TokenShards.open(part_folder(out, number) / side, verify=False))
            for number, entry in enumerate(entries)
            if getattr(entry, side)
        ]
        if not parts:
            where = ", ".join(origin.preparation.paths)
            raise ConfigError(f"{where}: no text for the {side} part")
        joined = TokenShards.join(parts)
        write_atomically(unfinished / f"{side}-{DOCUMENTS_FILE}", joined.document_starts.tobytes())
        save_json(joined.index, unfinished / f"{side}-{INDEX_FILE}")
        hashes[side] = sha256_of(unfinished / f"{side}-{INDEX_FILE}")
    prepared = Prepared(
        origin=origin,
        parts=tuple(entries),
        train=hashes["train"],
        held_out=hashes["held_out"],
    )
    save_json(prepared, unfinished / PREPARED_FILE)


def _unmapped(shards: TokenShards) -> TokenShards:
    # A map would keep a file of every part open.
    return TokenShards(shards.index, shards.files, np.array(shards.document_starts))


def put_together(out: Path) -> None:
    """Move files to their places; what an earlier call has moved is there already."""
    unfinished = out / UNFINISHED
    prepared = load_json(Prepared, unfinished / PREPARED_FILE)
    for side in SIDES:
        (out / side).mkdir(exist_ok=True)
        numbers = itertools.count()
        for part, entry in enumerate(prepared.parts):
            if not getattr(entry, side):
                continue
            folder = part_folder(out, part) / side
            index = load_json(ShardIndex, folder / INDEX_FILE)
            for own in range(len(index.shards)):
                _move(folder / shard_name(own), out / side / shard_name(next(numbers)))
        for name in (DOCUMENTS_FILE, INDEX_FILE):
            _move(unfinished / f"{side}-{name}", out / side / name)
        TokenShards.open(out / side, verify=False)
    os.replace(unfinished / PREPARED_FILE, out / PREPARED_FILE)
    shutil.rmtree(unfinished)


def _move(source: Path, target: Path) -> None:
    if source.exists():
        os.replace(source, target)
    elif not target.exists():
        raise ConfigError(f"{source}: is missing")
