"""A prepared folder depends on corpus and settings alone, not on processes and interruptions."""

import gzip
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from openmythos.config import ConfigError
from openmythos.data import prepare as prepare_module
from openmythos.data.corpus import Corpus
from openmythos.data.prepare import Progress, prepare
from openmythos.data.prepared import Preparation, References, is_prepared, open_prepared
from openmythos.data.shards import write_shards
from openmythos.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer

BPE = BPETokenizer.train(["loop state halt " * 9], 280)
SIDES = ("train", "held_out")


def text_of(number: int) -> str:
    return f"{number}: " + "loop state halt\n" * (3 + number % 4)


def write_corpus(folder: Path) -> Path:
    """Small files, a large file of rows, a compressed one, and one that is not text."""
    (folder / "more").mkdir(parents=True)
    for number in range(12):
        (folder / f"{number:02d}.txt").write_text(text_of(number))
    rows = [json.dumps({"text": text_of(number)}) + "\n" for number in range(20)]
    (folder / "a.jsonl").write_text("".join(rows))
    (folder / "more" / "b.jsonl.gz").write_bytes(gzip.compress("".join(rows).encode(), mtime=0))
    (folder / "more" / "empty.txt").write_text("")
    (folder / "binary.dat").write_bytes(bytes(range(256)))
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A folder made without interruption."""
    folder = tmp_path_factory.mktemp("made") / "straight"
    prepare(wanted(corpus), ByteTokenizer(), folder)
    return folder


def wanted(corpus: Path, **changes: Any) -> Preparation:
    usual: dict[str, Any] = {"paths": (str(corpus),), "held_out": 0.2, "part_bytes": 150}
    return Preparation(**(usual | changes))


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def stop_after(parts: int) -> Callable[[Progress], None]:
    calls: list[Progress] = []

    def report(now: Progress) -> None:
        calls.append(now)
        if len(calls) == parts:
            raise KeyboardInterrupt

    return report


@pytest.mark.parametrize("changes", [{}, {"limit_bytes": 900}, {"part_bytes": 1 << 20}])
@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])
def test_tokens_are_those_of_the_corpus_in_one_piece(
    tmp_path: Path, corpus: Path, changes: dict[str, int], tokenizer: Tokenizer
) -> None:
    """Twin test: `prepare` against `write_shards`."""
    preparation = wanted(corpus, **changes)
    prepared = prepare(preparation, tokenizer, tmp_path / "made")
    plain = Corpus(preparation.paths, held_out=0.2, limit_bytes=preparation.limit_bytes)
    for side, documents in zip(SIDES, (plain.train(), plain.held_out()), strict=True):
        expected = write_shards(documents, tokenizer, tmp_path / side)
        found = open_prepared(tmp_path / "made", side, verify=True)
        assert found.read(0, len(found)).tolist() == expected.read(0, len(expected)).tolist()
        assert found.document_starts.tolist() == expected.document_starts.tolist()
        assert found.num_bytes == expected.num_bytes
        assert len(found) == sum(getattr(part, side) for part in prepared.parts)
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [
        *("held_out", "prepared.json", "tokenizer.json", "train"),
    ]
    assert "limit_bytes" in changes or sum(part.skipped for part in prepared.parts) == 1


def test_a_single_document_is_held_out_by_its_end(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("It was a dark and stormy night.\n" * 50)
    prepare(wanted(tmp_path / "book.txt"), ByteTokenizer(), tmp_path / "made")
    train, held_out = (open_prepared(tmp_path / "made", s, verify=True) for s in SIDES)
    assert train.num_bytes + held_out.num_bytes == 1600


@pytest.mark.parametrize("part_bytes", [150, 1 << 20])
def test_bad_rows_are_left_out_of_cut_and_whole_files(tmp_path: Path, part_bytes: int) -> None:
    rows = [json.dumps({"text": text_of(number)}) + "\n" for number in range(20)]
    for name, number in (("good", 0), ("bad", 3)):
        (tmp_path / name).mkdir()
        text = "".join(rows[:9]) + number * '{"text": null}\n' + "".join(rows[9:])
        (tmp_path / name / "a.jsonl").write_text(text)
    made = {"part_bytes": part_bytes, "held_out": 0.2}
    with pytest.raises(ConfigError, match="line 10: field 'text' is null"):
        prepare(wanted(tmp_path / "bad", **made), ByteTokenizer(), tmp_path / "none")
    prepare(wanted(tmp_path / "bad", **made, skip_bad_rows=True), ByteTokenizer(), tmp_path / "x")
    found = [open_prepared(tmp_path / "x", side, verify=True) for side in SIDES]
    assert sum(shards.num_bytes for shards in found) == sum(len(text_of(n)) for n in range(20))


def test_processes_make_the_same_folder(tmp_path: Path, corpus: Path) -> None:
    seen: list[Progress] = []
    prepare(wanted(corpus, part_bytes=500), BPE, tmp_path / "one")
    prepare(
        wanted(corpus, part_bytes=500), BPE, tmp_path / "two", processes=2, on_progress=seen.append
    )
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert len(seen) > 5
    assert [now.done for now in seen] == sorted(now.done for now in seen)


@pytest.mark.parametrize("stops", [[1], [3, 2], [5, 1, 9], [12]])
def test_interruptions_leave_no_trace(
    tmp_path: Path, corpus: Path, straight: Path, stops: list[int]
) -> None:
    out = tmp_path
    for parts in stops:
        with pytest.raises(KeyboardInterrupt):
            prepare(wanted(corpus), ByteTokenizer(), out / "made", on_progress=stop_after(parts))
        with pytest.raises(ConfigError, match="is not finished"):
            is_prepared(out / "made")
    prepare(wanted(corpus), ByteTokenizer(), out / "made")
    assert content(out / "made") == content(straight)


def test_finished_parts_are_not_made_again(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare(wanted(corpus), ByteTokenizer(), tmp_path / "made", on_progress=stop_after(5))
    seen: list[Progress] = []
    prepared = prepare(wanted(corpus), ByteTokenizer(), tmp_path / "made", on_progress=seen.append)
    assert len(seen) == len(prepared.parts) > 8
    assert [now.text for now in seen[:5]] == [0] * 5
    assert seen[4].kept == seen[4].done == seen[-1].kept
    again: list[Progress] = []
    assert (
        prepare(wanted(corpus), ByteTokenizer(), tmp_path / "made", on_progress=again.append)
        == prepared
    )
    assert again == []


@pytest.mark.parametrize("fail_at", [1, 2, 9, 17, 21])
def test_interrupted_while_files_move(
    tmp_path: Path, corpus: Path, straight: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int
) -> None:
    original, calls = prepare_module._move, []

    def move(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == fail_at:
            raise KeyboardInterrupt
        original(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_module, "_move", move)
        prepare(wanted(corpus), ByteTokenizer(), tmp_path / "made")
    prepare(wanted(corpus), ByteTokenizer(), tmp_path / "made")
    assert content(tmp_path / "made") == content(straight)


def test_a_damaged_part_is_made_again(
    tmp_path: Path, corpus: Path, straight: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare(wanted(corpus), ByteTokenizer(), tmp_path / "made", on_progress=stop_after(5))
    path = tmp_path / "made" / "unfinished" / "part-00002" / "train" / "tokens-00000.bin"
    flip(path)
    prepare(wanted(corpus), ByteTokenizer(), tmp_path / "made")
    assert f"{path}: is damaged" in caplog.text
    assert content(tmp_path / "made") == content(straight)


@pytest.mark.parametrize("finished", [False, True])
def test_changes_are_refused(tmp_path: Path, finished: bool) -> None:
    corpus = write_corpus(tmp_path / "text")
    out = tmp_path / "made"
    seen = (lambda _now: None) if finished else stop_after(5)
    try:
        prepare(wanted(corpus), ByteTokenizer(), out, on_progress=seen)
    except KeyboardInterrupt:
        assert not finished
    before = content(out)

    def refuse(message: str, tokenizer: Tokenizer = ByteTokenizer(), **changes: Any) -> None:  # noqa: B008
        with pytest.raises(ConfigError, match=message):
            prepare(wanted(corpus, **changes), tokenizer, out)
        assert content(out) == before

    refuse("was begun with held_out = 0.2, not 0.1; choose another --out", held_out=0.1)
    refuse("was begun with part_bytes = 150, not 99", part_bytes=99)
    refuse("was begun with paths", paths=(str(corpus), "stdlib"))
    refuse("was begun with another tokenizer", BPE)
    path = corpus / "03.txt"
    time, text = path.stat().st_mtime_ns, path.read_text()
    path.write_text(text.upper())
    os.utime(path, ns=(time + 10**9, time + 10**9))
    refuse("files changed since .*made was begun")
    path.write_text(text)
    os.utime(path, ns=(time, time))
    (corpus / "new.txt").write_text("new")
    refuse("files changed since .*made was begun")
    (corpus / "new.txt").unlink()
    prepare(wanted(corpus), ByteTokenizer(), out)


def test_a_stream_that_changed_is_refused(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare(
            wanted(corpus, limit_bytes=900), ByteTokenizer(), tmp_path, on_progress=stop_after(3)
        )
    # A change that file sizes and times do not show, as in a remote data set.
    original = prepare_module.cut_into_parts

    def changed(*arguments: Any) -> Any:
        for part in original(*arguments):
            first = replace(part.documents[0], text=part.documents[0].text + "!")
            yield replace(part, documents=(first, *part.documents[1:]))

    monkeypatch.setattr(prepare_module, "cut_into_parts", changed)
    with pytest.raises(ConfigError, match=r"the text has changed since .*part-00000 was made"):
        prepare(wanted(corpus, limit_bytes=900), ByteTokenizer(), tmp_path)


def test_two_at_a_time_are_refused(tmp_path: Path, corpus: Path) -> None:
    wanted, out = Preparation(paths=(str(corpus),)), tmp_path / "made"
    refusals: list[str] = []

    def meanwhile(_progress: Progress) -> None:
        with pytest.raises(ConfigError) as error:
            prepare(wanted, BPE, out)
        refusals.append(str(error.value))

    prepare(wanted, BPE, out, on_progress=meanwhile)
    assert set(refusals) == {f"{out}: another process is preparing it at this moment"}
    assert not (out / "unfinished").exists() and is_prepared(out)


def test_foreign_folders_are_left_alone(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(ConfigError, match="exists already and is not an unfinished"):
        prepare(wanted(corpus), ByteTokenizer(), tmp_path)
    assert content(tmp_path) == {"mine": b""}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)


FILES = ["train/tokens-00001.bin", "held_out/tokens-00000.bin", "train/documents.bin"]


@pytest.mark.parametrize("damage", [flip, Path.unlink])
@pytest.mark.parametrize("name", [*FILES, "train/index.json", "prepared.json", "tokenizer.json"])
def test_damage_is_named(
    tmp_path: Path, straight: Path, name: str, damage: Callable[[Path], object]
) -> None:
    folder = tmp_path / "made"
    shutil.copytree(straight, folder)
    references = References.of([str(folder)])
    assert references is not None
    for side in SIDES:
        references.shards(side, verify=True)
    damage(folder / name)
    with pytest.raises(ConfigError) as caught:
        for side in SIDES:
            references.shards(side, verify=True)
    assert str(folder if name == "prepared.json" else folder / name) in str(caught.value)


def test_references_keep_to_what_they_saw(tmp_path: Path, straight: Path, corpus: Path) -> None:
    assert References.of([str(corpus)]) is None
    with pytest.raises(ConfigError, match=r"text: is not a prepared folder, but .*straight is"):
        References.of([str(straight), str(corpus)])
    prepare(wanted(corpus), BPE, tmp_path / "bpe")
    with pytest.raises(
        ConfigError, match=r"bpe: was prepared with another tokenizer than .*straight"
    ):
        References.of([str(straight), str(tmp_path / "bpe")])
    references = References.of([str(tmp_path / "bpe")])
    assert references is not None
    references.save(tmp_path / "run")
    assert References.load(tmp_path / "run") == references
    shutil.rmtree(tmp_path / "bpe")
    with pytest.raises(ConfigError, match="the prepared folder that this run reads is missing"):
        references.shards("train", verify=False)
    prepare(wanted(corpus, held_out=0.1), BPE, tmp_path / "bpe")
    with pytest.raises(ConfigError, match="bpe: was prepared again since this run was created"):
        references.shards("train", verify=False)
