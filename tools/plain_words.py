"""Find words of our own for things that have a name: `python tools/plain_words.py`.

Part of `make lint`. The names of docs/architecture.md, and the terms that the field uses.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SEARCHED = (
    "src",
    "tests",
    "benchmarks",
    "examples",
    "docs",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
)
# Pattern (case does not matter): what to write instead.
BANNED = {
    r"\bin shards\b": "sharded",
    r"\bh[eo]ld\w* ([\w-]+ ){0,4}between them\b": "are sharded over; expert parallelism",
    r"\brecomput(ed|es?|ing) loops\b": "activation checkpointing",
    r"\bholes\b": "fragmentation, padding",
    r"\bforet(ell|old)\w*": "estimate",
    r"\b(weights?|gradients?|tokens?|rows?|they|that|which) travel(s|led)?\b": (
        "are gathered, reduced, dispatched"
    ),
    r"\bin vain\b": "timed out",
    r"\btold\s*[=:(,)]": "on_progress, report",
    r"\bhears? (lines?|of|what)\b": "is called with",
    r"\bwhat others have\b": "say what: padding, the longest row",
    r"\bfilled up\b": "padded",
    r"\bis no (folder|file|text|number|regular file)\b": "is not a",
    r"\bsave (that|where)\b": "except, unless",
    r"\blest\b": "so that not",
    r"\bwithout a word\b": "silently",
    r"\bdea(ls?|lt) out\b": "assign",
    r"\bas it comes\b": "unchanged",
    r"\bborn\b": "start_time",
    r"\bn_loops\b": "num_loops",
    r"\bmean_recurrence\b": "mean_loops",
    r"\bkv_lora_rank\b": "kv_latent_dim",
    r"\bloop-index rope\b": "loop embedding",
}
# Files that quote the names of other projects.
QUOTES = {
    "benchmarks/peers.py",
    "examples/load_public_model.py",
    "src/openmythos/hub/huginn.py",
    "tests/hub/references.py",
    "tests/model/test_mythos.py",
    "tests/nn/test_parity.py",
    "tests/test_plain_words.py",
}
# Files still to be mended: this list only gets shorter.
UNMENDED: set[str] = set()

# A phrase may be broken by the end of a line, also of a comment.
PATTERNS = {
    re.compile(pattern.replace(" ", r"[\s#]+"), re.IGNORECASE): better
    for pattern, better in BANNED.items()
}
ANY = re.compile("|".join(pattern.pattern for pattern in PATTERNS), re.IGNORECASE)


def hits(path: Path) -> Iterator[str]:
    """A message for each banned phrase of a file."""
    text = path.read_text(encoding="utf-8")
    if not ANY.search(text):
        return
    for pattern, better in PATTERNS.items():
        for found in pattern.finditer(text):
            line = text.count("\n", 0, found.start()) + 1
            yield f"{path.relative_to(ROOT)}:{line}: {found[0]!r}: write {better}"


def files() -> list[Path]:
    """All Python and Markdown files that are searched."""
    paths = [ROOT / name for name in SEARCHED]
    below = [p for path in paths for p in sorted(path.rglob("*")) if path.is_dir()]
    return [p for p in [*below, *paths] if p.is_file() and p.suffix in (".py", ".md")]


def check() -> tuple[list[str], list[str]]:
    """The hits outside the exceptions, and the files that need no exception any more."""
    found: list[str] = []
    mended: list[str] = []
    for path in files():
        name, here = path.relative_to(ROOT).as_posix(), list(hits(path))
        if name in UNMENDED and not here:
            mended.append(name)
        elif name not in UNMENDED | QUOTES:
            found += here
    return found, mended


if __name__ == "__main__":
    found, mended = check()
    for line in found:
        print(line)
    for name in mended:
        print(f"note: {name} is plain now: remove it from UNMENDED in tools/plain_words.py")
    sys.exit(bool(found))
