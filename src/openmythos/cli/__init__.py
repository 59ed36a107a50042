"""The command line: the only room that knows argv and prints."""

import io
import itertools
import logging
import sys
from contextlib import redirect_stderr
from typing import Annotated, NoReturn

import tyro

from openmythos import __version__
from openmythos.cli.commands import Demo, Eval, Export, Generate, Plan, Presets, Study, Train
from openmythos.cli.data import Data, Tokenizer
from openmythos.cli.tracking import Plot, Runs, Watch

# What tyro draws around its messages.
BOX = " │─╭╮╰╯"

Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Presets, tyro.conf.subcommand("presets")]
    | Annotated[Study, tyro.conf.subcommand("study")]
    | Annotated[Tokenizer, tyro.conf.subcommand("tokenizer")]
    | Annotated[Data, tyro.conf.subcommand("data")]
    | Annotated[Runs, tyro.conf.subcommand("runs")]
    | Annotated[Plot, tyro.conf.subcommand("plot")]
    | Annotated[Watch, tyro.conf.subcommand("watch")]
)


def run() -> NoReturn:
    """The program `openmythos`."""
    code = main()
    # Who has not come as far as torch can leave like any program.
    if "torch" not in sys.modules:
        sys.exit(code)
    from openmythos.train.parallel import leave

    leave(code)


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 on success, 2 when the user's input is at fault, 1 on other failures."""
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["--version"]:
        print(f"openmythos {__version__}")
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        command = _parse(given)
        # Torch takes seconds to import: the rest begins once the command is known to be one.
        from openmythos.machine import keep_freed_memory

        keep_freed_memory()
        command.run()
    except (ValueError, FileExistsError, FileNotFoundError, PermissionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _parse(argv: list[str]) -> Command:
    """The command of argv; bad flags raise a ValueError of one line instead of tyro's box."""
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            return tyro.cli(
                Command,
                prog="openmythos",
                description="Recurrent-depth transformers: train, sample, evaluate, plan.",
                args=argv,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
            )
    except SystemExit as stop:
        if stop.code == 0:
            raise
        lines = [line.strip(BOX) for line in box.getvalue().splitlines()[1:]]
        first = itertools.takewhile(bool, lines)
        raise ValueError(f"{' '.join(first)} (see --help)") from None
