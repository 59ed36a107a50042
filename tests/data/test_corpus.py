"""Reading of all kinds of sources, and the split into training and held-out text."""

import gzip
import json
import logging
import os
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from openmythos.config import ConfigError
from openmythos.data import gcide
from openmythos.data.corpus import Corpus, compression_baselines

ROWS = [{"text": "first\r\n", "body": "eins"}, {"text": "zweiter: ä 漢", "body": "zwei"}]


def write_files(folder: Path, count: int, *, start: int = 0) -> None:
    for number in range(start, start + count):
        path = folder / f"part{number % 3}" / f"file{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"number = {number}\n" * 5)


def texts(corpus: Corpus) -> dict[str, str]:
    return {document.name: document.text for document in corpus.documents()}


def names(corpus: Corpus) -> tuple[set[str], set[str]]:
    train = {document.name for document in corpus.train()}
    return train, {document.name for document in corpus.held_out()}


def test_a_folder_is_read_sorted_without_what_is_hidden_or_no_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_files(tmp_path, 4)
    for name in (".git/config", "__pycache__/a.txt", ".hidden", "part0/.hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("hidden")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / "nul.txt").write_bytes(b"a\0b")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere")
    with caplog.at_level(logging.WARNING):
        corpus = Corpus([str(tmp_path)])
        found = [document.name for document in corpus.documents()]
    assert found == ["part0/file0.py", "part0/file3.py", "part1/file1.py", "part2/file2.py"]
    assert [r.getMessage() for r in caplog.records] == [
        f"{tmp_path}: skipped 2 files that are not UTF-8 text"
    ]


def test_text_is_read_unchanged_but_for_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "dos.txt"
    path.write_bytes("\ufeffa\r\nb\rc\n ä".encode())
    assert texts(Corpus([str(path)])) == {"dos.txt": "a\r\nb\rc\n ä"}


def test_globs(tmp_path: Path) -> None:
    write_files(tmp_path, 4)
    (tmp_path / "notes.md").write_text("notes")
    (tmp_path / "image.png").write_bytes(b"\xff")
    assert set(texts(Corpus([f"{tmp_path}/**/*1.py"]))) == {"part1/file1.py"}
    assert set(texts(Corpus([f"{tmp_path}/*.[mp]*"]))) == {"notes.md"}
    assert len(texts(Corpus([f"{tmp_path}/*"]))) == 5
    with pytest.raises(ConfigError, match=r"\*\.txt': matches no file"):
        Corpus([f"{tmp_path}/*.txt"])


def test_overlapping_sources_are_read_once(tmp_path: Path) -> None:
    write_files(tmp_path, 3)
    sources = [str(tmp_path), f"{tmp_path}/part0", f"{tmp_path}/part1/file1.py", f"{tmp_path}/*"]
    assert len(list(Corpus(sources).documents())) == 3


@pytest.mark.parametrize("packed", [False, True])
def test_jsonl(tmp_path: Path, packed: bool) -> None:
    data = "\n\n".join(json.dumps(row) for row in ROWS).encode()
    path = tmp_path / ("rows.jsonl.gz" if packed else "rows.jsonl")
    path.write_bytes(gzip.compress(data) if packed else data)
    expected = {f"{path.name}:{line}": row for line, row in zip((1, 3), ROWS, strict=True)}
    for source in (path, tmp_path):
        for field in ("text", "body"):
            read = texts(Corpus([str(source)], field=field))
            assert read == {name: row[field] for name, row in expected.items()}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "is not valid JSON: .* at character 2$"),
        (b'{"text": ', "is not valid JSON: Expecting value at character"),
        (b'{"text": "\xff"}', "is not UTF-8 text: .* at byte 11$"),
        (b'{"body": "a", "id": 1}', "has no field 'text'; its fields: body, id"),
        (b'{"text": null}', "field 'text' is null, must be a string"),
        (b'{"text": 3}', "field 'text' is of type int, must be a string"),
        (b"[]", "is not an object with fields"),
        (b'{"text": "\\ud800"}', "is not UTF-8 text"),
    ],
)
def test_jsonl_errors_name_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(ConfigError, match=rf"rows\.jsonl, line 2: {message}"):
        Corpus([str(tmp_path)])


def test_bad_rows_can_be_left_out_and_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [b'{"text": "fine %d"}' % number for number in range(9)]
    path.write_bytes(b"\n".join([*rows[:5], b'{"text": null}', b"{", *rows[5:]]))
    with pytest.raises(ConfigError, match="line 6"):
        Corpus([str(path)])
    with caplog.at_level(logging.WARNING):
        corpus = Corpus([str(path)], skip_bad_rows=True)
        assert sorted(texts(corpus).values()) == [f"fine {number}" for number in range(9)]
    (record,) = caplog.records
    assert "skipped 2 rows; the first: " in record.getMessage() and "line 6" in record.getMessage()


