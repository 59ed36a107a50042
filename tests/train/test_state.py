"""state.json and the status of a run, also after its process was killed; reading of metrics."""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmythos.config import ConfigError, apply_overrides
from openmythos.train import state
from openmythos.train.config import RunConfig
from openmythos.train.metrics import (
    MetricsLog,
    MetricsTail,
    chosen_metrics,
    read_metrics,
    scalars,
    seconds_left,
    seconds_trained,
    tokens_seen,
)
from openmythos.train.overview import differences, names_of
from openmythos.train.state import SILENCE, RunState, StateFile, read_state


def read(run: Path) -> RunState:
    found = read_state(run)
    assert found is not None
    return found


def test_state_of_a_run_that_goes_on_and_ends(tmp_path: Path) -> None:
    assert read_state(tmp_path) is None
    with StateFile(tmp_path, step=2, num_steps=3) as file:
        running = read(tmp_path)
        assert (running.status(time.time()), running.step, running.pid) == (
            "running",
            2,
            os.getpid(),
        )
        file.stepped(3)
    ended = read(tmp_path)
    assert (ended.state, ended.step, ended.error) == ("finished", 3, "")
    assert ended.stepped >= running.stepped


@pytest.mark.parametrize(
    ("error", "wanted", "text"),
    [
        (GeneratorExit(), "stopped", ""),
        (KeyboardInterrupt(), "stopped", ""),
        (OSError("disk\nfull"), "failed", "OSError: disk"),
        (ValueError(), "failed", "ValueError: "),
    ],
)
def test_how_a_run_ended(tmp_path: Path, error: BaseException, wanted: str, text: str) -> None:
    with pytest.raises(type(error)), StateFile(tmp_path, step=1, num_steps=3):
        raise error
    found = read(tmp_path)
    assert (found.state, found.error, found.step) == (wanted, text, 1)


def test_signs_of_life_come_without_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "BEAT", 0.01)
    with StateFile(tmp_path, step=0, num_steps=3):
        first, deadline = read(tmp_path), time.monotonic() + 5
        while read(tmp_path).alive == first.alive and time.monotonic() < deadline:
            time.sleep(0.01)
        assert read(tmp_path).alive > first.alive
        assert read(tmp_path).stepped == first.stepped


def test_a_folder_that_cannot_be_written_does_not_end_training(tmp_path: Path) -> None:
    with StateFile(tmp_path / "gone", step=0, num_steps=3) as file:
        file.stepped(1)


@pytest.mark.skipif(sys.platform != "linux", reason="looks for the process in /proc")
def test_a_killed_process_is_dead_at_once_and_another_of_its_pid_is_not_it(tmp_path: Path) -> None:
    program = f"""
import time; from pathlib import Path; from openmythos.train.state import StateFile
with StateFile(Path({str(tmp_path)!r}), step=0, num_steps=9): time.sleep(60)"""
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        deadline = time.monotonic() + 30
        while read_state(tmp_path) is None and time.monotonic() < deadline:
            time.sleep(0.02)
        found = read(tmp_path)
        assert found.status(time.time()) == "running"
        process.kill()
        time.sleep(0.2)  # not waited for yet: a zombie
        assert found.status(time.time()) == "dead"
    finally:
        process.kill()
        process.wait()
    assert found.status(time.time()) == "dead"
    assert replace(found, pid=os.getpid()).status(time.time()) == "dead"


def test_from_another_machine_silence_tells(tmp_path: Path) -> None:
    with StateFile(tmp_path, step=0, num_steps=3):
        found = replace(read(tmp_path), place="elsewhere", pid=2**22 + 1)
    assert found.status(found.alive + SILENCE - 1) == "running"
    assert found.status(found.alive + SILENCE + 1) == "dead"
    assert replace(found, state="stopped").status(found.alive + 9999) == "stopped"


def lines(*steps: int) -> str:
    return "".join(json.dumps({"step": step, "loss": step / 2}) + "\n" for step in steps)


@given(cuts=st.lists(st.integers(0, 200), max_size=6))
def test_tail_equals_reading_the_whole_file(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int]
) -> None:
    run = tmp_path_factory.mktemp("tail")
    tail, text = MetricsTail(run), lines(*range(12))
    assert tail.read() == []
    for cut in [*sorted(cuts), len(text)]:
        (run / "metrics.jsonl").write_text(text[:cut])
        found = list(tail.read())
        assert found == [m for m in read_metrics(run) if m["step"] < text[:cut].count("\n")]
    assert found == read_metrics(run)


