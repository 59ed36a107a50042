"""Shards are read as they were written; damaged and unfinished ones do not open."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmythos.config import ConfigError
from openmythos.data import shards as shards_module
from openmythos.data.corpus import Corpus
from openmythos.data.shards import TokenShards, write_shards
from openmythos.data.sources import Document
from openmythos.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, fingerprint

TEXTS = ["one\n", "zwei ä", "", "drei: 漢字 🙂\n" * 3]
BOS = ByteTokenizer.bos_id


def documents(texts: list[str]) -> list[Document]:
    return [Document(name=str(number), text=text) for number, text in enumerate(texts)]


def stream(texts: list[str], tokenizer: Tokenizer) -> list[int]:
    return [token for text in texts for token in (tokenizer.bos_id, *tokenizer.encode(text))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(documents(TEXTS), ByteTokenizer(), tmp_path, shard_tokens=16)
    return tmp_path


@pytest.mark.parametrize("shard_tokens", [1, 7, 16, 10**6])
@pytest.mark.parametrize(
    "tokenizer", [ByteTokenizer(), BPETokenizer.train(TEXTS, 270)], ids=["bytes", "bpe"]
)
def test_round_trip(tmp_path: Path, tokenizer: Tokenizer, shard_tokens: int) -> None:
    written = write_shards(documents(TEXTS), tokenizer, tmp_path, shard_tokens=shard_tokens)
    expected = stream(TEXTS, tokenizer)
    for shards in (written, TokenShards.open(tmp_path)):
        assert shards.read(0, len(shards)).tolist() == expected
        assert shards.index.vocab_size == tokenizer.vocab_size
        assert shards.bos_id == tokenizer.bos_id
        assert shards.index.num_documents == len(TEXTS)
        assert shards.num_bytes == sum(len(text.encode()) for text in TEXTS)
        starts = [place for place, token in enumerate(expected) if token == tokenizer.bos_id]
        assert shards.document_starts.tolist() == starts
        assert shards.index.dtype == "uint16"
        assert shards.index.tokenizer == fingerprint(tokenizer)
    assert len(list(tmp_path.glob("tokens-*.bin"))) == -(-len(expected) // shard_tokens)


@given(data=st.data())
def test_any_slice_reads_across_files(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    shards = write_shards(documents(TEXTS), ByteTokenizer(), folder, shard_tokens=5)
    start = data.draw(st.integers(0, len(shards)))
    stop = data.draw(st.integers(start, len(shards)))
    read = shards.read(start, stop)
    assert read.dtype == np.int64
    assert read.tolist() == stream(TEXTS, ByteTokenizer())[start:stop]


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 2), (0, 10**6)])
def test_slices_outside_are_refused(folder: Path, start: int, stop: int) -> None:
    with pytest.raises(IndexError, match=f"tokens {start} to {stop}: there are"):
        TokenShards.open(folder).read(start, stop)


def test_long_documents_are_cut_into_pieces_without_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module, "_PIECE_CHARACTERS", 10)
    monkeypatch.setattr(shards_module, "_BATCH_CHARACTERS", 25)
    texts = ["a line\n" * 9, "x" * 45, "0123456789", "short"]
    done: list[int] = []
    shards = write_shards(documents(texts), ByteTokenizer(), tmp_path, progress=done.append)
    assert shards.read(0, len(shards)).tolist() == stream(texts, ByteTokenizer())
    assert shards.index.num_documents == len(texts)
    assert done == sorted(done)
    assert len(done) > 2
    assert done[-1] == shards.num_bytes


def test_a_large_vocabulary_gets_wide_ids(tmp_path: Path) -> None:
    class Wide(ByteTokenizer):
        vocab_size = 70_000  # type: ignore[assignment]
        bos_id = 69_999

    shards = write_shards(documents(TEXTS), Wide(), tmp_path)
    assert shards.index.dtype == "uint32"
    assert TokenShards.open(tmp_path).read(0, 2).tolist() == [69_999, ord("o")]


def test_rewriting_replaces_all(folder: Path) -> None:
    write_shards(documents(["new"]), ByteTokenizer(), folder)
    shards = TokenShards.open(folder)
    assert shards.read(0, len(shards)).tolist() == [BOS, *b"new"]
    assert [path.name for path in folder.glob("tokens-*")] == ["tokens-00000.bin"]


def test_another_tokenizer_is_refused(folder: Path) -> None:
    shards = TokenShards.open(folder)
    shards.require_tokenizer(ByteTokenizer())
    with pytest.raises(ConfigError, match="written with another tokenizer"):
        shards.require_tokenizer(BPETokenizer.train(TEXTS, 270))


def test_no_document_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no document to tokenise"):
        write_shards([], ByteTokenizer(), tmp_path)
    with pytest.raises(ConfigError, match="holds no finished token shards"):
        TokenShards.open(tmp_path)


def test_interrupted_writing_leaves_nothing_that_opens(folder: Path) -> None:
    def interrupted() -> Iterator[Document]:
        yield Document(name="whole", text="x" * (1 << 22))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(interrupted(), ByteTokenizer(), folder, shard_tokens=1 << 16)
    assert (folder / "tokens-00000.bin").exists()
    with pytest.raises(ConfigError, match=r"holds no finished token shards, index\.json is"):
        TokenShards.open(folder)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["tokens-00000.bin", "tokens-00001.bin", "documents.bin"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "is damaged, its sha256"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is damaged, .* bytes instead"),
        (
            lambda path: path.write_bytes(path.read_bytes() + b"\0\0"),
            "is damaged, .* bytes instead",
        ),
        (lambda path: path.write_bytes(b""), "is damaged, 0 bytes instead"),
        (Path.unlink, "cannot be read: No such file"),
    ],
)
def test_damage_is_named(
    folder: Path, name: str, damage: Callable[[Path], object], message: str
) -> None:
    damage(folder / name)
    with pytest.raises(ConfigError, match=f"{name}: {message}"):
        TokenShards.open(folder)


def test_only_verify_reads_the_tokens(folder: Path) -> None:
    flip(folder / "tokens-00000.bin")
    TokenShards.open(folder, verify=False)


def test_ranks_divide_the_files_between_them(folder: Path) -> None:
    flip(folder / "tokens-00001.bin")
    shards = TokenShards.open(folder, verify=False)
    shards.verify(rank=0, world_size=2)
    with pytest.raises(ConfigError, match=r"tokens-00001\.bin: is damaged"):
        shards.verify(rank=1, world_size=2)


def rewrite_index(folder: Path, **changes: Any) -> None:
    path = folder / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_ids_beyond_the_vocabulary_are_named(folder: Path) -> None:
    path = folder / "tokens-00001.bin"
    tokens = np.frombuffer(path.read_bytes(), dtype="<u2").copy()
    tokens[2] = 257
    path.write_bytes(tokens.tobytes())
    entries = json.loads((folder / "index.json").read_text())["shards"]
    entries[1]["sha256"] = hashlib.sha256(tokens.tobytes()).hexdigest()
    rewrite_index(folder, shards=entries)
    with pytest.raises(ConfigError, match=r"tokens-00001\.bin: holds id 257, vocab_size is 257"):
        TokenShards.open(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version = 2"),
        ({"dtype": "float32"}, "dtype = 'float32'"),
        ({"num_documents": 0}, "num_documents = 0"),
        ({"bos_id": 257}, "bos_id = 257"),
        ({"shards": [{"tokens": -1, "sha256": ""}]}, "tokens = -1"),
        ({"color": 1}, "color: unknown key"),
    ],
)
def test_a_wrong_index_is_named(folder: Path, changes: dict[str, Any], message: str) -> None:
    rewrite_index(folder, **changes)
    with pytest.raises(ConfigError, match=rf"index\.json: .*{message}"):
        TokenShards.open(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_damaged_index_is_named(folder: Path, content: str) -> None:
    (folder / "index.json").write_text(content)
    with pytest.raises(ConfigError, match=r"index\.json: "):
        TokenShards.open(folder)


def test_a_corpus_becomes_shards_on_both_sides(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("It was a dark and stormy night.\n" * 50)
    corpus = Corpus([str(tmp_path / "book.txt")], held_out=0.1)
    train = write_shards(corpus.train(), ByteTokenizer(), tmp_path / "train")
    held_out = write_shards(corpus.held_out(), ByteTokenizer(), tmp_path / "held_out")
    assert train.num_bytes + held_out.num_bytes == 1600
    text = ByteTokenizer().decode(held_out.read(0, len(held_out)).tolist())
    assert text == "".join(document.text for document in corpus.held_out())
