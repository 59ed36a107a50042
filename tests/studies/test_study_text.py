"""The text of studies: what is trained on, chosen by, and reported are different documents."""

from dataclasses import replace
from pathlib import Path

import pytest

from openmythos.data.shards import TokenShards
from openmythos.data.tokenizer import Bytes
from openmythos.studies.text import PARTS, corpus, long_training, needs_its_loops, on_two_corpora
from openmythos.train.config import TextData


def documents(shards: TokenShards) -> list[bytes]:
    """The text of every document; its first token marks the start."""
    ends = [*shards.document_starts[1:], len(shards)]
    return [
        bytes(shards.read(int(start) + 1, int(end)).tolist())
        for start, end in zip(shards.document_starts, ends, strict=True)
    ]


def test_parts_share_no_document_and_are_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(60):
        (texts / f"{number}.txt").write_text(f"document {number}\n")
    run = on_two_corpora(needs_its_loops(), long_training())
    run = replace(run, data=TextData(paths=(str(texts),), held_out=0.2), tokenizer=Bytes())
    found = {part: documents(shards) for part, shards in corpus(run, tmp_path).items()}
    assert tuple(found) == PARTS
    every = [text for part in PARTS for text in found[part]]
    assert sorted(every) == sorted(path.read_bytes() for path in texts.iterdir())
    assert len(found["held_out"]) == pytest.approx(2 * len(found["validation"]), abs=2)
    monkeypatch.setattr("openmythos.studies.text.write_shards", None)  # nothing is written again
    assert corpus(run, tmp_path).keys() == found.keys()
    other = replace(run, data=replace(run.data, limit_mb=1e-4))
    with pytest.raises(TypeError, match="not callable"):
        corpus(other, tmp_path)
