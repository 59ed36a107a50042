"""Ctrl-C and SIGTERM: clean up and exit, or exit without cleaning up after GRACE seconds.

A signal raises KeyboardInterrupt in the main thread, which cleans up. A library call that does not
return to Python (training a tokenizer, a large matrix product) delays this. A second thread
therefore gets the signal as well and ends the process if it still runs after GRACE seconds.
Training is asked to stop instead: it abandons its step, saves and returns (`stop_training`).
"""

import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
CODES = tuple(128 + number for number in SIGNALS)
GRACE = 1.2  # seconds
_received: list[int] | None = None  # signals inside `stop_training`; None outside


class Interrupted(KeyboardInterrupt):
    """KeyboardInterrupt with the exit code of its signal."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.code = 128 + number


@contextmanager
def answer_signals() -> Iterator[None]:
    """Handle signals while a command runs in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    former = {number: signal.signal(number, _interrupt) for number in SIGNALS}
    wakeup = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(read_end,), name="signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in former.items():
            signal.signal(number, handler)
        os.close(write_end)  # ends the thread


@contextmanager
def stop_training(received: list[int]) -> Iterator[None]:
    """Append the first signal to `received` instead of raising; a second one raises."""
    global _received
    _received = received
    try:
        yield
    finally:
        _received = None


def _interrupt(number: int, _frame: FrameType | None) -> None:
    if _received is not None and not _received:
        _received.append(number)
        return
    raise Interrupted(number)


def _listen(read_end: int) -> None:
    """Body of the second thread: reads the signal numbers that the interpreter writes to a pipe."""
    asked = False
    while received := os.read(read_end, 1):
        if received[0] not in SIGNALS:
            continue
        if _received is not None and not asked:
            asked = True
            print("stopping after saving a checkpoint (again: end at once)", file=sys.stderr)
            continue
        # The pipe is closed when the work has ended. A second signal ends the process now.
        if not select.select([read_end], [], [], GRACE)[0] or os.read(read_end, 1):
            os.write(2, b"interrupted\n")  # not print: a thread may have locked the stream
            os._exit(128 + received[0])  # waits for no thread
        break
    os.close(read_end)
