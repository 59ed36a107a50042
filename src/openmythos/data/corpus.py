"""A corpus: documents of some sources, each for training or held out.

How documents are read is in ``sources``; turning their text into tokens is in ``shards``.
"""

import hashlib
import logging
import lzma
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from openmythos.config import ConfigError, require, require_int, require_number
from openmythos.data.sources import READ, Document, Reader

logger = logging.getLogger(__name__)

_MAX_SHARE = 0.25
_SURVEY_BYTES = 1 << 26
_PIECE = 1 << 18


@dataclass(frozen=True, kw_only=True)
class _Split:
    by_position: bool
    # Held out although its hash does not say so, since no other document is.
    name: str


class Corpus:
    """Can be read any number of times, always in the same order; empty documents are left out.

    A document is held out when a hash of its name falls below ``held_out``, so that adding
    documents never moves another one. Where no hash does, the document with the lowest is taken.
    A corpus of so few documents that this would hold out more than a quarter of its text is split
    by position instead: the end of every document is held out, of a single document too. What
    counts as few shows in the first 64 MiB, so that an endless stream can be split as well.
    """

    def __init__(
        self,
        sources: Sequence[str],
        *,
        field: str,
        held_out: float,
        limit_bytes: int | None,
        skip_bad_rows: bool = False,
    ) -> None:
        self._sources = tuple(sources)
        self._field = field
        self._held_out = held_out
        self._limit = math.inf if limit_bytes is None else limit_bytes
        self._skip_bad_rows = skip_bad_rows
        self.bad_rows_told = False
        self._split = self._survey()

    def documents(self) -> Iterator[Document]:
        """Every document, before the split."""
        return self._read(self._reader())

    def train(self) -> Iterator[Document]:
        return self.split(self.documents(), held_out=False)

    def held_out(self) -> Iterator[Document]:
        return self.split(self.documents(), held_out=True)

    def held_out_bytes(self) -> bytes:
        """The held-out text as UTF-8, documents joined, to compare with other compressors."""
        return b"".join(document.text.encode() for document in self.held_out())

    def _reader(self) -> Reader:
        return Reader(self._field, skip_bad_rows=self._skip_bad_rows)

    def _read(self, reader: Reader) -> Iterator[Document]:
        size = 0
        for source in self._sources:
            for document in reader.read(source):
                if document.text:
                    yield document
                    size += len(document.text.encode())
                if size >= self._limit:
                    break
            if size >= self._limit:
                break
        bad = reader.bad_rows
        if bad.count and not self.bad_rows_told:
            # Once, although a corpus is read several times.
            self.bad_rows_told = True
            where = ", ".join(self._sources)
            logger.warning("%s: skipped %d rows; the first: %s", where, bad.count, bad.first)

    def split(self, documents: Iterable[Document], *, held_out: bool) -> Iterator[Document]:
        """What of some of its documents is held out, or is not."""
        for document in documents:
            text = document.text
            if self._split.by_position:
                cut = _cut(text, self._held_out)
                text = text[cut:] if held_out else text[:cut]
            elif held_out != self._is_held_out(document.name):
                continue
            if text:
                yield replace(document, text=text)

    def _is_held_out(self, name: str) -> bool:
        return name == self._split.name or _draw(name) < self._held_out

    def _survey(self) -> _Split:
        reader = self._reader()
        total = chosen = longest = lowest_size = 0
        lowest = (1.0, "")
        for document in self._read(reader):
            size = len(document.text.encode())
            total += size
            longest = max(longest, len(document.text))
            draw = (_draw(document.name), document.name)
            chosen += size if draw[0] < self._held_out else 0
            if draw < lowest:
                lowest, lowest_size = draw, size
            if total >= _SURVEY_BYTES:
                break
        where = ", ".join(self._sources)
        skipped = f"{reader.skipped} files that are not UTF-8 text"
        if not total:
            left_out = f" (skipped {skipped})" if reader.skipped else ""
            raise ConfigError(f"{where}: no text found{left_out}; read are {READ}")
        if reader.skipped:
            logger.warning("%s: skipped %s", where, skipped)
        by_position = (chosen or lowest_size) > _MAX_SHARE * total
        if by_position and longest < 2:
            raise ConfigError(f"{where}: {total} bytes are too few to hold some out")
        return _Split(by_position=by_position, name="" if chosen else lowest[1])


def open_corpus(
    paths: Sequence[str],
    *,
    field: str = "text",
    held_out: float = 0.04,
    limit_bytes: int | None = None,
    skip_bad_rows: bool = False,
) -> Corpus:
    """A corpus of ``paths``, looked through once to decide its split; errors are raised here.

    Each path is a file (plain text; .jsonl, .ndjson, these as .gz, and .parquet hold a document per
    row, in ``field``), a folder (all of its files but hidden ones, those that are not text, run
    folders and prepared folders), a glob, ``hf:NAME[:CONFIG][:SPLIT]`` (a Hugging Face data set,
    streamed) or ``stdlib`` (the source of Python's standard library). No more is read once
    ``limit_bytes`` are reached. A row without text is an error, or with ``skip_bad_rows`` left out
    and counted.
    """
    require(len(paths) > 0, "paths", list(paths), "must name at least one source")
    require_number("held_out", held_out, above=0, at_most=0.2)
    if limit_bytes is not None:
        require_int("limit_bytes", limit_bytes, minimum=1)
    return Corpus(
        paths, field=field, held_out=held_out, limit_bytes=limit_bytes, skip_bad_rows=skip_bad_rows
    )


def compression_baselines(data: bytes) -> dict[str, float]:
    """Bits per byte of gzip and xz at their best level: what a model's have to beat."""
    require(len(data) > 0, "data", data, "must not be empty")
    packers: dict[str, Any] = {
        "gzip-9": zlib.compressobj(9, wbits=31),
        "xz-9": lzma.LZMACompressor(preset=9),
    }
    sizes = dict.fromkeys(packers, 0)
    for name, packer in packers.items():
        # In pieces, between which a signal is heard.
        for start in range(0, len(data), _PIECE):
            sizes[name] += len(packer.compress(data[start : start + _PIECE]))
        sizes[name] += len(packer.flush())
    return {name: 8 * size / len(data) for name, size in sizes.items()}


def _draw(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    # File names may hold bytes that are not UTF-8.
    digest = hashlib.sha1(name.encode(errors="surrogateescape"), usedforsecurity=False).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _cut(text: str, held_out: float) -> int:
    return len(text) - max(1, round(held_out * len(text))) if len(text) > 1 else len(text)
