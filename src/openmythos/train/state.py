"""What a run is doing: RUN/state.json, kept by the process that trains, read by whoever watches.

A process that is killed cannot say so. Where its pid means something the reader looks for the
process; from elsewhere (another machine, another container) it goes by the last sign of life.
"""

import contextlib
import os
import platform
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal

from filelock import FileLock, Timeout

from openmythos.config import ConfigError, from_dict
from openmythos.files import read_json, write_json

FILE = "state.json"
LOCK_FILE = ".lock"
# Seconds between signs of life, and how long a process may go without one.
BEAT, SILENCE = 5.0, 60.0
State = Literal["running", "finished", "stopped", "failed", "dead", "new", "unknown"]
# Of these a run does not come back by itself.
ENDED: tuple[State, ...] = ("finished", "stopped", "failed", "dead", "unknown")


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The content of state.json; times in seconds since the epoch.

    `place` is where `pid` means this process: the host, its boot and the container; `born` tells
    the process from a later one of the same pid. Both are empty where the system does not say.
    """

    state: Literal["running", "finished", "stopped", "failed"]
    step: int  # steps done
    num_steps: int
    pid: int
    host: str
    place: str
    born: str
    started: float
    stepped: float  # when the last step ended
    alive: float  # the last sign of life
    error: str = ""

    def seen(self, now: float) -> State:
        """The state as it is now: "dead" is one that says running and runs no more."""
        if self.state != "running":
            return self.state
        if self.place and self.place == _place():
            return "running" if _born(self.pid) == self.born else "dead"
        return "running" if now - self.alive < SILENCE else "dead"


def read_state(run: Path) -> RunState | None:
    """None where no process has trained the run yet, or one of a version without state.json."""
    path = run / FILE
    return from_dict(RunState, read_json(path), str(path)) if path.is_file() else None


def lock(run: Path) -> FileLock:
    """Hold a run folder for writing, until `release` or the end of the process.

    Raises a ConfigError that names the process that holds it; readers need no lock. Where the file
    system has no locks, there is none.
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
    if found is None or found.seen(time.time()) != "running":
        return "another process is making or training it"
    where = "" if found.host == platform.node() else f" on {found.host}"
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(found.started))
    return f"process {found.pid}{where} is training it (since {since})"


class StateFile:
    """Keeps state.json up to date while training goes on, and says how it ended.

    A run that closes its iterator, or is interrupted, has stopped; an error has made it fail. A
    file that cannot be written is no reason to end the training.
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
            born=_born(os.getpid()),
            started=now,
            stepped=now,
            alive=now,
        )
        self._ended = threading.Event()
        # Beside the steps, for one may take longer than a reader would wait.
        self._thread = threading.Thread(target=self._beat, name="state", daemon=True)

    def stepped(self, step: int) -> None:
        """Another step is done."""
        self._state = replace(self._state, step=step, stepped=time.time())

    def __enter__(self) -> "StateFile":
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
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
    """Empty where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{platform.node()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _born(pid: int) -> str:
    """When a process started, in ticks since boot; empty where there is none, or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
