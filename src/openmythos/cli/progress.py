"""Progress of long work: a bar on a terminal, lines of text elsewhere.

A line shows the stage, the amount done, a status text, the elapsed time and the ETA. It is printed
at the first update, then every ten seconds and after every twentieth of the work. After ten seconds
without an update, a line says so.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator

from rich.console import Console
from rich.progress import BarColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

SILENCE, PAUSE = 10.0, 1.0  # seconds: longest and shortest time between two lines
PARTS = 20  # print a line after each of this many parts of the work
BEAT = 1.0  # seconds between calls of `tick`


class Progress:
    """Use as a context manager around the work, which calls `update`.

    `unit` is the unit shown; with "MB", `update` is called with bytes.
    """

    def __init__(
        self,
        console: Console,
        stage: str,
        *,
        total: int | None = None,
        unit: str = "step",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console, self._clock = console, clock
        self._stage, self._total, self._unit = stage, total, unit
        self._done: int | None = None  # no update yet
        self._text = ""
        self._started = self._updated = self._printed = clock()
        self._base = (self._started, 0)  # (time, count) from which the rate is computed
        self._shown = 0  # parts of the work already printed
        self._lock = threading.Lock()  # `update` and `tick` run in different threads
        self._ended = threading.Event()
        self._bar: Bar | None = None
        if console.is_terminal:
            self._bar = _bar(console)
            self._task = self._bar.add_task(stage, total=total, amount="", text="starting")
        self._heart = threading.Thread(target=self._beat, name="progress", daemon=True)

    def update(
        self,
        done: int,
        text: str = "",
        *,
        total: int | None = None,
        stage: str | None = None,
        kept: int | None = None,
    ) -> None:
        """Report `done` of `total`, `kept` of it by an earlier run; a new stage resets time."""
        with self._lock:
            now = self._clock()
            if stage is not None and stage != self._stage:
                self._stage, self._started, self._done, self._shown = stage, now, None, 0
            self._total = self._total if total is None else total
            if kept is not None:
                self._base = (self._started, kept)
            elif self._done is None:
                self._base = (now, done)
            first, self._done, self._text, self._updated = self._done is None, done, text, now
            if self._bar is not None:
                self._bar.update(
                    self._task,
                    description=self._stage,
                    completed=done,
                    total=self._total,
                    amount=self._amount(),
                    text=text,
                )
                return
            part = done * PARTS // self._total if self._total else 0
            waited = now - self._printed
            over = self._total is not None and done >= self._total
            if first or over or waited >= SILENCE or (part > self._shown and waited >= PAUSE):
                self._shown = part
                self._say(self._line(now))

    def tick(self) -> None:
        """Print that the work is still running, if nothing was heard of it for SILENCE seconds."""
        with self._lock:
            now = self._clock()
            if self._bar is not None or now - max(self._printed, self._updated) < SILENCE:
                return
            if self._done is None:
                self._say(f"{self._stage}: starting, {duration(now - self._started)}")
                return
            waited = duration(now - self._updated)
            self._say(f"{self._line(now)}; still running, no news for {waited}")

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        else:
            self._heart.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        if self._bar is not None:
            self._bar.stop()
        else:
            self._heart.join()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            self.tick()

    def _say(self, line: str) -> None:
        self._printed = self._clock()
        self._console.print(line, soft_wrap=True)

    def _line(self, now: float) -> str:
        parts = [self._amount(), self._text, duration(now - self._started)]
        began, before = self._base
        if self._total and self._done is not None and self._done > before:
            left = (now - began) / (self._done - before) * max(0, self._total - self._done)
            parts.append(f"ETA {duration(left)}")
        return f"{self._stage}: {', '.join(part for part in parts if part)}"

    def _amount(self) -> str:
        done, total = self._done or 0, self._total
        if not done and not total:
            return ""
        counts = [done, total] if total else [done]
        of = " of ".join(f"{n / 1e6:.1f}" if self._unit == "MB" else f"{n:,}" for n in counts)
        return f"{self._unit} {of}" if self._unit == "step" else f"{of} {self._unit}"


def counted(texts: Iterable[str], progress: Progress) -> Iterator[str]:
    """Yield the texts and report the bytes yielded so far as progress."""
    done = 0
    for text in texts:
        done += len(text.encode(errors="surrogateescape"))
        progress.update(done)
        yield text
    progress.update(done, stage="training the tokenizer")


def _bar(console: Console) -> Bar:
    fields = ("{task.description}", BarColumn(24), "{task.fields[amount]}", "{task.fields[text]}")
    return Bar(*fields, TimeElapsedColumn(), "ETA", TimeRemainingColumn(), console=console)


def duration(seconds: float) -> str:
    """Two units at most: 42 s, 3 min, 5 h 12 min, 2 d 7 h."""
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if minutes < 1:
        return f"{seconds:.0f} s"
    if hours < 1:
        return f"{minutes:.0f} min"
    if days < 1:
        return f"{int(hours)} h {int(minutes) % 60} min"
    return f"{int(days)} d {int(hours) % 24} h"
