"""Worker processes that never outlive the work: one pool for all that runs in parallel."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from types import FrameType


@contextmanager
def worker_pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with this one, and at once where the block is left by an exception."""
    before = multiprocessing.active_children()
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, _start_worker, (os.getpid(),))
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        own = [child for child in multiprocessing.active_children() if child not in before]
        for child in own:
            child.terminate()
        for child in own:
            child.join(0.4)
            child.kill()
        # Gives back the semaphores that they shared.
        pool.shutdown()
        raise
    pool.shutdown()


def _start_worker(parent: int) -> None:
    # Ctrl-C reaches every process of the terminal; only the one that hands out the work obeys.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The processes share the cores among them already.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    asked = threading.Event()

    def leave(_number: int, _frame: FrameType | None) -> None:
        asked.set()
        # Unwinds the work, which removes its temporary folders.
        sys.exit(1)

    signal.signal(signal.SIGTERM, leave)

    def watch() -> None:
        while os.getppid() == parent and not asked.wait(0.5):
            continue
        if not asked.is_set():
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        os._exit(1)

    # Of a parent that was killed nobody else tells a worker that waits for work.
    threading.Thread(target=watch, daemon=True).start()
