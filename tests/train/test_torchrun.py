"""The command under torchrun: two processes train one run, and one goes on with it."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from openmythos.train.checkpoint import list_checkpoints
from openmythos.train.metrics import read_metrics
from openmythos.train.run import Run

pytestmark = pytest.mark.distributed

SETTINGS = [
    *("train.num_steps=6", "train.save_every=2", "train.batch_size=4", "train.seq_len=32"),
    *("model.context=32", "train.device=cpu"),
]


def openmythos(folder: Path, ranks: int, *argv: str) -> "subprocess.CompletedProcess[str]":
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.run(
        [sys.executable, *(torchrun if ranks > 1 else ()), "-m", "openmythos", *argv],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def here(tmp_path: Path) -> Path:
    text = "\n".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(300))
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "more.txt").write_text(text[::2])
    return tmp_path


def losses(run: Path) -> list[Any]:
    return [metrics["loss"] for metrics in read_metrics(run)]


def test_two_ranks_train_a_run_that_one_goes_on_with(here: Path) -> None:
    new = ["train", "--recipe", "tiny", "--data", "text.txt", "--data", "more.txt"]
    alone = openmythos(here, 1, *new, "--out", "alone", "--set", *SETTINGS)
    assert alone.returncode == 0, alone.stderr
    shorter = [*SETTINGS, "train.num_steps=3"]
    both = openmythos(here, 2, *new, "--out", "both", "--set", *shorter)
    assert both.returncode == 0, both.stderr
    assert len(re.findall("training tokens|Next:", both.stdout)) == 1, "one rank speaks"
    assert [path.name for path in list_checkpoints(here / "both")] == [
        "step-00000002",
        "step-00000003",
    ]
    Run.open(here / "both").load_model()
    more = ["train", "--resume", "both", "--set", "train.num_steps=6"]
    assert openmythos(here, 1, *more).returncode == 0
    # Schedules that end at step 3 and at step 6 differ: only what precedes is compared here.
    assert losses(here / "both")[0] == pytest.approx(losses(here / "alone")[0], rel=1e-5)
    assert len(losses(here / "both")) == 6


def test_ranks_without_a_common_folder_are_refused(here: Path) -> None:
    refused = openmythos(here, 2, "train", "--recipe", "tiny", "--data", "text.txt")
    assert refused.returncode != 0
    assert "out = '': must be given to several ranks" in refused.stderr
