"""Signals: while a library call blocks the main thread, in workers, and in training."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from openmythos.cli.interrupt import Interrupted, answer_signals, stop_training
from openmythos.processes import worker_pool

# A minute inside one library call, during which Python handles no signal.
DEAF = """
import hashlib
from openmythos.cli.interrupt import answer_signals
with answer_signals():
    print("works", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", 200_000_000)
"""


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_library_that_does_not_return_is_left(number: signal.Signals) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", DEAF], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "works\n"
    time.sleep(0.5)  # by then it computes
    started = time.monotonic()
    child.send_signal(number)
    error = child.communicate(timeout=30)[1]
    assert (child.returncode, error) == (128 + number, "interrupted\n")
    assert time.monotonic() - started < 10  # 2 s on a quiet machine


def test_a_signal_raises_in_the_work_and_former_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt) as stop, answer_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert isinstance(stop.value, Interrupted) and stop.value.code == 143
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_training_is_asked_once_and_interrupted_the_second_time() -> None:
    received: list[int] = []
    with pytest.raises(Interrupted), answer_signals(), stop_training(received):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert received == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    assert received == [signal.SIGINT]


def test_workers_end_where_the_work_is_interrupted(tmp_path: Path) -> None:
    started = tmp_path / "started"
    with pytest.raises(KeyboardInterrupt), worker_pool(1) as pool:
        pool.submit(started.write_text, "")
        pool.submit(time.sleep, 60)
        while not started.exists():
            time.sleep(0.01)
        began = time.monotonic()
        raise KeyboardInterrupt
    # A killed process takes a moment to end.
    while multiprocessing.active_children() and time.monotonic() - began < 10:
        time.sleep(0.01)
    assert not multiprocessing.active_children()
