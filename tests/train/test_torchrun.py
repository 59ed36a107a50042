"""The command under torchrun: two processes train one run, and one goes on with it."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from openmythos.cli import main
from openmythos.train.checkpoint import list_checkpoints
from openmythos.train.metrics import read_metrics
from openmythos.train.run import Run

pytestmark = pytest.mark.distributed

SETTINGS = [
    *("train.num_steps=6", "train.save_every=2", "train.batch_size=4", "train.seq_len=32"),
    *("model.context=32", "train.device=cpu"),
]


def two_ranks(*argv: str) -> "subprocess.CompletedProcess[str]":
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [sys.executable, *torchrun, "-m", "openmythos", *argv],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    text = "\n".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(300))
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "more.txt").write_text(text[::2])
    return tmp_path


def losses(run: Path) -> list[Any]:
    return [metrics["loss"] for metrics in read_metrics(run)]


def test_two_ranks_train_a_run_that_one_goes_on_with(here: Path) -> None:
    new = ["train", "--recipe", "tiny", "--data", "text.txt", "--data", "more.txt"]
    assert main([*new, "--out", "alone", "--set", *SETTINGS]) == 0
    both = two_ranks(*new, "--out", "both", "--set", *SETTINGS, "train.num_steps=3")
    assert both.returncode == 0, both.stderr
    assert len(re.findall("held-out tokens", both.stdout)) == 1, "one rank speaks"
    saved = [path.name for path in list_checkpoints(here / "both")]
    assert saved == ["step-00000002", "step-00000003"]
    Run.open(here / "both").load_model()
    assert main(["train", "--resume", "both", "--set", "train.num_steps=6"]) == 0
    # Schedules that end at step 3 and at step 6 differ: only what precedes is compared here.
    assert losses(here / "both")[0] == pytest.approx(losses(here / "alone")[0], rel=1e-5)
    assert len(losses(here / "both")) == 6


def test_ranks_without_a_common_folder_are_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "--recipe", "tiny", "--data", "text.txt"]) == 2
    assert "out = '': must be given to several ranks" in capsys.readouterr().err
