"""Tokens on disk: memory-mapped files of ids with checksums.

    folder/
    ├── tokens-00000.bin ...    ids, little-endian uint16 (uint32 for more than 65536 ids)
    ├── documents.bin           position of the first token of each document, little-endian int64
    └── index.json              sizes and hashes; written last: a folder that has it is complete

Every document starts with bos.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from openmythos.config import ConfigError, require_int
from openmythos.data.sources import Document
from openmythos.data.tokenizer import Tokenizer, fingerprint
from openmythos.files import load_json, reading, save_json, write_atomically

INDEX_FILE = "index.json"
DOCUMENTS_FILE = "documents.bin"
_STARTS = np.dtype("<i8")
# Long documents are split into pieces, which are tokenised in batches to use all cores.
_PIECE_CHARACTERS = 1 << 17
_BATCH_CHARACTERS = 1 << 21
_OPEN_FILES = 256


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """Size and hash of one file of ids."""

    tokens: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """The content of index.json; ``tokenizer`` is the tokenizer's fingerprint."""

    format_version: Literal[1] = 1
    dtype: Literal["uint16", "uint32"]
    tokenizer: str
    vocab_size: int
    bos_id: int
    num_documents: int
    num_bytes: int
    documents_sha256: str
    shards: tuple[ShardEntry, ...]

    def __post_init__(self) -> None:
        require_int("vocab_size", self.vocab_size, minimum=1)
        require_int("bos_id", self.bos_id, minimum=0, maximum=self.vocab_size - 1)
        require_int("num_documents", self.num_documents, minimum=1)
        for shard in self.shards:
            require_int("tokens", shard.tokens, minimum=1)


class TokenShards:
    """The token stream of a folder written by ``write_shards``, or of several folders joined."""

    def __init__(
        self, index: ShardIndex, files: Sequence[Path], document_starts: NDArray[np.int64]
    ) -> None:
        self.index = index
        self.files = tuple(files)
        self.document_starts = document_starts
        # Position of the first token of each shard, and the total number of tokens.
        self._bounds = np.array(list(accumulate((s.tokens for s in index.shards), initial=0)))
        self._dtype = _little_endian(index.dtype)
        for path, entry in zip(self.files, index.shards, strict=True):
            _check_size(path, self._dtype, entry.tokens)
        # A memory map keeps its file open, and a process may have about a thousand open files.
        self._tokens = lru_cache(maxsize=_OPEN_FILES)(
            lambda number: _map(self.files[number], self._dtype, index.shards[number].tokens)
        )

    @classmethod
    def open(cls, folder: str | os.PathLike[str], verify: bool = True) -> "TokenShards":
        """Open a folder; ``verify`` reads all files to check hashes and ids."""
        folder = Path(folder)
        if not (folder / INDEX_FILE).is_file():
            raise ConfigError(f"{folder}: holds no finished token shards, {INDEX_FILE} is missing")
        index = load_json(ShardIndex, folder / INDEX_FILE)
        files = [folder / shard_name(number) for number in range(len(index.shards))]
        starts = _map(folder / DOCUMENTS_FILE, _STARTS, index.num_documents)
        shards = cls(index, files, starts)
        if verify:
            shards.verify()
        return shards

    @classmethod
    def join(cls, parts: Sequence["TokenShards"]) -> "TokenShards":
        """Concatenate streams of the same tokenizer."""
        if len(parts) == 1:
            return parts[0]
        firsts = accumulate((len(part) for part in parts), initial=0)
        starts = [first + part.document_starts for first, part in zip(firsts, parts, strict=False)]
        table = np.concatenate(starts, dtype=_STARTS)
        index = replace(
            parts[0].index,
            num_documents=len(table),
            num_bytes=sum(part.num_bytes for part in parts),
            documents_sha256=hashlib.sha256(table.tobytes()).hexdigest(),
            shards=tuple(entry for part in parts for entry in part.index.shards),
        )
        if any(part.index.tokenizer != index.tokenizer for part in parts):
            raise ConfigError("the token shards were written with different tokenizers")
        return cls(index, [file for part in parts for file in part.files], table)

    def __len__(self) -> int:
        return int(self._bounds[-1])

    @property
    def bos_id(self) -> int:
        return self.index.bos_id

    @property
    def num_bytes(self) -> int:
        """Size of the text as UTF-8."""
        return self.index.num_bytes

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """A copy of the tokens from start to stop, across files."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop}: there are {len(self)}")
        result = np.empty(stop - start, dtype=np.int64)
        number = int(np.searchsorted(self._bounds, start, side="right")) - 1
        done = 0
        while done < len(result):
            first = start + done - int(self._bounds[number])
            part = self._tokens(number)[first : first + len(result) - done]
            result[done : done + len(part)] = part
            done += len(part)
            number += 1
        return result

    def require_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise unless the ids were made with this tokenizer."""
        if fingerprint(tokenizer) != self.index.tokenizer:
            raise ConfigError("the token shards were written with another tokenizer")

    def verify(self, rank: int = 0, world_size: int = 1) -> None:
        """Raise a ConfigError that names a damaged file; each rank checks a share of the files."""
        if rank == 0:
            table = self.files[0].with_name(DOCUMENTS_FILE)
            _check_hash(table, self.document_starts, self.index.documents_sha256)
        files = list(zip(self.files, self.index.shards, strict=True))
        for path, entry in files[rank::world_size]:
            tokens = _map(path, self._dtype, entry.tokens)
            _check_hash(path, tokens, entry.sha256)
            highest = int(tokens.max())
            if highest >= self.index.vocab_size:
                raise ConfigError(
                    f"{path}: holds id {highest}, vocab_size is {self.index.vocab_size}"
                )