def test_tail_follows_a_run_that_is_resumed(tmp_path: Path) -> None:
    path, tail = tmp_path / "metrics.jsonl", MetricsTail(tmp_path)
    path.write_text(lines(0, 1, 2, 3))
    assert len(tail.read()) == 4
    MetricsLog(tmp_path, 2)
    assert [m["step"] for m in tail.read()] == [0, 1]
    # Shorter and then longer again between two looks.
    MetricsLog(tmp_path, 1)
    with path.open("a") as file:
        file.write('{"step": 1, "loss": 0.123456789}\n' + lines(*range(2, 9)))
    assert [m["step"] for m in tail.read()] == list(range(9))
    assert tail.read()[1]["loss"] == 0.123456789


@pytest.mark.parametrize("damage", ["3", "[]", '{"loss": 1}', "\0\0", "{"])
def test_a_damaged_line_is_named(tmp_path: Path, damage: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(lines(0) + damage + "\n" + lines(2))
    with pytest.raises(ConfigError, match=r"line 2: is not JSON with a step"):
        read_metrics(tmp_path)


def test_metrics_are_json_whatever_they_are(tmp_path: Path) -> None:
    def no_constants(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    nan, path = math.nan, tmp_path / "metrics.jsonl"
    MetricsLog(tmp_path, 0).write({"step": 0, "loss": nan, "norm": math.inf, "rms": [1.5, nan]})
    for _ in range(2):
        (line,) = path.read_text().splitlines()
        found = json.loads(line, parse_constant=no_constants)
        assert found == {"step": 0, "loss": None, "norm": None, "rms": [1.5, None]}
        (entry,) = read_metrics(tmp_path)
        assert math.isnan(entry["loss"]) and math.isnan(scalars(entry)["rms/2"])
        MetricsLog(tmp_path, 1)  # writes again what it has read


def test_scalars_and_their_choice() -> None:
    entry: dict[str, Any] = {"step": 3, "loss": 2, "norm": [1.5, 2.5], "norms": 1.0}
    assert scalars(entry) == {"loss": 2.0, "norm/1": 1.5, "norm/2": 2.5, "norms": 1.0}
    known = list(scalars(entry))
    assert chosen_metrics(("norm", "loss", "norm/2"), known) == ["norm/1", "norm/2", "loss"]
    with pytest.raises(ConfigError, match=r"'lss': unknown metric, did you mean 'loss'.*norm/1"):
        chosen_metrics(("lss",), known)


def test_what_was_not_logged_is_counted() -> None:
    logged = [{"step": s, "tokens": 8, "tokens_per_second": 4.0} for s in (0, 4, 5)]
    assert tokens_seen(logged) == [8.0, 40.0, 48.0]
    assert seconds_trained(logged) == [2.0, 10.0, 12.0]
    assert seconds_left(logged, num_steps=9) == 2.0 * 3
    assert math.isnan(seconds_left([{"step": 0}], num_steps=9))


def test_differences_are_the_differing_keys_alone() -> None:
    base = RunConfig()
    assert differences([base]) == [{}] and differences([base, base]) == [{}, {}]
    changed = apply_overrides(base, ["train.optimizer.lr=0.5", "train.compile=true"])
    assert differences([base, changed])[1] == {"compile": "true", "lr": "0.5"}
    muon = apply_overrides(base, ["train.optimizer=muon"])
    found = differences([base, muon])
    # What only one of the kinds has is left out, what both have is compared.
    assert found[1]["optimizer"] == "muon" and "betas" not in found[0]
    assert all(first.keys() == second.keys() for first, second in [found])
    tracked = apply_overrides(base, ['train.trackers=["wandb"]'])
    assert differences([base, tracked]) == [{"trackers": "none"}, {"trackers": "wandb"}]


def test_names_are_told_apart(tmp_path: Path) -> None:
    a, b, other = tmp_path / "x" / "run", tmp_path / "y" / "run", tmp_path / "other"
    assert names_of([a, other]) == ["run", "other"]
    assert names_of([a, b, other]) == [str(a), str(b), "other"]
