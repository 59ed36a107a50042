"""The losses of the tiny recipe as they were recorded; `make golden` records new ones."""

import json
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest

from openmythos.recipes import catalogue
from openmythos.train.config import TextData
from openmythos.train.run import Run, train

GOLDEN = Path(__file__).with_name("golden_tiny.json")


def write_corpus(folder: Path) -> None:
    """Text that no Python version changes: Random.random is fixed, unlike the standard library."""
    rng = random.Random(0)
    words = ("def", "return", "self", "loop", "state", "class", "if", "not", "None", "decay")
    folder.mkdir()
    for number in range(10):
        lines = [
            "    " * int(3 * rng.random())
            + " ".join(words[int(len(words) * rng.random())] for _ in range(6))
            for _ in range(40)
        ]
        (folder / f"{number}.txt").write_text("\n".join(lines))


def test_golden_losses_of_the_tiny_recipe(tmp_path: Path) -> None:
    write_corpus(tmp_path / "text")
    config = catalogue.get("tiny")
    data = TextData(paths=(str(tmp_path / "text"),))
    config = replace(config, data=data, train=replace(config.train, device="cpu", precision="fp32"))
    losses = [metrics.loss for metrics in train(Run.create(tmp_path / "run", config))]
    if os.environ.get("UPDATE_GOLDEN"):
        rounded = [round(loss, 6) for loss in losses]
        GOLDEN.write_text(json.dumps({"losses": rounded}, indent=2) + "\n")
    wanted = json.loads(GOLDEN.read_text())["losses"]
    assert len(losses) == 20
    assert losses == pytest.approx(wanted, rel=1e-3)
    assert losses[-1] < 0.8 * losses[0]