def write_shards(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    folder: str | os.PathLike[str],
    *,
    shard_tokens: int = 1 << 25,
    progress: Callable[[int], None] = lambda _done: None,
) -> TokenShards:
    """Tokenise documents into a folder, replacing earlier shards, and open it.

    ``progress`` gets the bytes of text done so far. An interrupted folder does not open.
    """
    require_int("shard_tokens", shard_tokens, minimum=1)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX_FILE).unlink(missing_ok=True)
    for stale in folder.glob("tokens-*.bin"):
        stale.unlink()
    dtype: Literal["uint16", "uint32"] = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    writer = _Writer(folder, _little_endian(dtype), shard_tokens)
    starts: list[int] = []
    num_bytes = 0
    for batch in _batches(documents):
        encoded = tokenizer.encode_batch([piece for piece, _ in batch])
        for (piece, is_start), ids in zip(batch, encoded, strict=True):
            if is_start:
                starts.append(writer.written)
                ids.insert(0, tokenizer.bos_id)
            writer.add(ids)
            num_bytes += len(piece.encode())
        progress(num_bytes)
    if not starts:
        raise ConfigError("there is no document to tokenise")
    writer.flush()
    table = np.array(starts, dtype=_STARTS).tobytes()
    write_atomically(folder / DOCUMENTS_FILE, table)
    index = ShardIndex(
        dtype=dtype,
        tokenizer=fingerprint(tokenizer),
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        num_documents=len(starts),
        num_bytes=num_bytes,
        documents_sha256=hashlib.sha256(table).hexdigest(),
        shards=tuple(writer.entries),
    )
    save_json(index, folder / INDEX_FILE)
    return TokenShards.open(folder, verify=False)


class _Writer:
    """Buffers ids and writes a file for every shard_tokens of them."""

    def __init__(self, folder: Path, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self.entries: list[ShardEntry] = []
        self.written = 0  # ids
        self._folder, self._dtype = folder, dtype
        self._size = shard_tokens * dtype.itemsize
        self._buffer = bytearray()

    def add(self, ids: list[int]) -> None:
        self._buffer += np.array(ids, dtype=self._dtype).tobytes()
        self.written += len(ids)
        while len(self._buffer) >= self._size:
            self.flush()

    def flush(self) -> None:
        """Write at most one file."""
        data = bytes(self._buffer[: self._size])
        del self._buffer[: self._size]
        if data:
            write_atomically(self._folder / shard_name(len(self.entries)), data)
            tokens, sha256 = len(data) // self._dtype.itemsize, hashlib.sha256(data).hexdigest()
            self.entries.append(ShardEntry(tokens=tokens, sha256=sha256))


def _batches(documents: Iterable[Document]) -> Iterator[list[tuple[str, bool]]]:
    """Lists of (piece of text, whether the piece starts a document)."""
    batch: list[tuple[str, bool]] = []
    size = 0
    for document in documents:
        for start, piece in _pieces(document.text):
            batch.append((piece, start == 0))
            size += len(piece)
            if size >= _BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _pieces(text: str) -> Iterator[tuple[int, str]]:
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        limit = start + _PIECE_CHARACTERS
        # Cut after a line break if there is one: few tokens span a line break.
        stop = text.rfind("\n", start, limit) + 1 or limit
        yield start, text[start:stop]
        start = stop
    yield start, text[start:]


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"tokens-{number:05d}.bin"


def _little_endian(dtype: str) -> np.dtype[Any]:
    return np.dtype(dtype).newbyteorder("<")


def _map(path: Path, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    _check_size(path, dtype, count)
    with reading(path):
        return np.asarray(np.memmap(path, dtype=dtype, mode="r", shape=(count,)))


def _check_size(path: Path, dtype: np.dtype[Any], count: int) -> None:
    with reading(path):
        size = path.stat().st_size
    wanted = count * dtype.itemsize
    if size != wanted:
        raise ConfigError(f"{path}: is damaged, {size} bytes instead of {wanted}")


def _check_hash(path: Path, data: NDArray[Any], sha256: str) -> None:
    if hashlib.sha256(data.data).hexdigest() != sha256:
        raise ConfigError(f"{path}: is damaged, its sha256 is not that of {INDEX_FILE}")
