"""Flags that several commands share, and parsing of the command line; imports no torch.

tyro prints an error as a box of several lines; `parse` turns it into one line.
"""

import functools
import io
import operator
import re
from contextlib import redirect_stderr
from pathlib import Path
from typing import Annotated, Any

import tyro

from openmythos.config import ConfigError, require, unknown_name

_BOX = " │─╭╮╰╯"  # the characters of tyro's boxes
# --prompt may be empty; --num-loops has an error message of its own.
_MAY_BE_EMPTY = ("--prompt", "--num-loops")


def shown(metavar: str, default: str | None = None, help: str | None = None) -> Any:
    """Metadata for tyro's help. `default` is shown instead of the default value; "" hides it."""
    hint = None if default is None else f"(default: {default})" if default else ""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint, help=help)


Many = tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]]
Texts = Annotated[Many, shown("PATH ...", "")]
Changes = Annotated[Many, shown("KEY=VALUE ...", "")]
RunFolder = tyro.conf.Positional[Annotated[str, shown("RUN", help="Run folder.")]]
ModelSource = tyro.conf.Positional[
    Annotated[str, shown("MODEL", help="Run folder, model folder, GGUF file or Hub id.")]
]
Step = Annotated[int | None, shown("N", "the newest", "Checkpoint.")]
Device = Annotated[
    str,
    shown(
        "auto|cpu|cuda[:N]|mps", help="Where to compute; auto takes an accelerator if there is one."
    ),
]


def flat(values: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    """All values of a flag that was given several times, in one tuple."""
    return tuple(value for group in values for value in group)


def require_folder(field: str, path: str) -> None:
    """Raise, before long work starts, unless `path` is a folder or can be created as one."""
    present = [parent for parent in (Path(path), *Path(path).parents) if parent.exists()]
    require(present[0].is_dir(), field, path, f"{present[0]} is not a folder")


def parse(commands: tuple[type, ...], argv: list[str]) -> Any:
    """The command that `argv` describes; raises a one-line ConfigError for bad flags."""
    names = [command.__name__.lower() for command in commands]
    if argv and not argv[0].startswith("-") and argv[0] not in names:
        raise ConfigError(unknown_name(f"command {argv[0]!r}", argv[0], names))
    _refuse_empty(argv)
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            return tyro.cli(
                functools.reduce(operator.or_, commands),
                prog="openmythos",
                description="Recurrent-depth transformers: train, sample, evaluate, plan.",
                args=argv,
                config=(
                    tyro.conf.OmitArgPrefixes,
                    tyro.conf.OmitSubcommandPrefixes,
                    tyro.conf.FlagCreatePairsOff,
                ),
            )
    except SystemExit as stop:
        if stop.code == 0:
            raise
        raise ConfigError(_message(box.getvalue(), argv)) from None


def _refuse_empty(argv: list[str]) -> None:
    """Raise for empty arguments, which usually come from an unset shell variable."""
    flag = ""
    for index, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            flag = name
        empty = word == "" or (name.startswith("--") and equals == "=" and value == "")
        if empty and flag not in _MAY_BE_EMPTY:
            raise ConfigError(f"{flag or f'argument {index + 1}'}: must not be empty")
        following = argv[index + 1] if index + 1 < len(argv) else "--"
        if word in ("--set", "--data") and following.startswith("--"):
            raise ConfigError(f"{word}: must be followed by at least one value")


def _message(box: str, argv: list[str]) -> str:
    """tyro's message as one line."""
    text, *further = _sections(box)
    if missing := re.match(r"Missing from openmythos ([a-z ]+): (.*)", text):
        wanted = [
            f"{name} ({what[0].lower()}{what[1:].rstrip('.')})"
            for name, what in re.findall(r"(--\S+ \S+|\S+) (.+?) \(required\)", missing[2])
        ]
        is_run = any(name.startswith(("RUN ", "MODEL ")) for name in wanted)
        example = ", such as runs/demo-1" if is_run else ""
        return f"{missing[1]}: needs {', '.join(wanted)}{example} (see --help)"
    if valueless := re.match(r"Missing value for argument '(--[\w-]+)'", text):
        flag = valueless[1]
        following = argv[argv.index(flag) + 1 :][:1] if flag in argv else []
        dash = [f"; a value that begins with a dash is written {flag}={x}" for x in following]
        return f"{flag}: needs a value{''.join(dash)}"
    if unread := re.match(r"Error parsing (--[\w-]+): .*'([^']*)'", text):
        return f"{unread[1]}: {unread[2]!r} is not a number of the kind it needs (see --help)"
    hints = re.findall(
        r"Perhaps you meant: (--[\w-]+)|(Available subcommands: .*)", "; ".join(further)
    )
    hint = "".join(f", did you mean {flag}?" if flag else f"; {names}" for flag, names in hints[:1])
    return f"{text}{hint} (see --help)"


def _sections(box: str) -> list[str]:
    """The texts between the horizontal rules of a UTF-8 or ASCII box, without its title."""
    sections: list[str] = [""]
    for line in box.splitlines()[1:]:
        words = line.strip(_BOX)
        if set(words) <= {"-"}:
            sections.append("")
        else:
            sections[-1] = f"{sections[-1]} {words}".strip()
    return [section for section in sections if section] or [" ".join(box.split())]
