"""Every module can be imported, and the command line answers without torch."""

import importlib
import pkgutil
import subprocess
import sys

import openmythos


def test_every_module_can_be_imported() -> None:
    names = [module.name for module in pkgutil.walk_packages(openmythos.__path__, "openmythos.")]
    assert len(names) > 50
    for name in names:
        importlib.import_module(name)


def test_public_names_exist() -> None:
    missing = [name for name in openmythos.__all__ if not hasattr(openmythos, name)]
    assert not missing


def test_the_command_line_parses_without_torch() -> None:
    """Help, a typo and --version do not import torch, which takes seconds."""
    program = """
import contextlib, io, sys
from openmythos import cli
for argv in (["--help"], ["train", "--help"], ["--version"], ["trian"], ["plan"]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        with contextlib.suppress(SystemExit):
            cli.main(argv)
heavy = {"torch", "numpy", "matplotlib", "transformers"} & set(sys.modules)
sys.exit(f"imported: {heavy}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
