"""Ctrl-C and SIGTERM: an answer at once, an orderly end, and an end in any case.

A signal raises KeyboardInterrupt in the work, which leaves by its own clean-up. Inside a library
that does not return (a tokenizer that trains, one large product) the main thread cannot hear it:
a thread of its own hears it too, and ends the process where the work has not ended after GRACE
seconds. Training is asked instead: it abandons its step, saves and returns (`stop_training`).
"""

import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
CODES = tuple(128 + number for number in SIGNALS)
GRACE = 1.2
_received: list[int] | None = None  # of the training that is to stop by itself


class Interrupted(KeyboardInterrupt):
    """By which signal; `code` is the exit code that says so."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.code = 128 + number


@contextmanager
def answer_signals() -> Iterator[None]:
    """Around the work of a command, in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    hear, tell = os.pipe()
    os.set_blocking(tell, False)
    former = {number: signal.signal(number, _interrupt) for number in SIGNALS}
    wakeup = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(hear,), name="signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in former.items():
            signal.signal(number, handler)
        os.close(tell)  # which ends the thread


@contextmanager
def stop_training(received: list[int]) -> Iterator[None]:
    """The first signal goes into the list and raises nothing; a second one acts as always."""
    global _received
    _received = received
    try:
        yield
    finally:
        _received = None


def leave_at_once(code: int) -> NoReturn:
    """End the process without waiting for its threads, nor for a stream that another one holds."""
    os.write(2, b"interrupted\n")
    os._exit(code)


def _interrupt(number: int, _frame: FrameType | None) -> None:
    if _received is not None and not _received:
        _received.append(number)
        return
    raise Interrupted(number)


def _listen(hear: int) -> None:
    """What the thread does: the interpreter writes the number of every signal to a pipe."""
    asked = False
    while told := os.read(hear, 1):
        if told[0] not in SIGNALS:
            continue
        if _received is not None and not asked:
            asked = True
            print("stopping, what is done is saved (again: end at once)", file=sys.stderr)
            continue
        # The pipe is closed, or another signal has come, or it takes too long.
        if not select.select([hear], [], [], GRACE)[0] or os.read(hear, 1):
            leave_at_once(128 + told[0])
        break
    os.close(hear)
