"""Making prepared folders: many processes tokenise parts of a corpus, which are then put together.

What a part holds follows from the corpus and the settings, never from who makes it or when. A part
gets its name when it is whole; put together, its files of ids only move. So the folder is the same
whatever the number of processes and interruptions.
"""

import functools
import hashlib
import itertools
import logging
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from openmythos.config import ConfigError, require_int
from openmythos.data.assembly import index_parts, part_folder, put_together
from openmythos.data.corpus import Corpus, open_corpus
from openmythos.data.prepared import (
    ORIGIN_FILE,
    PREPARED_FILE,
    SIDES,
    UNFINISHED,
    Origin,
    PartEntry,
    Preparation,
    Prepared,
)
from openmythos.data.shards import (
    TokenShards,
    write_shards,
)
from openmythos.data.sources import BadRows, Document, NotTextError, Reader, SourceFile, is_remote
from openmythos.data.tokenizer import Tokenizer, fingerprint, load_tokenizer
from openmythos.files import load_json, save_json
from openmythos.processes import worker_pool

logger = logging.getLogger(__name__)

T = TypeVar("T")
_PART_FILE = "part.json"
_LOCK_FILE = "lock"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Bytes of the sources done; of all (0: unknown); done before; of text tokenised just now."""

    done: int
    total: int
    kept: int
    text: int


Told = Callable[[Progress], None]


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Files for whoever makes the part to read, or documents that were read from a stream."""

    number: int
    size: int
    files: tuple[SourceFile, ...] = ()
    documents: tuple[Document, ...] = ()

    def read(self, wanted: Preparation) -> tuple[list[Document], int, int]:
        """Its documents, how many files are not text, and how many rows have none."""
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


def prepare(
    wanted: Preparation,
    tokenizer: Tokenizer,
    out: Path,
    *,
    processes: int = 1,
    told: Told = lambda _progress: None,
) -> Prepared:
    """Make the folder, or finish it; what is done already stays.

    Interrupted, it goes on when called again in the same way; a ConfigError tells of anything that
    is not as it was. One process works in this one.
    """
    require_int("processes", processes, minimum=1)
    files, total = _survey(wanted)
    origin = Origin(preparation=wanted, tokenizer=fingerprint(tokenizer), files=files)
    if not (out / PREPARED_FILE).is_file():
        _require_own(out, origin)
        (out / UNFINISHED).mkdir(parents=True, exist_ok=True)
        with _alone(out):
            # Another process may have finished it since.
            if not (out / PREPARED_FILE).is_file():
                _make(out, origin, tokenizer, processes, total, told)
    prepared = load_json(Prepared, out / PREPARED_FILE)
    _require_same(out, prepared.origin, origin)
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    return prepared


