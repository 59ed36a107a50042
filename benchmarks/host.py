"""What the benchmarks ask of the machine that they run on."""

import os
import re
import sys
from pathlib import Path

import torch

from openmythos.machine import bf16_is_native

_CPU = torch.device("cpu")


# Keeps torch, oneDNN, MKL and the native kernel from using AVX-512.
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "CXX": str(Path(__file__).with_name("avx2-c++")),
}


def command_line() -> str:
    """The command that runs this program, without the folder that it writes to."""
    given = sys.argv[1:]
    if "--out" in given:
        at = given.index("--out")
        given = given[:at] + given[at + 2 :]
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *given])


def emulates_avx2() -> bool:
    return AVX2.items() <= os.environ.items()


def emulate_avx2() -> None:
    """Start this program anew as on a processor with AVX2 only; nothing if it was."""
    if not emulates_avx2():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **AVX2})


def processor_kind(device: torch.device = _CPU) -> str:
    """The instructions that torch uses on a CPU, such as avx512-bf16, or the name of a GPU.

    avx512-amx has bf16, too. A GPU's name is cut after its number: "NVIDIA H100 80GB HBM3" is h100.
    """
    if device.type == "cuda":
        return gpu_kind(torch.cuda.get_device_name(device))
    widest = torch.backends.cpu.get_cpu_capability().lower()
    if widest == "avx512" and torch.cpu._is_amx_tile_supported():
        return "avx512-amx"
    return widest + "-bf16" * computes_bf16(_CPU)


def computes_bf16(device: torch.device) -> bool:
    """Whether a device computes bf16 natively; a processor that AVX2 is emulated on need not."""
    return bf16_is_native(device) and not emulates_avx2()


def gpu_kind(name: str) -> str:
    words = re.split(r"[ -]", name.lower())
    words = words[1:] if words[0] in ("nvidia", "amd") else words
    number = next((place for place, word in enumerate(words) if re.search(r"\d", word)), len(words))
    return "-".join(words[: number + 1])


def peak_bytes() -> int:
    """Peak resident memory of this process (Linux).

    ru_maxrss is not used, because a new process inherits it from its parent.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
