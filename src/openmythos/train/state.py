"""RUN/state.json: what a run is doing, written by the process that trains it.

A killed process cannot write that it has ended. A reader that shares the host and PID namespace of
the training checks whether the process exists; any other goes by the time of the last write.
"""

import contextlib
import math
import os
import platform
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import psutil
from filelock import FileLock, Timeout

from openmythos.config import ConfigError
from openmythos.files import load_json, write_json
from openmythos.train.metrics import Metrics

FILE = "state.json"
LOCK_FILE = ".lock"
BEAT = 5.0  # seconds between two writes
SILENCE = 60.0  # seconds without a write after which a process elsewhere counts as dead
State = Literal["running", "finished", "stopped", "failed", "dead", "new", "unknown"]
# Final states: no process will change them unless the run is resumed.
ENDED: tuple[State, ...] = ("finished", "stopped", "failed", "dead", "unknown")


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The content of state.json; times in seconds since the epoch.

    `pid` is valid on one host, boot and PID namespace (`place`, "" if unknown); `start_time`, when
    the process was created, in seconds since boot, detects that its pid was reused.
    """

    state: Literal["running", "finished", "stopped", "failed"]
    step: int  # steps done
    num_steps: int
    pid: int
    host: str
    place: str
    start_time: float
    started: float  # when training started
    stepped: float  # when the last step ended
    alive: float  # when the file was written
    error: str = ""

    def status(self, now: float) -> State:
        """The state at the time `now`: a run that says "running" may be "dead"."""
        if self.state != "running":
            return self.state
        if self.place and self.place == _place():
            # The two may differ by a second: the boot time is known in whole seconds.
            same = abs(_start_time(self.pid) - self.start_time) < 2
            return "running" if same else "dead"
        return "running" if now - self.alive < SILENCE else "dead"


def read_state(run: Path) -> RunState | None:
    """The content of RUN/state.json; None if there is none yet."""
    path = run / FILE
    return load_json(RunState, path) if path.is_file() else None


def progress(
    record: RunState | None, metrics: Sequence[Metrics], num_steps: int | None
) -> tuple[State, int]:
    """(state of a run at this moment, steps done), from state.json, metrics and config.

    Each may be behind the other by some seconds; where few steps are logged, the metrics are.
    """
    done = max(metrics[-1]["step"] + 1 if metrics else 0, record.step if record else 0)
    if record is not None:
        return record.status(time.time()), done
    if not metrics:
        return "new", done
    return "finished" if num_steps is not None and done >= num_steps else "unknown", done


def lock(run: Path) -> FileLock:
    """Lock a run folder for writing until `release` or the end of the process.

    Raises a ConfigError that names the process that holds the lock. Readers need no lock. On a file
    system without locks this does nothing.
    """
    held = FileLock(run / LOCK_FILE, thread_local=False)
    try:
        with contextlib.suppress(NotImplementedError):
            held.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(f"{run}: {_holder(run)}") from error
    return held


def _holder(run: Path) -> str:
    try:
        found = read_state(run)
    except ConfigError:
        found = None
    if found is None or found.status(time.time()) != "running":
        return "another process is making or training it"
    where = "" if found.host == platform.node() else f" on {found.host}"
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(found.started))
    return f"process {found.pid}{where} is training it (since {since})"


class StateFile:
    """Keeps state.json up to date during training and records how it ended.

    A run whose iterator is closed, or that is interrupted, has stopped; an exception makes it
    failed. A file that cannot be written does not end the training.
    """

    def __init__(self, run: Path, *, step: int, num_steps: int) -> None:
        now = time.time()
        self._path = run / FILE
        self._state = RunState(
            state="running",
            step=step,
            num_steps=num_steps,
            pid=os.getpid(),
            host=platform.node(),
            place=_place(),
            start_time=_start_time(os.getpid()),
            started=now,
            stepped=now,
            alive=now,
        )
        self._ended = threading.Event()
        # In a thread: a step may take longer than SILENCE.
        self._thread = threading.Thread(target=self._beat, name="state", daemon=True)

    def stepped(self, step: int) -> None:
        """Record that another step is done."""
        self._state = replace(self._state, step=step, stepped=time.time())

    def __enter__(self) -> "StateFile":
        self._write()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        done = self._state.step >= self._state.num_steps
        self._state = replace(self._state, state="finished" if done else "stopped")
        if kind is not None and issubclass(kind, Exception):
            lines = str(error).splitlines() or [""]
            self._state = replace(self._state, state="failed", error=f"{kind.__name__}: {lines[0]}")
        self._write()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            self._write()

    def _write(self) -> None:
        with contextlib.suppress(OSError):
            write_json(asdict(replace(self._state, alive=time.time())), self._path)


def _place() -> str:
    """Host, its boot and PID namespace, within which a pid names one process; "" if not Linux."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{platform.node()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_time(pid: int) -> float:
    """Seconds from boot to the creation of a process; nan for no process and for a zombie.

    Unlike the time since the epoch, it does not change when the clock is set.
    """
    try:
        process = psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE:
            return process.create_time() - psutil.boot_time()
    except psutil.Error:
        pass
    return math.nan
