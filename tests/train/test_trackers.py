"""Trackers get all logged metrics, under one id, and cannot end a training."""

import importlib.util
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
from variants import tiny_config

from openmythos.config import ConfigError, apply_overrides
from openmythos.files import load_toml, save_toml
from openmythos.train.config import RunConfig, TextData, TrainConfig
from openmythos.train.run import Run, train
from openmythos.train.trackers import TensorBoard, Tracker, Trackers, Trackio, Wandb

MODULES = {
    "tensorboard": "torch.utils.tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
}


class Fake:
    """Records the calls of the three packages."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[int, str, float]] = []
        self.closed: list[Any] = []
        self.broken: set[str] = set()

    def fail(self, call: str) -> None:
        if call in self.broken:
            raise ConnectionError(f"no network\nfor {call}")

    def init(self, *args: Any, **options: Any) -> "Fake":
        self.fail("init")
        self.started.append({"args": args, **options})
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.fail("log")
        self.logged += [(step, name, value) for name, value in values.items()]

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.log({name: value}, step)

    def finish(self, exit_code: int | None = None) -> None:
        self.fail("finish")
        self.closed.append(exit_code)

    def close(self) -> None:
        self.finish()

    @property
    def steps(self) -> list[int]:
        return [step for step, name, _ in self.logged if name == "loss"]


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Fake]:
    found = {}
    for kind, name in MODULES.items():
        module, found[kind] = ModuleType(name), Fake()
        module.SummaryWriter = module.init = found[kind].init  # type: ignore[attr-defined]
        module.Settings = dict  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    return found


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Run]:
    (tmp_path / "text").mkdir()
    for number in range(4):
        (tmp_path / "text" / f"{number}.txt").write_text(f"loop {number} state decay " * 40)

    def made(*trackers: Tracker, **changes: Any) -> Run:
        usual = {"num_steps": 4, "batch_size": 2, "seq_len": 16, "save_every": 2}
        config = RunConfig(
            model=tiny_config(vocab_size=257, context=16),
            data=TextData(paths=(str(tmp_path / "text"),)),
            train=TrainConfig(trackers=trackers, **(usual | changes)),
        )
        return Run.create(tmp_path / "run", config)

    return made


ALL = tuple(tracker() for tracker in get_args(Tracker))


def test_all_get_what_is_logged(make: Callable[..., Run], fakes: dict[str, Fake]) -> None:
    run = make(*ALL, log_every=3)
    metrics = list(train(run))
    for kind, fake in fakes.items():
        assert fake.steps == [0, 3], kind
        assert (3, "gradient_norm", metrics[3].gradient_norm) in fake.logged
        assert not any(name == "step" for _, name, _ in fake.logged)
        assert len(fake.started) == len(fake.closed) == 1, kind
    started = fakes["wandb"].started[0]
    assert (started["project"], started["name"], started["resume"]) == (
        "openmythos",
        "run",
        "allow",
    )
    assert started["dir"] == str(run.folder)
    assert started["config"]["train"]["num_steps"] == 4
    assert fakes["tensorboard"].started[0]["args"] == (str(run.folder / "tensorboard"),)
    assert fakes["tensorboard"].started[0]["purge_step"] is None


def test_a_resumed_run_is_the_same_run(make: Callable[..., Run], fakes: dict[str, Fake]) -> None:
    run = make(*ALL)
    steps = train(run)
    for _ in range(3):
        next(steps)
    steps.close()
    list(train(run, resume=True))
    list(train(run))  # from its first step: a new one
    ids = [started["id"] for started in fakes["wandb"].started]
    assert ids[0] == ids[1] != ids[2]
    names = [started["name"] for started in fakes["trackio"].started]
    assert names == [f"run-{run_id}" for run_id in ids]
    assert [s["purge_step"] for s in fakes["tensorboard"].started] == [None, 3, None]
    for fake in fakes.values():
        assert fake.steps == [0, 1, 2, 3, *range(4)]


@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_a_failing_tracker_ends_no_training(
    make: Callable[..., Run],
    fakes: dict[str, Fake],
    call: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fakes["wandb"].broken = {call}
    with caplog.at_level(logging.WARNING):
        assert len(list(train(make(*ALL)))) == 4
    warned = [record.getMessage() for record in caplog.records]
    assert warned == [f"tracker wandb is dropped: ConnectionError: no network for {call}"]
    assert fakes["trackio"].steps == fakes["tensorboard"].steps == [0, 1, 2, 3]


def test_wandb_is_closed_as_failed(tmp_path: Path, fakes: dict[str, Fake]) -> None:
    for error, code in ((OSError("full"), 1), (GeneratorExit(), 0)):
        with pytest.raises(type(error)), Trackers((Wandb(),), tmp_path, 0, {}):
            raise error
        assert fakes["wandb"].closed.pop() == code


def test_lists_of_numbers_are_tracked_one_by_one(tmp_path: Path, fakes: dict[str, Fake]) -> None:
    with Trackers((Trackio(),), tmp_path, 0, {}) as trackers:
        trackers.log({"step": 5, "norm": [1.0, 2.0], "loss": 3})
    assert fakes["trackio"].logged == [(5, "norm/1", 1.0), (5, "norm/2", 2.0), (5, "loss", 3.0)]


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("how", ["missing", "an empty folder"])
def test_a_missing_package_is_named_before_anything_is_made(
    make: Callable[..., Run],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    kind: str,
    how: str,
) -> None:
    module = None if how == "missing" else ModuleType(MODULES[kind])
    monkeypatch.setitem(sys.modules, MODULES[kind], module)
    tracker = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}[kind]()
    text = rf"tracker {kind} needs: pip install 'openmythos\[{kind}\]'"
    with pytest.raises(ConfigError, match=text):
        make(tracker)
    assert not (tmp_path / "run").exists()
    run = make()
    config = replace(run.config, train=replace(run.config.train, trackers=(tracker,)))
    with pytest.raises(ConfigError, match=text):
        train(replace(run, config=config))


@pytest.mark.parametrize("kind", MODULES)
def test_trackers_are_written_in_configs_and_overrides(tmp_path: Path, kind: str) -> None:
    for text in (f'[{{kind="{kind}"}}]', f'["{kind}"]'):
        config = apply_overrides(TrainConfig(), [f"trackers={text}"])
        assert [tracker.kind for tracker in config.trackers] == [kind]
    save_toml(config, tmp_path / "config.toml")
    assert load_toml(TrainConfig, tmp_path / "config.toml") == config


def test_wrong_trackers_are_named() -> None:
    wrong = {
        '["wandbb"]': r"trackers\[0\].*'wandbb'.*did you mean 'wandb'",
        '["wandb", "wandb"]': "trackers = .*must be of different kinds",
        '[{kind="wandb", mode="of"}]': r"mode = 'of'",
        '[{kind="trackio", project=""}]': "project = ''",
    }
    for text, message in wrong.items():
        with pytest.raises(ConfigError, match=message):
            apply_overrides(TrainConfig(), [f"trackers={text}"])


@pytest.mark.usefixtures("fakes")
def test_without_trackers_no_id_is_made(make: Callable[..., Run]) -> None:
    run = make()
    list(train(run))
    assert not (run.folder / "tracking.json").exists()
    (run.folder / "tracking.json").write_text(json.dumps({"id": 3}))
    with pytest.raises(ConfigError, match=r"tracking\.json: id = 3"):
        Trackers((Wandb(),), run.folder, 2, {})


@pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)
def test_tensorboard_reads_what_was_written(make: Callable[..., Run]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = make(TensorBoard())
    metrics = list(train(run))
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(m.step, pytest.approx(m.loss)) for m in metrics]
