"""tools/plain_words.py finds banned phrases, and no file has one."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import plain_words


@pytest.mark.parametrize(
    ("text", "better"),
    [
        ("weights in shards", "sharded"),
        ("experts that ranks hold between them", "expert parallelism"),
        ("Recomputed loops are off", "activation checkpointing"),
        ("gradients travel last", "reduced"),
        ("def f(told: int) -> None:", "on_progress"),
        ("model(tokens, n_loops=4)", "num_loops"),
    ],
)
def test_a_banned_phrase_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, better: str
) -> None:
    monkeypatch.setattr(plain_words, "ROOT", tmp_path)
    path = tmp_path / "page.md"
    path.write_text(f"A plain line.\n{text}\n")
    (message,) = plain_words.hits(path)
    assert message.startswith("page.md:2: ") and better in message


def test_an_exception_that_is_not_needed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_words, "UNMENDED", {"README.md"})
    assert plain_words.check()[1] == ["README.md"]


def test_all_files_are_plain() -> None:
    assert plain_words.check()[0] == []
