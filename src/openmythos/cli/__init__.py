"""The command line: the only package that reads argv and prints."""

import contextlib
import logging
import os
import sys
import traceback
from typing import NoReturn

from openmythos import __version__
from openmythos.cli.commands import Demo, Eval, Generate, Plan, Presets, Train
from openmythos.cli.data import Data, Tokenizer
from openmythos.cli.export import Export
from openmythos.cli.flags import parse
from openmythos.cli.hub import Import, Info
from openmythos.cli.interrupt import CODES, Interrupted, answer_signals
from openmythos.cli.serve import Serve
from openmythos.cli.study import Study
from openmythos.cli.tracking import Plot, Runs
from openmythos.cli.watch import Watch

COMMANDS = (
    *(Demo, Train, Generate, Serve, Eval, Import, Info, Export, Plan, Presets, Study),
    *(Tokenizer, Data, Runs, Plot, Watch),
)
_DEBUG = "OPENMYTHOS_DEBUG"  # 1: print the traceback of an error


def run() -> NoReturn:
    """The program `openmythos`."""
    code = main()
    if code in CODES:
        os._exit(code)  # a normal exit would wait for running threads
    if "torch" not in sys.modules:
        sys.exit(code)
    from openmythos.distributed.ranks import exit_process

    exit_process(code)


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns 0 on success, 2 for wrong input, 1 for other failures."""
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["--version"]:
        print(f"openmythos {__version__}")
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        command = parse(COMMANDS, given)
        # Imports torch, which takes seconds: only after the command line has been parsed.
        from openmythos.machine import keep_freed_memory

        keep_freed_memory()
        with answer_signals():
            command.run()
            sys.stdout.flush()
    except KeyboardInterrupt as stop:
        print("interrupted", file=sys.stderr)
        return stop.code if isinstance(stop, Interrupted) else 130
    except BrokenPipeError:
        # The reader closed the pipe. Without this, the flush at exit would fail again.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if os.environ.get(_DEBUG) == "1":
            traceback.print_exc()
        code, message = _explain(error)
        print(f"error: {message}", file=sys.stderr)
        return code
    return 0


def _explain(error: Exception) -> tuple[int, str]:
    """Exit code and one-line message of an error."""
    text = str(error)
    if isinstance(error, ValueError | FileExistsError | FileNotFoundError | PermissionError):
        return 2, text
    if isinstance(error, OSError | FloatingPointError):
        return 1, text
    line = next(iter(text.splitlines()), "")
    # torch raises OutOfMemoryError for a GPU and a plain RuntimeError for the host's memory.
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return 1, f"out of memory: {line}".removesuffix(": ")
    return 1, f"{type(error).__name__}: {line}; this is a bug, {_DEBUG}=1 shows where"
