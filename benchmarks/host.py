"""What the benchmarks ask of the machine that they run on."""

from pathlib import Path

import torch

from openmythos.machine import bf16_is_native


def processor_kind() -> str:
    """The CPU instructions that torch's kernels use: avx2, avx512, avx512-bf16 ..."""
    return torch.backends.cpu.get_cpu_capability().lower() + "-bf16" * bf16_is_native()


def peak_bytes() -> int:
    """Peak resident memory of this process (Linux).

    ru_maxrss is not used, because a new process inherits it from its parent.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
