"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, Trackio.

A tracker cannot end a training: one that raises is dropped with a warning. Only rank 0 tracks.
"""

import importlib
import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from openmythos.config import ConfigError, needs, require
from openmythos.files import read_json, write_json
from openmythos.train.metrics import scalars

LOGGER = logging.getLogger(__name__)
FILE = "tracking.json"


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """A run for a tracker: `id` stays the same when the run is resumed at `first_step`."""

    folder: Path
    id: str
    first_step: int
    config: Mapping[str, Any]


class Sink(NamedTuple):
    """An active tracker: `log(values, step)` and `close(failed)`."""

    log: Callable[[dict[str, float], int], object]
    close: Callable[[bool], object]


@dataclass(frozen=True, kw_only=True)
class TensorBoard:
    """Event files in RUN/tensorboard; `tensorboard --logdir runs` shows all runs in runs/."""

    kind: Literal["tensorboard"] = "tensorboard"
    package: ClassVar = ("torch.utils.tensorboard", "SummaryWriter")

    def start(self, run: Tracked) -> Sink:
        # Steps repeated after a crash replace the earlier ones.
        purge = run.first_step if run.first_step > 0 else None
        folder = str(run.folder / "tensorboard")
        writer = _imported(self).SummaryWriter(folder, purge_step=purge, flush_secs=10)

        def log(values: dict[str, float], step: int) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        return Sink(log, lambda _failed: writer.close())


@dataclass(frozen=True, kw_only=True)
class Wandb:
    """A run of a Weights & Biases project; its local files are in RUN/wandb.

    mode "auto" follows WANDB_MODE, and is online without it.
    """

    kind: Literal["wandb"] = "wandb"
    package: ClassVar = ("wandb", "init")
    project: str = "openmythos"
    entity: str = ""
    group: str = ""
    mode: Literal["auto", "online", "offline"] = "auto"

    def __post_init__(self) -> None:
        require(bool(self.project), "project", self.project, "must name a project")

    def start(self, run: Tracked) -> Sink:
        wandb = _imported(self)
        started = wandb.init(
            project=self.project,
            entity=self.entity or None,
            group=self.group or None,
            mode=None if self.mode == "auto" else self.mode,
            name=run.folder.name,
            id=run.id,
            resume="allow",
            dir=str(run.folder),
            config=dict(run.config),
            # Otherwise wandb records every redraw of the progress bar.
            settings=wandb.Settings(console="off"),
        )
        return Sink(started.log, lambda failed: started.finish(exit_code=int(failed)))


@dataclass(frozen=True, kw_only=True)
class Trackio:
    """A run of a Trackio project, on this machine or on the Hugging Face Space `space`."""

    kind: Literal["trackio"] = "trackio"
    package: ClassVar = ("trackio", "init")
    project: str = "openmythos"
    space: str = ""

    def __post_init__(self) -> None:
        require(bool(self.project), "project", self.project, "must name a project")

    def start(self, run: Tracked) -> Sink:
        started = _imported(self).init(
            project=self.project,
            # Trackio resumes by name, and an earlier run may have had a folder of this name.
            name=f"{run.folder.name}-{run.id}",
            space_id=self.space or None,
            config=dict(run.config),
            resume="allow",
            embed=False,
        )
        return Sink(started.log, lambda _failed: started.finish())


Tracker = TensorBoard | Wandb | Trackio


class Trackers:
    """All trackers of a run; a context manager that closes them. One that fails is dropped."""

    def __init__(
        self, chosen: tuple[Tracker, ...], folder: Path, first_step: int, config: Mapping[str, Any]
    ) -> None:
        self._sinks: dict[str, Sink] = {}
        if not chosen:
            return
        require_packages(chosen)
        tracked = Tracked(
            folder=folder, id=_run_id(folder, first_step), first_step=first_step, config=config
        )
        for tracker in chosen:
            self._try(tracker.kind, partial(self._start, tracker, tracked))

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Log the scalars of a step, see `metrics.scalars`."""
        values = scalars(metrics)
        for kind, sink in list(self._sinks.items()):
            self._try(kind, partial(sink.log, dict(values), metrics["step"]))

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        failed = kind is not None and issubclass(kind, Exception)
        for name, sink in list(self._sinks.items()):
            self._try(name, partial(sink.close, failed))

    def _start(self, tracker: Tracker, tracked: Tracked) -> None:
        self._sinks[tracker.kind] = tracker.start(tracked)

    def _try(self, kind: str, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            self._sinks.pop(kind, None)
            text = " ".join(str(error).split())
            LOGGER.warning("tracker %s is dropped: %s: %s", kind, type(error).__name__, text)


def require_packages(chosen: tuple[Tracker, ...]) -> None:
    """Raise a ConfigError that names the extra to install if a package is missing."""
    for tracker in chosen:
        _imported(tracker)


def _imported(tracker: Tracker) -> Any:
    """The package of a tracker."""
    module, needed = tracker.package
    try:
        found = importlib.import_module(module)
    except ImportError:
        found = None
    # A folder named wandb, which wandb creates, imports as a package without `init`.
    if not hasattr(found, needed):
        raise ConfigError(f"tracker {tracker.kind} {needs(tracker.kind)}")
    return found


def _run_id(folder: Path, first_step: int) -> str:
    """The id of a resumed run; a new one for a run that starts at step 0."""
    path = folder / FILE
    if first_step > 0 and path.is_file():
        run_id = read_json(path).get("id")
        require(isinstance(run_id, str) and bool(run_id), f"{path}: id", run_id, "must be a string")
        return str(run_id)
    run_id = secrets.token_hex(4)
    write_json({"id": run_id}, path)
    return run_id
