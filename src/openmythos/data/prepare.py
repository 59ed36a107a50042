"""Make prepared folders: processes tokenise the parts of a corpus in parallel, then merge them.

The result is byte-identical for any number of processes and interruptions: a part's folder gets
its final name when it is complete, and merging only moves files of ids.
"""

import functools
import hashlib
import itertools
import logging
import os
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from openmythos.config import ConfigError, require_int
from openmythos.data.corpus import Corpus
from openmythos.data.parts import Part, cut_into_parts, survey
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
    DOCUMENTS_FILE,
    INDEX_FILE,
    ShardIndex,
    TokenShards,
    shard_name,
    write_shards,
)
from openmythos.data.sources import BadRows, Document
from openmythos.data.tokenizer import Tokenizer, fingerprint, load_tokenizer
from openmythos.files import load_json, save_json, sha256_of, write_atomically
from openmythos.processes import worker_pool

logger = logging.getLogger(__name__)

_PART_FILE = "part.json"
_LOCK_FILE = "lock"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Bytes of the sources: `done`, `total` (0: unknown), `kept` from an interrupted call.

    `text` is the bytes of text tokenised by this call.
    """

    done: int
    total: int
    kept: int
    text: int


OnProgress = Callable[[Progress], None]


def prepare(
    wanted: Preparation,
    tokenizer: Tokenizer,
    out: Path,
    *,
    processes: int = 1,
    on_progress: OnProgress = lambda _progress: None,
) -> Prepared:
    """Make the folder, or resume an interrupted call.

    Raises a ConfigError if settings, tokenizer or text have changed since then. With processes = 1
    no worker process is started.
    """
    require_int("processes", processes, minimum=1)
    files, total = survey(wanted)
    origin = Origin(preparation=wanted, tokenizer=fingerprint(tokenizer), files=files)
    if not (out / PREPARED_FILE).is_file():
        _require_own(out, origin)
        unfinished = out / UNFINISHED
        unfinished.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(unfinished / _LOCK_FILE, timeout=0):
                # Another process may have finished the folder in the meantime.
                if not (out / PREPARED_FILE).is_file():
                    if not (unfinished / PREPARED_FILE).is_file():
                        worker = _begin(out, origin, tokenizer)
                        entries = _make_parts(worker, processes, total, on_progress)
                        _index_parts(out, origin, entries)
                    _merge(out)
        except Timeout as error:
            raise ConfigError(f"{out}: another process is preparing it at this moment") from error
    prepared = load_json(Prepared, out / PREPARED_FILE)
    _require_same(out, prepared.origin, origin)
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    return prepared


def _begin(out: Path, origin: Origin, tokenizer: Tokenizer) -> "_Worker":
    arguments = dict(vars(origin.preparation))
    del arguments["part_bytes"]  # the others are those of the corpus
    corpus = Corpus(**arguments)
    save_json(origin, out / UNFINISHED / ORIGIN_FILE)
    tokenizer.save(out)
    return _Worker(corpus=corpus, origin=origin, out=out)


def _require_own(out: Path, origin: Origin) -> None:
    if (out / UNFINISHED / ORIGIN_FILE).is_file():
        _require_same(out, load_json(Origin, out / UNFINISHED / ORIGIN_FILE), origin)
    elif out.exists() and (not out.is_dir() or any(p.name != UNFINISHED for p in out.iterdir())):
        raise ConfigError(f"{out}: exists already and is not an unfinished prepared folder")


def _require_same(out: Path, found: Origin, wanted: Origin) -> None:
    for field in fields(Preparation):
        before, now = (getattr(o.preparation, field.name) for o in (found, wanted))
        if before != now:
            change = f"{field.name} = {before!r}, not {now!r}"
            raise ConfigError(f"{out}: was begun with {change}; choose another --out")
    if found.tokenizer != wanted.tokenizer:
        raise ConfigError(f"{out}: was begun with another tokenizer; choose another --out")
    if found.files != wanted.files:
        where = ", ".join(wanted.preparation.paths)
        raise ConfigError(f"{where}: files changed since {out} was begun; choose another --out")


@dataclass(frozen=True, kw_only=True)
class _Worker:
    """Tokenises parts; used in this process and in the pool's."""

    corpus: Corpus
    origin: Origin
    out: Path

    def make(self, part: Part) -> PartEntry:
        """Write the part's folder and return its entry."""
        documents, skipped, bad_rows = part.read(self.origin.preparation)
        tokenizer = _tokenizer(self.out, self.origin.tokenizer)
        folder = _part_folder(self.out, part.number)
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
    """The folder's tokenizer, read once per process."""
    tokenizer = load_tokenizer(out)
    assert fingerprint(tokenizer) == wanted
    return tokenizer