def _make(
    out: Path, origin: Origin, tokenizer: Tokenizer, processes: int, total: int, told: Told
) -> None:
    if not (out / UNFINISHED / PREPARED_FILE).is_file():
        wanted = origin.preparation
        corpus = open_corpus(
            wanted.paths,
            field=wanted.field,
            held_out=wanted.held_out,
            limit_bytes=wanted.limit_bytes or None,
            skip_bad_rows=wanted.skip_bad_rows,
        )
        save_json(origin, out / UNFINISHED / ORIGIN_FILE)
        tokenizer.save(out)
        maker = _Maker(corpus=corpus, origin=origin, out=out)
        entries = _make_parts(maker, processes, total, told)
        index_parts(out, origin, entries)
    put_together(out)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Refuse to write where another process does."""
    lock = FileLock(out / UNFINISHED / _LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(f"{out}: another process is preparing it at this moment") from error
    try:
        yield
    finally:
        lock.release()


def _require_own(out: Path, origin: Origin) -> None:
    if (out / UNFINISHED / ORIGIN_FILE).is_file():
        _require_same(out, load_json(Origin, out / UNFINISHED / ORIGIN_FILE), origin)
    elif out.exists() and (not out.is_dir() or any(p.name != UNFINISHED for p in out.iterdir())):
        raise ConfigError(f"{out}: exists already and was not begun by this; choose another --out")


def _require_same(out: Path, found: Origin, wanted: Origin) -> None:
    for field in fields(Preparation):
        before, now = (getattr(o.preparation, field.name) for o in (found, wanted))
        if before != now:
            raise ConfigError(
                f"{out}: was begun with {field.name} = {before!r}, not {now!r}; "
                "choose another --out"
            )
    if found.tokenizer != wanted.tokenizer:
        raise ConfigError(f"{out}: was begun with another tokenizer; choose another --out")
    if found.files != wanted.files:
        where = ", ".join(wanted.preparation.paths)
        raise ConfigError(
            f"{where}: has other files than when {out} was begun; choose another --out"
        )


def _survey(wanted: Preparation) -> tuple[str, int]:
    """A hash of which files there are, and their size or the limit; 0 where none is known."""
    digest, total, known = hashlib.sha256(), 0, True
    reader = Reader(wanted.field)
    for source in wanted.paths:
        if is_remote(source):
            known = False
            continue
        for file in reader.files(source):
            status = file.path.stat()
            digest.update(repr((file.name, status.st_size, status.st_mtime_ns)).encode())
            total += status.st_size
            known = known and not file.is_packed
    return digest.hexdigest(), wanted.limit_bytes or (total if known else 0)


def _parts(corpus: Corpus, wanted: Preparation, bad: BadRows) -> Iterator[_Part]:
    """The parts; `bad` counts what is left out of those whose documents are read here."""
    numbers = itertools.count()
    if wanted.limit_bytes:
        # Where the limit falls, only reading can tell.
        yield from _of_documents(corpus.documents(), wanted, numbers)
        return
    reader = Reader(wanted.field, skip_bad_rows=wanted.skip_bad_rows)
    counted = bad if wanted.skip_bad_rows else None
    for source in wanted.paths:
        if is_remote(source):
            yield from _of_documents(reader.read(source), wanted, numbers)
            bad.count += reader.bad_rows.count
            reader.bad_rows.count = 0
            continue
        # A large file of rows is cut here, the others are read by those who make the parts.
        for cut, files in itertools.groupby(
            reader.files(source), lambda file: file.has_rows and _size(file) > wanted.part_bytes
        ):
            if cut:
                for file in files:
                    yield from _of_documents(file.read(wanted.field, counted), wanted, numbers)
            else:
                for group, size in _gather(files, _size, wanted.part_bytes):
                    yield _Part(number=next(numbers), size=size, files=group)


def _of_documents(
    documents: Iterable[Document], wanted: Preparation, numbers: Iterator[int]
) -> Iterator[_Part]:
    for group, size in _gather(documents, lambda d: len(d.text.encode()), wanted.part_bytes):
        yield _Part(number=next(numbers), size=size, documents=group)


def _gather(
    items: Iterable[T], size_of: Callable[[T], int], limit: int
) -> Iterator[tuple[tuple[T, ...], int]]:
    """Items in groups that end with the item that reaches the limit, and the size of each."""
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


def _make_parts(maker: "_Maker", processes: int, total: int, told: Told) -> list[PartEntry]:
    """The entries of all parts in their order, those that are missing made."""
    entries: dict[int, PartEntry] = {}
    done = kept = text = 0
    bad = BadRows()

    def missing() -> Iterator[_Part]:
        nonlocal done, kept
        for part in _parts(maker.corpus, maker.origin.preparation, bad):
            entry = _kept(maker.out, part)
            if entry is None:
                yield part
                continue
            entries[part.number] = entry
            done, kept = done + part.size, kept + part.size
            told(Progress(done=done, total=total, kept=kept, text=text))

    with closing(_made(missing(), maker.make, processes)) as made:
        for part, entry in made:
            entries[part.number] = entry
            done, text = done + part.size, text + entry.num_bytes
            told(Progress(done=done, total=total, kept=kept, text=text))
    bad_rows = bad.count + sum(entry.bad_rows for entry in entries.values())
    if bad_rows and not maker.corpus.bad_rows_told:
        logger.warning("%s: skipped %d rows without text", maker.out, bad_rows)
    return [entries[number] for number in range(len(entries))]


def _made(
    parts: Iterator[_Part], make: Callable[[_Part], PartEntry], processes: int
) -> Generator[tuple[_Part, PartEntry], None, None]:
    """Every part with its entry, as they are made; an interrupt drops those in work."""
    if processes == 1:
        yield from ((part, make(part)) for part in parts)
        return
    pending: dict[Future[PartEntry], _Part] = {}
    with worker_pool(processes) as pool:
        # One more than are in work, so that no process waits; each holds its documents in memory.
        for part in parts:
            pending[pool.submit(make, part)] = part
            if len(pending) > processes:
                yield from _finished(pending)
        while pending:
            yield from _finished(pending)


def _finished(pending: dict[Future[PartEntry], _Part]) -> Iterator[tuple[_Part, PartEntry]]:
    for future in wait(pending, return_when=FIRST_COMPLETED).done:
        yield pending.pop(future), future.result()


@dataclass(frozen=True, kw_only=True)
class _Maker:
    """Makes parts, in whatever process."""

    corpus: Corpus
    origin: Origin
    out: Path

    def make(self, part: _Part) -> PartEntry:
        """Write the part's folder and return its entry."""
        documents, skipped, bad_rows = part.read(self.origin.preparation)
        tokenizer = _tokenizer(self.out, self.origin.tokenizer)
        folder = part_folder(self.out, part.number)
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        tokens = dict.fromkeys(SIDES, 0)
        for side in SIDES:
            own = list(self.corpus.split(documents, held_out=side == "held_out"))
            if own:
                tokens[side] = len(write_shards(own, tokenizer, temporary / side))
        entry = PartEntry(
            sha256=_digest(documents),
            num_bytes=sum(len(document.text.encode()) for document in documents),
            skipped=skipped,
            bad_rows=bad_rows,
            **tokens,
        )
        save_json(entry, temporary / _PART_FILE)
        temporary.rename(folder)
        return entry


@functools.lru_cache(maxsize=1)
def _tokenizer(out: Path, wanted: str) -> Tokenizer:
    """The folder's tokenizer, read once by a process."""
    tokenizer = load_tokenizer(out)
    assert fingerprint(tokenizer) == wanted
    return tokenizer


def _kept(out: Path, part: _Part) -> PartEntry | None:
    """The entry of a part that is whole already; a damaged one is taken away."""
    folder = part_folder(out, part.number)
    if not folder.exists():
        return None
    try:
        entry = load_json(PartEntry, folder / _PART_FILE)
        for side in SIDES:
            wanted = getattr(entry, side)
            found = len(TokenShards.open(folder / side)) if wanted else 0
            if found != wanted:
                raise ConfigError(f"{folder / side}: {found} tokens instead of {wanted}")
    except ConfigError as error:
        logger.warning("%s; the part is made again", error)
        shutil.rmtree(folder)
        return None
    if part.documents and entry.sha256 != _digest(part.documents):
        raise ConfigError(f"{out}: the text has changed since {folder} was made of it")
    return entry


def _digest(documents: Iterable[Document]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        for text in (document.name, document.text):
            data = text.encode(errors="surrogateescape")
            digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
