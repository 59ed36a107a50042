"""Host utilities: malloc settings, what the CPU can do, hardware description for result files."""

import ctypes
import functools
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

from openmythos.config import ConfigError

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensor instead of returning it to the system.

    A training step frees and takes the same large buffers over and over; having the system map
    and clear them anew costs a tenth of a step and more. Does nothing where there is no glibc, or
    where the environment sets MALLOC_MMAP_THRESHOLD_ to something else.
    """
    if sys.platform != "linux" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


@functools.cache
def bf16_is_native() -> bool:
    """Whether the CPU has bf16 arithmetic (AVX512_BF16, AMX); without it bf16 is emulated.

    Timed, since the flags of a processor say nothing of the kernels: emulated products take some
    hundred times as long as those in fp32, native ones about as long or less.
    """
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(96, 96, dtype=dtype)
        times = []
        for _ in range(4):  # the first one may build its kernel
            started = time.perf_counter()
            torch.mm(x, x)
            times.append(time.perf_counter() - started)
        seconds[dtype] = min(times)
    return seconds[torch.bfloat16] < 8 * seconds[torch.float32]


def processor_kind() -> str:
    """The instructions that torch's kernels use here, such as avx2, avx512 or avx512-bf16."""
    return torch.backends.cpu.get_cpu_capability().lower() + "-bf16" * bf16_is_native()


def devices() -> tuple[str, ...]:
    """The devices that are there: the CPU and every accelerator, such as "cuda:0"."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return ("cpu",)
    numbers = range(torch.accelerator.device_count())
    return ("cpu", *(f"{accelerator.type}:{number}" for number in numbers))


def choose_device(name: str | torch.device = "auto", field: str = "device") -> torch.device:
    """The device of that name; "auto" is the accelerator if there is one, else the CPU.

    Of several accelerators, one without a number is that of this process' rank on the machine. A
    device that is not there raises a ConfigError that names `field`.
    """
    there = devices()
    kinds = dict.fromkeys(device.partition(":")[0] for device in there)
    if str(name) == "auto":
        name = list(kinds)[-1]
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is not None and device.type == "cpu":
        return torch.device("cpu")
    if device is not None and device.index is None:
        device = torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")))
    if device is None or str(device) not in there:
        allowed = ", ".join(dict.fromkeys(("auto", *kinds, *there)))
        raise ConfigError(f"{field} = {str(name)!r}: must be one of {allowed} on this machine")
    return device


def describe() -> dict[str, str | int | bool | None]:
    """Commit and hardware, to stand beside a result; ask before the work, whose code it names."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        names = (line for line in info.read_text().splitlines() if line.startswith("model name"))
        cpu = next((line.split(":")[1].strip() for line in names), cpu)
    return {
        "commit": commit.stdout.strip() or "unknown",
        "cpu": cpu,
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bf16_is_native": bf16_is_native(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of a large square product on a device, the best of a few."""
    size = 512 if device.type == "cpu" else 8192
    x = torch.ones(size, size, device=device, dtype=dtype)
    best = math.inf
    for _ in range(5):
        started = time.perf_counter()
        (x @ x)[0, 0].item()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def peak_bytes() -> int:
    """The most resident memory that this process ever held (Linux).

    Not ru_maxrss, which in a new process begins at the peak of the one that started it.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