@pytest.mark.parametrize("name", ["UP.JSONL", "rows.ndjson", "ROWS.NDJSON.GZ", "bom.jsonl"])
def test_rows_are_known_by_any_spelling(tmp_path: Path, name: str) -> None:
    rows = b"".join(b'{"text": "row %d"}\n' % number for number in range(40))
    rows = b"\xef\xbb\xbf" + rows if name == "bom.jsonl" else rows
    (tmp_path / name).write_bytes(gzip.compress(rows) if name.endswith("GZ") else rows)
    for source in (tmp_path, tmp_path / name):
        read = texts(Corpus([str(source)]))
        assert read == {f"{name}:{number + 1}": f"row {number}" for number in range(40)}


def test_runs_and_prepared_folders_are_no_text(tmp_path: Path) -> None:
    """`--data .` works again after a run was made from it."""
    write_files(tmp_path, 4)
    before = texts(Corpus([str(tmp_path)]))
    for name in (
        *("runs/tiny-1/config.toml", "runs/tiny-1/tokenizer.json", "runs/tiny-1/metrics.jsonl"),
        *("runs/tiny-1/checkpoints/step-00000001/config.json", "p/prepared.json"),
        *("p/tokenizer.json", "q/unfinished/origin.json", "q/tokenizer.json"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    assert texts(Corpus([str(tmp_path)])) == before
    with pytest.raises(ConfigError, match=r"p: no text found; supported: plain UTF-8 text, "):
        Corpus([str(tmp_path / "p")])


def test_what_cannot_be_read_twice_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="pipe: is not a regular file"):
        Corpus([str(tmp_path / "pipe")])


@pytest.mark.parametrize("name", ["text.txt.gz", "text.zst", "TEXT.ZIP"])
def test_compressed_text_is_called_that(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b"text", mtime=0))
    with pytest.raises(ConfigError, match=rf"{name}: is compressed; supported: plain.*\.gz"):
        Corpus([str(tmp_path / name)])


@pytest.mark.parametrize("damage", [lambda data: data[:-12], lambda data: b"not gzip"])
def test_damaged_gzip_is_named(tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(damage(gzip.compress(b'{"text": "fine"}\n' * 100)))
    with pytest.raises(ConfigError, match=r"rows\.jsonl\.gz: (is damaged|cannot be read)"):
        Corpus([str(path)])


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    for source in (path, tmp_path):
        read = texts(Corpus([str(source)], field="text"))
        assert read == {f"rows.parquet:{n}": row["text"] for n, row in enumerate(ROWS, 1)}
    with pytest.raises(ConfigError, match="has no column 'content'; its columns: text, body"):
        Corpus([str(path)], field="content")


def test_parquet_errors_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 no table")
    with pytest.raises(ConfigError, match=r"rows\.parquet: is not a readable Parquet file"):
        Corpus([str(path)])
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    with pytest.raises(ConfigError, match=r"rows\.parquet, row 2: field 'text' is null"):
        Corpus([str(path)])


class FakeDatasets(ModuleType):
    """A fake datasets package: records the calls, yields the rows."""

    def __init__(self) -> None:
        super().__init__("datasets")
        self.calls: list[tuple[str, str | None, str, bool]] = []

    def load_dataset(
        self, name: str, config: str | None, *, split: str, streaming: bool
    ) -> Iterator[dict[str, str]]:
        self.calls.append((name, config, split, streaming))
        if name == "missing":
            raise FileNotFoundError("Dataset 'missing' doesn't exist\non the hub")
        return iter(ROWS)


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch) -> FakeDatasets:
    fake = FakeDatasets()
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return fake


@pytest.mark.parametrize(
    ("source", "call"),
    [
        ("hf:org/name", ("org/name", None, "train", True)),
        ("hf:org/name:en", ("org/name", "en", "train", True)),
        ("hf:org/name:en:test", ("org/name", "en", "test", True)),
        ("hf:org/name::test", ("org/name", None, "test", True)),
    ],
)
def test_hugging_face(
    datasets: FakeDatasets, source: str, call: tuple[str, str | None, str, bool]
) -> None:
    corpus = Corpus([source])
    assert list(texts(corpus).values()) == [row["text"] for row in ROWS]
    assert set(datasets.calls) == {call}


def test_hugging_face_errors_are_one_line(
    datasets: FakeDatasets, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"^hf:missing: cannot be loaded: .* doesn't exist$"):
        Corpus(["hf:missing"])
    with pytest.raises(ConfigError, match="hf:name, row 1: has no field 'content'"):
        Corpus(["hf:name"], field="content")
    for source in ("hf:", "hf:a:b:c:d"):
        with pytest.raises(ConfigError, match=r"must be written hf:NAME\[:CONFIG\]\[:SPLIT\]"):
            Corpus([source])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'openmythos\[data\]'"):
        Corpus(["hf:name"])


