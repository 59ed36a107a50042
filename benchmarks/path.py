"""Count the functions and files of ours that a training step, a prefill and a decoded token pass.

    python benchmarks/path.py

This is what one has to read to follow a call of the model (preset tiny, all its mechanisms).
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch

import openmythos
from openmythos import OpenMythos, presets
from openmythos.inference.contrast import NoContrast
from openmythos.recurrence.exit_rules import FixedExit

PACKAGE = str(Path(openmythos.__file__).parent)


def passed(call: Callable[[], object]) -> tuple[int, int]:
    """How many (functions, files) of the package a call enters, each counted once."""
    seen: set[tuple[str, str]] = set()

    def note(frame: object, event: str, _: object) -> None:
        code = frame.f_code  # type: ignore[attr-defined]
        named = not code.co_name.startswith("<")  # no lambdas, no comprehensions
        if event == "call" and named and code.co_filename.startswith(PACKAGE):
            seen.add((code.co_filename, code.co_qualname))

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    if "-v" in sys.argv:
        for file, name in sorted(seen):
            print("   ", file.removeprefix(PACKAGE), name)
    return len(seen), len({file for file, _ in seen})


def counted() -> dict[str, tuple[int, int]]:
    """(functions, files) of a training step, a prefill and a decoded token."""
    model = OpenMythos(presets.tiny(), seed=0)
    tokens = torch.arange(16)[None]

    def train() -> None:
        model.train().losses(tokens, tokens, num_loops=torch.tensor([3])).cross_entropy.backward()

    @torch.no_grad()
    def forward(tokens: torch.Tensor) -> None:
        model.eval().next_logits(
            tokens,
            num_loops=4,
            exit_rule=FixedExit(),
            attention_mask=None,
            cache=cache,
            contrast=NoContrast(),
        )

    cache = model.new_cache(1, 64)
    forward(tokens)  # loads the native kernel, and builds it if need be
    cache = model.new_cache(1, 64)
    prefill = passed(lambda: forward(tokens))
    cache.begin_decode()
    forward(tokens[:, :1])  # makes the native layers
    token = passed(lambda: forward(tokens[:, :1]))
    return {
        "training step (losses and backward)": passed(train),
        "prefill": prefill,
        "decoded token": token,
    }


def main() -> None:
    for name, (functions, files) in counted().items():
        print(f"{name:36} {functions:4} functions in {files:3} files")


if __name__ == "__main__":
    main()
