"""Measure every checkpoint format against its references: results/formats, and docs/models.md.

    python benchmarks/formats.py

Small random checkpoints in each format are written, loaded and run in fp32, and compared with an
independent implementation (or transformers), with numbers of the authors' code, and with cached
decoding. Published weights are not needed, and so not checked.
"""

import json
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "hub")]
from references import CASES, SEQ, TOKENS  # noqa: E402
from test_formats import THEIRS, transformers_model, write  # noqa: E402

from openmythos.files import write_atomically, write_json  # noqa: E402
from openmythos.hub.load import Source, open_source  # noqa: E402
from openmythos.recurrence.initial_state import EncodedState  # noqa: E402

RESULTS = ROOT / "results" / "formats" / "results.json"
PAGE = ROOT / "docs" / "models.md"


def measure(source: Source, expected: Tensor, state: Tensor | None) -> dict[str, Any]:
    """Largest logit differences from the reference and of cached decoding from the full pass."""
    model = source.load()
    given = None if isinstance(source.config.state_init, EncodedState) else state
    whole, cache = model(TOKENS, initial_state=given).logits, model.new_cache(1, SEQ)
    cached = 0.0
    for i in range(SEQ):
        part = None if given is None else given[:, i : i + 1]
        logits = model(TOKENS[:, i : i + 1], cache=cache, initial_state=part).logits
        cached = max(cached, float((logits - whole[:, i : i + 1]).abs().max()))
        cache.advance(1)
    return {
        "format": source.format.name,
        "reference": float((whole - expected).abs().max()),
        "cached": cached,
        "largest_logit": float(expected.abs().max()),
        "writes": source.format.write is not None,
        "logits": whole,
    }


@torch.no_grad()
def rows() -> Iterator[dict[str, Any]]:
    for name, case in CASES.items():
        with TemporaryDirectory() as folder:
            source = open_source(write(Path(folder), case.config, case.weights))
            found = measure(source, case.reference(), case.state())
        golden = None if case.golden is None else case.golden.differences(found.pop("logits"))
        found.pop("logits", None)
        yield {
            "model": name,
            "against": "an independent implementation",
            "authors": golden,
            **found,
        }
    for name in THEIRS:
        torch.manual_seed(0)
        theirs = transformers_model(name)
        with TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            found = measure(open_source(folder), theirs(TOKENS).logits, None)
        found.pop("logits")
        version = f"transformers {transformers.__version__}"
        yield {"model": name, "against": version, "authors": None, **found}


def table(found: list[dict[str, Any]]) -> str:
    """The rows of docs/models.md."""
    lines = [
        "| checkpoint | format | compared with | difference | authors' code | cached | written |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        authors = "-" if row["authors"] is None else f"{row['authors']:.0e}"
        numbers = f"{row['reference']:.0e} | {authors} | {row['cached']:.0e}"
        written = "yes" if row["writes"] else "no"
        named = row["model"].replace("_", " ")
        lines.append(f"| {named} | `{row['format']}` | {row['against']} | {numbers} | {written} |")
    return "\n".join(lines)


def main() -> None:
    found = list(rows())
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    host = {"machine": platform.machine(), "torch": torch.__version__, "dtype": "fp32"}
    write_json({"host": host, "rows": found}, RESULTS)
    begin, end = "<!-- formats: by benchmarks/formats.py -->", "<!-- end of formats -->"
    page = PAGE.read_text()
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    content = f"{begin}\n{table(found)}\n{end}"
    write_atomically(PAGE, pattern.sub(lambda _: content, page))
    print(json.dumps(found, indent=2))
    assert all(row["reference"] <= 1e-4 and row["cached"] <= 1e-4 for row in found)


if __name__ == "__main__":
    main()
