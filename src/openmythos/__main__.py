"""`python -m openmythos`, and the program `openmythos`."""

import os
import signal
from types import FrameType
from typing import NoReturn


def run() -> NoReturn:
    """Run the program; Ctrl-C during its imports exits without a traceback."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    from openmythos.cli import run as program

    program()


def _leave(number: int, _frame: FrameType | None) -> None:
    os.write(2, b"interrupted\n")
    os._exit(128 + number)


if __name__ == "__main__":
    run()
