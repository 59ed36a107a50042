"""What the benchmarks ask of the machine that they run on."""

import re
from pathlib import Path

import torch

from openmythos.machine import bf16_is_native

_CPU = torch.device("cpu")


def processor_kind(device: torch.device = _CPU) -> str:
    """The instructions that torch uses on a CPU, such as avx512-bf16, or the name of a GPU.

    A GPU's name is cut after its number: "NVIDIA H100 80GB HBM3" is h100.
    """
    if device.type == "cuda":
        return gpu_kind(torch.cuda.get_device_name(device))
    return torch.backends.cpu.get_cpu_capability().lower() + "-bf16" * bf16_is_native()


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
