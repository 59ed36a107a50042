"""`openmythos train` under torchrun: two processes train a run, and one resumes it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

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


NEW = ["train", "--recipe", "tiny", "--data", "text.txt", "--data", "more.txt"]
LONG = [*SETTINGS, "train.num_steps=60", "train.save_every=10"]


def command(*argv: str, restarts: int = 0) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return [sys.executable, *torchrun, f"--max-restarts={restarts}", "-m", "openmythos", *argv]


def two_ranks(*argv: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command(*argv),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


class Ended(NamedTuple):
    """How torchrun ended: exit code, output, seconds since the signal."""

    code: int
    said: str
    seconds: float


def signalled(run: Path, number: signal.Signals, *argv: str, restarts: int = 0) -> Ended:
    """How torchrun ends if one of its ranks gets a signal after the first checkpoint."""
    torchrun = subprocess.Popen(
        command(*argv, restarts=restarts),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not list_checkpoints(run) and time.monotonic() < deadline:
            time.sleep(0.02)
        children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
        ranks = {
            pid: dict(
                entry.partition("=")[::2]
                for entry in Path(f"/proc/{pid}/environ").read_text().split("\0")
            ).get("RANK")
            for pid in children
        }
        os.kill(int(next(pid for pid, rank in ranks.items() if rank == "1")), number)
        sent = time.monotonic()
        said = torchrun.communicate(timeout=150)[1]
        return Ended(torchrun.returncode, said, time.monotonic() - sent)
    finally:
        torchrun.kill()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    text = "\n".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(300))
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "more.txt").write_text(text[::2])
    return tmp_path


def losses(run: Path) -> list[Any]:
    return [metrics["loss"] for metrics in read_metrics(run)]


@pytest.mark.slow
def test_two_ranks_train_a_run_that_one_goes_on_with(here: Path) -> None:
    assert main([*NEW, "--out", "alone", "--set", *SETTINGS]) == 0
    both = two_ranks(*NEW, "--out", "both", "--set", *SETTINGS, "train.num_steps=3")
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
    assert "out = '': must be given when training on several ranks" in capsys.readouterr().err


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_and_a_kill_is_restarted_both_exactly(here: Path) -> None:
    straight = two_ranks(*NEW, "--out", "straight", "--set", *LONG)
    assert straight.returncode == 0, straight.stderr
    stopped = [*NEW, "--out", "stopped", "--set", *LONG]
    assert signalled(here / "stopped", signal.SIGTERM, *stopped).code == 0
    done = len(losses(here / "stopped"))
    assert 10 <= done < 60
    assert list_checkpoints(here / "stopped")[-1].name == f"step-{done:08d}"
    more = two_ranks("train", "--resume", "stopped")
    assert more.returncode == 0, more.stderr
    killed = [*NEW, "--out", "killed", "--set", *LONG]
    ended = signalled(here / "killed", signal.SIGKILL, *killed, restarts=1)
    assert ended.code == 0, ended.said
    for run in ("stopped", "killed"):
        assert losses(here / run) == losses(here / "straight")


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_job_at_once_and_is_named(here: Path) -> None:
    argv = [*NEW, "--out", "dead", "--set", *LONG, "train.num_steps=100000"]
    ended = signalled(here / "dead", signal.SIGKILL, *argv)
    assert ended.code != 0 and ended.seconds < 60
    assert re.search(r"rank\s*:\s*1\b", ended.said)
    assert "Signal 9 (SIGKILL)" in ended.said


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_job_too(here: Path) -> None:
    argv = [*NEW, "--out", "stuck", "--set", *LONG, "train.num_steps=100000"]
    ended = signalled(here / "stuck", signal.SIGSTOP, *argv)
    # The other rank times out; then torchrun kills the one that hangs after 30 s.
    assert ended.code != 0 and ended.seconds < 120
    assert "rank 0: timed out after 50 s in a collective" in ended.said
    assert list_checkpoints(here / "stuck")
