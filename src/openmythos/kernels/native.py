"""Builds a C++ kernel with the system's compiler at first use, and loads it.

The library is kept in the user's cache folder, under a name that depends on source, compiler, flags
and CPU. Without a compiler the caller computes with torch.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import secrets
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from openmythos.machine import cache_folder, cpu_features, mark_used

LOGGER = logging.getLogger(__name__)
SOURCES = Path(__file__).parent
# The compiler takes some 3 s; a file system or machine that hangs must not hang the decoder.
_TIMEOUT = 120.0
_ARM = ("arm64", "aarch64")
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-ffp-contract=off", "-shared", "-fPIC")
THIS_CPU = ("-mcpu=native" if platform.machine() in _ARM else "-march=native",)


class BuildError(RuntimeError):
    """The library could not be built; the message says why."""


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """The kernel NAME.cpp for this machine, built if need be; None, after a log line, if not."""
    try:
        return ctypes.CDLL(str(build(name, cache_folder())))
    except (BuildError, OSError) as error:
        LOGGER.info("torch's operators are used, not the native kernel %s: %s", name, error)
        return None


def unseen() -> bool:
    """Whether torch.func or a mode that counts or replaces operators is active.

    Neither sees a native call.
    """
    return torch._C._are_functorch_transforms_active() or bool(torch._C._len_torch_dispatch_stack())


def build(name: str, folder: Path, cpu: Sequence[str] = THIS_CPU) -> Path:
    """The library in `folder`, compiled for `cpu` unless it is there; a BuildError says why not.

    Processes may build at the same time: each writes to a name of its own and renames.
    """
    source, header = SOURCES / f"{name}.cpp", SOURCES / "vectors.h"
    if not (source.is_file() and header.is_file()):
        raise BuildError("its source is not installed")
    compiler = _compiler()
    command = (compiler, *FLAGS, *cpu)
    version = _run((compiler, "--version"))
    texts = (path.read_text(encoding="utf-8") for path in (source, header))
    parts = ("\n".join(command), version, cpu_features(), *texts)
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    target = folder / f"{name}-{key}.so"
    if target.is_file():
        mark_used(target)
        return target
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{target.name}.{secrets.token_hex(4)}.tmp"
    try:
        _run((*command, "-o", str(temporary), str(source)))
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _compiler() -> str:
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        raise BuildError("there is no C++ compiler (c++, g++, clang++ or $CXX)")
    return found


def _run(command: Sequence[str]) -> str:
    """Standard output of a command; a BuildError if it fails."""
    try:
        return subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=_TIMEOUT
        ).stdout
    except subprocess.CalledProcessError as error:
        said = (error.stderr or "").strip().splitlines()
        raise BuildError(f"{command[0]} failed: {said[0] if said else error}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} failed: {error}") from error