def _part_folder(out: Path, number: int) -> Path:
    return out / UNFINISHED / f"part-{number:05d}"


def _make_parts(
    worker: _Worker, processes: int, total: int, on_progress: OnProgress
) -> list[PartEntry]:
    """Make the missing parts; returns the entries of all parts in order."""
    entries: dict[int, PartEntry] = {}
    done = kept = text = 0
    bad = BadRows()

    def missing() -> Iterator[Part]:
        nonlocal done, kept
        for part in cut_into_parts(worker.corpus, worker.origin.preparation, bad):
            entry = _finished_entry(worker.out, part)
            if entry is None:
                yield part
                continue
            entries[part.number] = entry
            done, kept = done + part.size, kept + part.size
            on_progress(Progress(done=done, total=total, kept=kept, text=text))

    with closing(_in_processes(missing(), worker.make, processes)) as made:
        for part, entry in made:
            entries[part.number] = entry
            done, text = done + part.size, text + entry.num_bytes
            on_progress(Progress(done=done, total=total, kept=kept, text=text))
    bad_rows = bad.count + sum(entry.bad_rows for entry in entries.values())
    if bad_rows and not worker.corpus.warned:
        logger.warning("%s: skipped %d rows without text", worker.out, bad_rows)
    return [entries[number] for number in range(len(entries))]


def _in_processes(
    parts: Iterator[Part], make: Callable[[Part], PartEntry], processes: int
) -> Generator[tuple[Part, PartEntry], None, None]:
    """(part, entry) in order of completion; an interrupt drops unfinished parts."""
    if processes == 1:
        yield from ((part, make(part)) for part in parts)
        return
    pending: dict[Future[PartEntry], Part] = {}
    with worker_pool(processes) as pool:
        # Queue only one part beyond the running ones: queued parts keep documents in memory.
        for part in parts:
            pending[pool.submit(make, part)] = part
            if len(pending) > processes:
                yield from _finished(pending)
        while pending:
            yield from _finished(pending)


def _finished(pending: dict[Future[PartEntry], Part]) -> Iterator[tuple[Part, PartEntry]]:
    for future in wait(pending, return_when=FIRST_COMPLETED).done:
        yield pending.pop(future), future.result()


def _finished_entry(out: Path, part: Part) -> PartEntry | None:
    """The entry of a part if it is finished, else None; a damaged part is deleted."""
    folder = _part_folder(out, part.number)
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


def _index_parts(out: Path, origin: Origin, entries: list[PartEntry]) -> None:
    """Write the merged documents.bin and index.json next to the parts; prepared.json last."""
    unfinished = out / UNFINISHED
    hashes: dict[str, str] = {}
    for side in SIDES:
        parts = []
        for number, entry in enumerate(entries):
            if getattr(entry, side):
                shards = TokenShards.open(_part_folder(out, number) / side, verify=False)
                # A copy: a memory map would keep a file open for every part.
                starts = np.array(shards.document_starts)
                parts.append(TokenShards(shards.index, shards.files, starts))
        if not parts:
            where = ", ".join(origin.preparation.paths)
            raise ConfigError(f"{where}: no text for the {side} part")
        joined = TokenShards.join(parts)
        write_atomically(unfinished / f"{side}-{DOCUMENTS_FILE}", joined.document_starts.tobytes())
        save_json(joined.index, unfinished / f"{side}-{INDEX_FILE}")
        hashes[side] = sha256_of(unfinished / f"{side}-{INDEX_FILE}")
    train, held_out = (hashes[side] for side in SIDES)
    prepared = Prepared(origin=origin, parts=tuple(entries), train=train, held_out=held_out)
    save_json(prepared, unfinished / PREPARED_FILE)


def _merge(out: Path) -> None:
    """Move all files to their final paths; an interrupted call may have moved some already."""
    unfinished = out / UNFINISHED
    prepared = load_json(Prepared, unfinished / PREPARED_FILE)
    for side in SIDES:
        (out / side).mkdir(exist_ok=True)
        numbers = itertools.count()
        for part, entry in enumerate(prepared.parts):
            if not getattr(entry, side):
                continue
            folder = _part_folder(out, part) / side
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
