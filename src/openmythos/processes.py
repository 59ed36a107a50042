"""A process pool for parallel work; its workers never outlive the parent process."""

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
    """A pool whose processes exit with this one, or at once if the block raises."""
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
        pool.shutdown()  # frees the shared semaphores
        raise
    pool.shutdown()


def _start_worker(parent: int) -> None:
    # Ctrl-C signals every process of the terminal; only the parent handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers use all cores already
    asked = threading.Event()

    def stop(_number: int, _frame: FrameType | None) -> None:
        asked.set()
        sys.exit(1)  # SystemExit, so that the work removes its temporary folders

    signal.signal(signal.SIGTERM, stop)

    def watch() -> None:
        while os.getppid() == parent and not asked.wait(0.5):
            continue
        if not asked.is_set():
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        os._exit(1)

    # An idle worker would not notice that its parent was killed.
    threading.Thread(target=watch, daemon=True).start()
