"""openmythos runs, plot and watch, on fake run folders and on real runs."""

import csv
import functools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from matplotlib.image import imread

from openmythos import cli
from openmythos.analysis import plots
from openmythos.cli import jobs, screen, tracking
from openmythos.cli.progress import duration
from openmythos.cli.watch import loss_so_far
from openmythos.config import apply_overrides, to_dict
from openmythos.files import write_json
from openmythos.planning import cost
from openmythos.recipes import catalogue
from openmythos.train.folder import read_config
from openmythos.train.run import Run
from openmythos.train.state import StateFile, read_state

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(list(argv))
        return code, *capsys.readouterr()

    return run


@functools.lru_cache
def config_of(overrides: tuple[str, ...]) -> str:
    return tomli_w.dumps(to_dict(apply_overrides(catalogue.get("tiny"), overrides)))


def make(folder: Path, steps: int, *, of: int = 10, state: str = "", **changes: Any) -> Path:
    """A run folder as the trainer would have left it, without tokens and weights."""
    folder.mkdir(parents=True)
    overrides = (f"train.num_steps={of}", *(f"{k}={v}" for k, v in changes.items()))
    (folder / "config.toml").write_text(config_of(overrides))
    (folder / "tokenizer.json").write_text("{}")
    lines = [
        {
            "step": step,
            "loss": 5.0 - step / 10,
            "gradient_norm": 1.0,
            "norm": [1.0, 2.0 + step],
            "tokens": 256,
            "tokens_per_second": 100.0 if step else 1.0,
        }
        for step in range(steps)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if state:
        with StateFile(folder, step=steps, num_steps=of):
            running = read_state(folder)
        assert running is not None
        if state == "dead":
            running = replace(running, place="elsewhere", alive=running.alive - 3600)
        else:
            running = replace(running, state=state)
        write_json(asdict(running), folder / "state.json")
    return folder


def listed(call: Call, *argv: str) -> dict[str, Any]:
    code, out, err = call("runs", "--json", *argv)
    assert code == 0, err
    return {Path(entry["folder"]).name: entry for entry in json.loads(out)}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(screen.OUT, "_width", 100)
    return tmp_path


def test_runs_lists_what_is_a_run(here: Path, call: Call) -> None:
    make(here / "runs" / "done", 10, state="finished")
    make(here / "runs" / "deep" / "er" / "half", 4, state="stopped")
    make(here / "runs" / "killed", 3, state="dead")
    make(here / "runs" / "on", 2, state="running")
    make(here / "runs" / "old", 10)
    make(here / "runs" / "older", 5)
    (make(here / "runs" / "fresh", 0) / "metrics.jsonl").unlink()
    (here / "runs" / "notes").mkdir()
    (here / "runs" / "notes" / "config.toml").write_text("a = 1\n")
    make(here / "runs" / ".hidden.tmp", 1)
    found = listed(call)
    states = {name: entry["state"] for name, entry in found.items()}
    assert states == {
        "done": "finished",
        "half": "stopped",
        "killed": "dead",
        "on": "running",
        "old": "finished",
        "older": "unknown",
        "fresh": "new",
    }
    assert next(iter(found)) == "on"
    done = found["done"]
    assert (done["step"], done["num_steps"], done["loss"]) == (10, 10, pytest.approx(4.1))
    assert done["tokens_per_second"] == 100.0  # the median, not the slow first step
    assert done["parameters"] == cost.parameters(catalogue.get("tiny").model).total
    assert 0 <= done["age"] < 60 and done["bits_per_byte"] is None
    assert found["fresh"]["age"] is None and found["fresh"]["step"] == 0
    assert set(listed(call, "runs/deep", "runs/done")) == {"half", "done"}
    code, out, _ = call("runs")
    assert code == 0 and "runs/deep/er/half" in out and "stopped" in out and "4/10" in out


def test_the_best_held_out_value_is_shown(here: Path, call: Call) -> None:
    rows = [{"num_loops": n, "bits_per_byte": b} for n, b in ((1, 3.0), (4, 2.5), (8, 2.75))]
    write_json({"held_out": rows}, make(here / "runs" / "a", 3) / "eval.json")
    found = listed(call)["a"]
    assert (found["bits_per_byte"], found["loops"]) == (2.5, 4)
    assert "2.5000 @4" in call("runs")[1]


DAMAGES: dict[str, tuple[str, str]] = {
    "metrics": ("metrics.jsonl", 'nonsense\n{"step": 1}\n'),
    "state": ("state.json", "{"),
    "config": ("config.toml", "model = 3\n"),
    "evaluation": ("eval.json", '{"held_out": []}'),
}


@pytest.mark.parametrize(("file", "text"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_file_takes_no_other_run_down(
    here: Path, call: Call, file: str, text: str
) -> None:
    make(here / "runs" / "good", 3, state="stopped")
    bad = make(here / "runs" / "bad", 3, state="stopped")
    (bad / file).write_text(text)
    found = listed(call)
    assert (found["good"]["error"], found["good"]["loss"]) == ("", pytest.approx(4.8))
    assert "runs/bad" in found["bad"]["error"]


def test_no_runs_and_no_folder(here: Path, call: Call) -> None:
    assert call("runs") == (0, "no runs yet: `openmythos train` makes runs/demo-1\n", "")
    assert json.loads(call("runs", "--json")[1]) == []
    assert call("runs", "runs") == (2, "", "error: folder = 'runs': is not a folder\n")
    (here / "runs").mkdir()
    assert call("runs") == (0, "no run in runs\n", "")
    assert json.loads(call("runs", "--json")[1]) == []


def test_linked_runs_are_found_once(here: Path, call: Call) -> None:
    make(here / "disk" / "a", 3)
    make(here / "runs" / "b", 3)
    (here / "runs" / "link").symlink_to(here / "disk" / "a")
    (here / "runs" / "again").symlink_to(here / "disk")
    (here / "runs" / "loop").symlink_to(here / "runs")
    assert sorted(listed(call)) == ["a", "b"]


@pytest.mark.parametrize("width", [20, 40])
def test_runs_on_a_narrow_terminal(
    here: Path, call: Call, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    make(here / "runs" / "a-run-with-a-long-name", 4, state="stopped")
    monkeypatch.setattr(screen.OUT, "_width", width)
    out = call("runs")[1].splitlines()
    assert out[0] == "runs/a-run-with-a-long-name"
    for line in ("  state stopped", "  step 4/10", "  loss 4.7000", "  tokens/s 100"):
        assert line in out


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_plot_of_runs_against_each_other(here: Path, call: Call) -> None:
    make(here / "a", 6)
    make(here / "b", 4, **{"train.optimizer.lr": 0.5})
    argv = ["plot", "a", "b", "--metric", "loss", "norm", "--x", "tokens", "--out", "c.png"]
    code, out, err = call(*argv)
    assert code == 0, err
    assert "Written: c.png, c.csv" in out
    assert imread(here / "c.png").shape[0] > 500
    rows = rows_of(here / "c.csv")
    assert [row["run"] for row in rows] == 6 * ["a"] + 4 * ["b"]
    assert list(rows[0]) == ["run", "step", "tokens", "loss", "norm/1", "norm/2"]
    assert [float(row["tokens"]) for row in rows[:3]] == [256, 512, 768]
    assert float(rows[5]["norm/2"]) == 7.0


def test_a_list_is_a_line_for_each_item_in_one_panel(
    here: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(here / "a", 6)
    drawn: list[Any] = []
    original = plots.metric_curves

    def kept(panels: Any, **options: Any) -> Any:
        drawn.append(panels)
        return original(panels, **options)

    monkeypatch.setattr(plots, "metric_curves", kept)
    assert call("plot", "a", "--metric", "norm", "loss")[0] == 0
    assert [(name, list(lines["a"])) for name, lines in drawn[0].items()] == [
        ("norm", ["1", "2"]),
        ("loss", [""]),
    ]
    assert imread(here / "a" / "curves.png").shape[0] < 1200
    assert call("plot", "a", "--metric", "norm/2")[0] == 0
    assert list(drawn[1]) == ["norm/2"]


def test_labels_say_in_what_runs_differ(here: Path) -> None:
    runs = [make(here / "a", 1), make(here / "b", 1, **{"train.optimizer.lr": 0.5})]
    configs = [read_config(run) for run in runs]
    first, second = tracking._labels(runs, configs)
    assert first.startswith("a: lr=") and second == "b: lr=0.5"
    assert tracking._labels(runs[:1], configs[:1]) == ["a"]


def test_plot_of_one_run_lies_in_its_folder(here: Path, call: Call) -> None:
    make(here / "a", 6)
    assert call("plot", "a", "--x", "seconds")[0] == 0
    assert (here / "a" / "curves.png").is_file()
    rows = rows_of(here / "a" / "curves.csv")
    assert float(rows[1]["seconds"]) == pytest.approx(256 + 2.56)


def test_plot_refuses_in_one_line(here: Path, call: Call) -> None:
    make(here / "a", 3)
    make(here / "empty", 0)
    (make(here / "bare", 0) / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    wrong = {
        ("a", "--metric", "los"): "metric = 'los': unknown metric, did you mean 'loss'?",
        ("empty",): "empty: no step has been logged yet",
        ("bare", "--x", "tokens"): "x = 'tokens': is not known: some steps of bare have no tokens",
        ("nowhere",): "nowhere: is not the folder of a run",
        (): "runs",
        ("a", "--out", "c.pdf"): "out = 'c.pdf': must end in .png",
        ("a", "--out", "nodir/c.png"): "out = 'nodir/c.png': its folder does not exist",
        ("a", "--metric"): "metric = []: must name at least one",
    }
    for argv, message in wrong.items():
        code, _, err = call("plot", *argv)
        assert code == 2 and message in err and err.count("\n") == 1, argv
    assert "gradient_norm" in call("plot", "a", "--metric", "los")[2]


def test_watch_once(here: Path, call: Call) -> None:
    make(here / "a", 6, state="running")
    code, out, err = call("watch", "a", "--once")
    assert code == 0, err
    # Five of six steps took 2.56 s.
    for part in ("a: running", "step 6 of 10", "ETA 10 s", "gradient norm", "4.5000", "tokens/s"):
        assert part in out
    failed = make(here / "b", 6, state="failed")
    state = json.loads((failed / "state.json").read_text())
    write_json(state | {"error": "OSError: disk full"}, failed / "state.json")
    out = call("watch", "b", "--once")[1]
    assert "b: failed" in out and "OSError: disk full" in out and "ago" in out
    (make(here / "new", 0) / "metrics.jsonl").unlink()
    assert "new: new" in call("watch", "new", "--once")[1]
    assert call("watch", "nowhere")[0] == 2


def test_watch_ends_with_the_run_and_leaves_on_ctrl_c(
    here: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(here / "a", 6, state="running")
    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            state = json.loads((run / "state.json").read_text())
            write_json(state | {"state": "stopped"}, run / "state.json")

    monkeypatch.setattr(time, "sleep", sleep)
    code, out, _ = call("watch", "a", "--every", "0.5")
    assert (code, looks) == (0, 3 * [0.5]) and "a: stopped" in out

    def interrupt(_seconds: float) -> None:
        raise KeyboardInterrupt

    make(here / "b", 6, state="running")
    monkeypatch.setattr(time, "sleep", interrupt)
    code, out, err = call("watch", "b")
    assert (code, err) == (0, "") and "b: running" in out


@pytest.mark.parametrize("width", [10, 20, 40])
def test_watch_on_a_narrow_terminal(
    here: Path, call: Call, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    make(here / "a", 6, state="running")
    monkeypatch.setattr(screen.OUT, "_width", width)
    assert call("watch", "a", "--once")[0] == 0


def test_loss_so_far_is_the_mean_of_eight_stretches() -> None:
    entries = [{"step": step, "loss": 32.0 - step} for step in range(32)]
    means = " ".join(f"{30.5 - 4 * n:.3f}" for n in range(8))
    assert loss_so_far(entries) == f"loss, first to last: {means}"
    assert loss_so_far(entries[:1]) == "loss, first to last: 32.000"
    entries[0]["loss"] = float("nan")
    assert loss_so_far(entries[:2]) == "loss, first to last: 31.000"
    assert loss_so_far(entries[:1]) == loss_so_far([{"step": 3}]) == "no finite loss yet"


def test_durations() -> None:
    assert list(map(duration, (42.0, 200.0, 18720.0, 198000.0))) == [
        "42 s",
        "3 min",
        "5 h 12 min",
        "2 d 7 h",
    ]


def test_a_real_run_stopped_and_finished(
    here: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "text").mkdir()
    for number in range(6):
        (here / "text" / f"{number}.py").write_text(f"def f{number}(x):\n    return x\n" * 20)
    original, seen = jobs.train, []

    def interrupted(run: Run, **options: Any) -> Any:
        steps = original(run, **options)
        yield next(steps)
        seen.append(listed(call)["tiny-1"]["state"])
        os.kill(os.getpid(), signal.SIGINT)
        try:
            yield from steps
        finally:
            steps.close()

    small = ["train.seq_len=32", "train.num_steps=4", "model.dim=32"]
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "train", interrupted)
        assert call("train", "--recipe", "tiny", "--data", "text", "--set", *small)[0] == 130
    found = listed(call)["tiny-1"]
    assert (seen, found["state"], found["step"]) == (["running"], "stopped", 1)
    shutil.copytree("runs/tiny-1", "runs/tiny-2")
    assert call("train", "--resume", "runs/tiny-1")[0] == 0
    states = {name: (entry["state"], entry["step"]) for name, entry in listed(call).items()}
    assert states == {"tiny-1": ("finished", 4), "tiny-2": ("stopped", 1)}
    assert call("plot", "runs/tiny-1", "runs/tiny-2", "--out", "c.png")[0] == 0
