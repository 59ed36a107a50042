"""Cut a corpus into parts, the units of work of `prepare`.

The content of a part depends only on the corpus and the settings.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from openmythos.data.corpus import Corpus
from openmythos.data.prepared import Preparation
from openmythos.data.sources import BadRows, Document, NotTextError, Reader, SourceFile, is_stream

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Part:
    """A unit of work: files for the worker to read, or documents that are already read."""

    number: int
    size: int  # bytes
    files: tuple[SourceFile, ...] = ()
    documents: tuple[Document, ...] = ()

    def read(self, wanted: Preparation) -> tuple[list[Document], int, int]:
        """(documents, number of files that are not text, number of rows without text)."""
        bad = BadRows()
        found, skipped = list(self.documents), 0
        for file in self.files:
            try:
                found.extend(file.read(wanted.field, bad if wanted.skip_bad_rows else None))
            except NotTextError:
                if file.named:
                    raise
                skipped += 1
        return found, skipped, bad.count


def survey(wanted: Preparation) -> tuple[str, int]:
    """(hash of all files' names, sizes and modification times, bytes to read or 0 if unknown)."""
    digest, total, known = hashlib.sha256(), 0, True
    reader = Reader(wanted.field)
    for source in wanted.paths:
        if is_stream(source):
            known = False
            continue
        for file in reader.files(source):
            status = file.path.stat()
            digest.update(repr((file.name, status.st_size, status.st_mtime_ns)).encode())
            total += status.st_size
            known = known and not file.compressed
    return digest.hexdigest(), wanted.limit_bytes or (total if known else 0)


def cut_into_parts(corpus: Corpus, wanted: Preparation, bad: BadRows) -> Iterator[Part]:
    """The parts in order. Bad rows in documents that this process reads are added to `bad`."""
    numbers = itertools.count()
    if wanted.limit_bytes:
        # The limit counts bytes of text, so the documents have to be read to find it.
        yield from _of_documents(corpus.documents(), wanted, numbers)
        return
    reader = Reader(wanted.field, skip_bad_rows=wanted.skip_bad_rows)
    counted = bad if wanted.skip_bad_rows else None
    for source in wanted.paths:
        if is_stream(source):
            yield from _of_documents(reader.read(source), wanted, numbers)
            bad.count += reader.bad_rows.count
            reader.bad_rows.count = 0
            continue
        # A file of rows that is larger than a part is read here and split into several.
        for is_cut, files in itertools.groupby(
            reader.files(source), lambda file: bool(file.format) and _size(file) > wanted.part_bytes
        ):
            if is_cut:
                for file in files:
                    yield from _of_documents(file.read(wanted.field, counted), wanted, numbers)
            else:
                for group, size in _gather(files, _size, wanted.part_bytes):
                    yield Part(number=next(numbers), size=size, files=group)


def _of_documents(
    documents: Iterable[Document], wanted: Preparation, numbers: Iterator[int]
) -> Iterator[Part]:
    for group, size in _gather(documents, lambda d: len(d.text.encode()), wanted.part_bytes):
        yield Part(number=next(numbers), size=size, documents=group)


def _gather(
    items: Iterable[T], size_of: Callable[[T], int], limit: int
) -> Iterator[tuple[tuple[T, ...], int]]:
    """(group of items, its size): a group ends with the item that reaches the limit."""
    group: list[T] = []
    size = 0
    for item in items:
        group.append(item)
        size += size_of(item)
        if size >= limit:
            yield tuple(group), size
            group, size = [], 0
    if group:
        yield tuple(group), size


def _size(file: SourceFile) -> int:
    return file.path.stat().st_size