def test_stdlib() -> None:
    corpus = Corpus(["stdlib"])
    sizes = {document.name: len(document.text.encode()) for document in corpus.documents()}
    assert {"argparse.py", "asyncio/tasks.py"} <= sizes.keys()
    folders = {part for name in sizes for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert 8e6 < sum(sizes.values()) < 16e6
    train, held_out = names(corpus)
    assert train | held_out == sizes.keys()
    assert not train & held_out
    assert 0.2e6 < sum(sizes[name] for name in held_out) < 1e6


@pytest.mark.parametrize("name", ["nowhere", "nowhere/file.txt"])
def test_missing_paths_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: no such file or folder"):
        Corpus([str(tmp_path / name)])


@pytest.mark.parametrize("data", [b"a\0b", b"caf\xe9", gzip.compress(b"text", mtime=0)])
def test_a_binary_file_given_by_name_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "file.txt"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"file\.txt: is not UTF-8 text"):
        Corpus([str(path)])


def test_an_empty_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must name at least one source"):
        Corpus([])
    (tmp_path / "empty.txt").touch()
    for source in (tmp_path, tmp_path / "empty.txt"):
        with pytest.raises(ConfigError, match=r"no text found; supported: plain"):
            Corpus([str(source)])
    (tmp_path / "image.png").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"no text found \(skipped 1 files that are not"):
        Corpus([str(tmp_path)])
    (tmp_path / "letter.txt").write_text("a")
    with pytest.raises(ConfigError, match="1 bytes are too few to hold some out"):
        Corpus([str(tmp_path / "letter.txt")])


def test_each_document_is_on_one_side(tmp_path: Path) -> None:
    write_files(tmp_path, 150)
    corpus = Corpus([str(tmp_path)])
    train, held_out = names(corpus)
    assert len(train) + len(held_out) == 150
    assert not train & held_out
    assert 1 <= len(held_out) <= 15
    assert names(corpus) == names(Corpus([str(tmp_path)]))
    whole = [document for document in corpus.documents() if document.name in held_out]
    assert list(corpus.held_out()) == whole


def test_adding_documents_moves_none(tmp_path: Path) -> None:
    write_files(tmp_path, 150)
    train, held_out = names(Corpus([str(tmp_path)]))
    write_files(tmp_path, 150, start=150)
    more_train, more_held_out = names(Corpus([str(tmp_path)]))
    assert train < more_train
    assert held_out < more_held_out


def test_the_split_does_not_depend_on_where_the_folder_is(tmp_path: Path) -> None:
    for name in ("here", "there"):
        write_files(tmp_path / name, 60)
    assert names(Corpus([f"{tmp_path}/here"])) == names(Corpus([f"{tmp_path}/there"]))


def test_one_document_is_held_out_where_the_hash_takes_none(tmp_path: Path) -> None:
    write_files(tmp_path, 8)
    train, held_out = names(Corpus([str(tmp_path)], held_out=1e-9))
    assert (len(train), len(held_out)) == (7, 1)


@pytest.mark.parametrize("count", [1, 3])
def test_few_documents_are_split_by_position(tmp_path: Path, count: int) -> None:
    for number in range(count):
        (tmp_path / f"{number}.txt").write_text("".join(chr(0x4E00 + n) for n in range(1000)))
    corpus = Corpus([str(tmp_path)], held_out=0.1)
    train, held_out = list(corpus.train()), list(corpus.held_out())
    assert [len(d.text) for d in train] == [900] * count
    assert [len(d.text) for d in held_out] == [100] * count
    whole = {a.name: a.text + b.text for a, b in zip(train, held_out, strict=True)}
    assert whole == texts(corpus)


def test_the_shortest_text_that_can_be_split(tmp_path: Path) -> None:
    (tmp_path / "two.txt").write_text("ab")
    corpus = Corpus([str(tmp_path)])
    assert [d.text for d in corpus.train()] == ["a"]
    assert [d.text for d in corpus.held_out()] == ["b"]


def test_limit_bytes(tmp_path: Path) -> None:
    write_files(tmp_path, 9)
    size = len("number = 0\n" * 5)
    for limit, count in ((1, 1), (size, 1), (size + 1, 2), (100 * size, 9)):
        assert len(texts(Corpus([str(tmp_path)], limit_bytes=limit))) == count


@pytest.mark.parametrize("arguments", [{"held_out": 0.0}, {"held_out": 0.5}, {"limit_bytes": -1}])
def test_wrong_options_are_named(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        Corpus(["stdlib"], **arguments)


def test_compression_baselines() -> None:
    bits = compression_baselines(b"the same line again\n" * 500)
    assert bits.keys() == {"gzip-9", "xz-9"}
    assert all(0 < value < 0.5 for value in bits.values())
    assert compression_baselines(bytes(range(256)))["gzip-9"] > 8
    with pytest.raises(ConfigError, match="must not be empty"):
        compression_baselines(b"")


def test_gcide_is_text_of_an_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = list(Corpus(["gcide"], limit_bytes=30_000).documents())
    assert [d.name for d in documents] == [f"gcide:{n + 1}" for n in range(len(documents))]
    assert all(3000 <= len(document.text) < 6000 for document in documents)
    assert (
        "\nabaft: Behind; toward the stern from; as, abaft the wheelhouse.\n" in documents[5].text
    )

    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(gcide, "distribution", missing)
    with pytest.raises(ConfigError, match=r"gcide: needs: pip install"):
        Corpus(["gcide"])
