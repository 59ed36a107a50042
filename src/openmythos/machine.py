"""Host utilities: malloc settings, what the CPU can do, hardware description for result files."""

import contextlib
import ctypes
import functools
import math
import os
import platform
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal

import torch

from openmythos.config import ConfigError, require

_HUGE_PAGE = 2 << 20
# From linux/mman.h and glibc's malloc.h.
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20
# Of oneDNN, and of torch's layer above it.
_PRODUCT_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
# Width of the matrix product that tests whether bf16 is fast. For width 128, a CPU that emulates
# bf16 takes 15 ms, and fp32 takes 0.05 ms (Zen 3, one core).
_PROBE_WIDTH = {"cpu": 128}
# bf16 counts as native if its product takes at most this many times as long as in fp32. At this
# width the factor is 1 to 2 for native bf16 (0.5 at large widths) and hundreds for emulated bf16.
_NATIVE_AT_MOST = 6.0
_PEAK_WIDTHS = {"cpu": (128, 256, 512, 1024, 2048), "accelerator": (1024, 2048, 4096, 8192)}
_CPU = torch.device("cpu")
Precision = Literal["bf16", "fp32"]
PRECISIONS = ("bf16", "fp32", "auto")


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensor instead of returning it to the system.

    Every training step allocates and frees the same large buffers; mapping and zeroing their pages
    each time costs a tenth of a step or more. Does nothing without glibc, or if
    MALLOC_MMAP_THRESHOLD_ is set in the environment.
    """
    if sys.platform != "linux" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def bound_product_caches() -> None:
    """Let torch keep few compiled products of matrices; to be called before the first product.

    On a CPU with bf16 instructions torch's library for such products, oneDNN, compiles code for
    every shape that it meets, about 0.5 MB each, and torch's layer above it keeps that, too. The
    default is 1024 shapes in each, so that a process that meets many shapes, such as a server with
    prompts of any length, grows by 500 MB. Variables that are set already are left alone.
    """
    for name in _PRODUCT_CACHES:
        os.environ.setdefault(name, "128")


def use_huge_pages(address: int, nbytes: int) -> None:
    """Map memory in pages of 2 MiB, as far as it covers such pages, where Linux allows that.

    Reading large matrices then waits less for the translation of addresses.
    """
    start = -(-address // _HUGE_PAGE) * _HUGE_PAGE
    length = (address + nbytes) // _HUGE_PAGE * _HUGE_PAGE - start
    if length <= 0 or not _allows_huge_pages():
        return
    madvise = ctypes.CDLL(None).madvise
    for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):  # older systems refuse the second
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)


@functools.cache
def _allows_huge_pages() -> bool:
    try:
        setting = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:  # not Linux, or built without them
        return False
    return "[never]" not in setting


def cache_folder() -> Path:
    """Where compiled code is kept: $XDG_CACHE_HOME/openmythos, or the system's place for caches."""
    given = os.environ.get("XDG_CACHE_HOME")
    if given:
        return Path(given) / "openmythos"
    home = Path.home()
    return (home / "Library/Caches" if sys.platform == "darwin" else home / ".cache") / "openmythos"


def keep_recent(folder: Path, most_bytes: int = 2 << 30) -> None:
    """Delete the files of a cache folder that were not used for longest, if it holds more bytes."""
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another process may delete it
            stat = path.stat()
            found.append((stat.st_mtime, stat.st_size, path))
    total = 0
    for _, size, path in sorted(found, reverse=True):
        total += size
        if total > most_bytes:
            with contextlib.suppress(OSError):
                path.unlink()


def mark_used(path: Path) -> None:
    """Tell `keep_recent` that a file is in use; nothing if the folder cannot be written."""
    with contextlib.suppress(OSError):
        path.touch()


def cpu_features() -> str:
    """What the CPU can do: code compiled for one must not run on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("flags", "Features", "model name")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def fast_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the device computes it natively, else fp32."""
    return torch.bfloat16 if bf16_is_native(device) else torch.float32


def bf16_is_native(device: torch.device = _CPU) -> bool:
    """Whether a device computes bf16 natively; if not, torch emulates it.

    Native: CPUs with AVX512_BF16 or AMX, GPUs since Ampere. What torch reports is confirmed by
    timing a product, because settings such as ONEDNN_MAX_CPU_ISA can disable instructions.
    """
    return _has_bf16(device) and bf16_slowdown(device) <= _NATIVE_AT_MOST


def choose_precision(asked: str, device: torch.device) -> Precision:
    """Resolve "auto" to bf16 where it is native, else fp32; other names stay as they are."""
    require(asked in PRECISIONS, "precision", asked, f"must be one of {', '.join(PRECISIONS)}")
    is_bf16 = bf16_is_native(device) if asked == "auto" else asked == "bf16"
    return "bf16" if is_bf16 else "fp32"


def slow_precision(precision: Precision, device: torch.device) -> str | None:
    """A warning line if bf16 is emulated and more than twice as slow as fp32; else None."""
    if precision == "fp32" or bf16_is_native(device):
        return None
    times = bf16_slowdown(device)
    if times <= 2:
        return None
    return (
        f"warning: precision = bf16 is emulated on this {device.type}: a product takes "
        f"{times:.0f} times as long as in fp32, which precision = auto would choose"
    )


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Autocast context to compute in a precision with fp32 weights; a null context for fp32."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


@functools.cache
def bf16_slowdown(device: torch.device) -> float:
    """Time of a small matrix product in bf16 / time in fp32; measured once per process.

    On a CPU with one thread: where other processes keep the cores busy, threads wait for each
    other, and fp32 on two looked a thousand times slower than it is (56 ms, not 0.05).
    """
    width = _PROBE_WIDTH.get(device.type, 1024)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        fp32, bf16 = (_product_seconds(device, x, width) for x in (torch.float32, torch.bfloat16))
    finally:
        torch.set_num_threads(threads)
    return bf16 / fp32


def _has_bf16(device: torch.device) -> bool:
    """Whether torch reports native bf16 arithmetic.

    False on MPS: torch does not say which Apple GPUs compute in bf16 and which convert.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def _product_seconds(
    device: torch.device, dtype: torch.dtype, width: int, most: float = 0.01
) -> float:
    """Seconds of the fastest of 3 to 20 square products; stops when `most` seconds are spent."""
    # Not all ones: they take less power, so a GPU would be faster than with real data.
    x = torch.linspace(-1, 1, width * width, device=device).view(width, width).to(dtype)
    product = torch.empty_like(x)
    best, begun = math.inf, time.perf_counter()
    for tried in range(1, 21):
        started = time.perf_counter()
        torch.mm(x, x, out=product)
        product[0, 0].item()
        ended = time.perf_counter()
        best = min(best, ended - started)
        if tried >= 3 and ended - begun > most:
            break
    return best


def devices() -> tuple[str, ...]:
    """The devices of this machine: the CPU and every accelerator, such as "cuda:0"."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return ("cpu",)
    numbers = range(torch.accelerator.device_count())
    return ("cpu", *(f"{accelerator.type}:{number}" for number in numbers))


def choose_device(name: str | torch.device = "auto", field: str = "device") -> torch.device:
    """The device of that name; "auto" is the accelerator if there is one, else the CPU.

    An accelerator without a number gets this process's local rank. A device that does not exist
    raises a ConfigError that names `field` and lists the devices.
    """
    present = devices()
    kinds = dict.fromkeys(device.partition(":")[0] for device in present)
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
    if device is None or str(device) not in present:
        allowed = ", ".join(dict.fromkeys(("auto", *kinds, *present)))
        raise ConfigError(f"{field} = {str(name)!r}: must be one of {allowed} on this machine")
    return device


def seed_device(seed: int, device: torch.device) -> None:
    """Seed the global generators of the CPU and of a device.

    torch.manual_seed also asks every other backend, which takes a millisecond.
    """
    torch.default_generator.manual_seed(seed)
    if device.type not in ("cpu", "meta"):
        torch.get_device_module(device).manual_seed(seed)


def describe() -> dict[str, str | int | bool | None]:
    """Commit and hardware, for result files; call it before the work, in case HEAD moves.

    The commit is that of the code that runs, wherever it is called from; "unknown" outside of a
    checkout. "dirty": whether the package differs from it.
    """
    checked_out = _git("ls-files", Path(__file__).name)  # else the repository is somebody else's
    commit = _git("rev-parse", "HEAD") if checked_out else ""
    changes = _git("status", "--porcelain", "--", ".") if checked_out else ""
    return {
        "commit": commit or "unknown",
        "dirty": bool(changes),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bf16_is_native": bf16_is_native(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _git(*words: str) -> str:
    """What a git command prints in the package's folder; nothing where there is no git."""
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def device_name(device: torch.device) -> str:
    """Its name; of a processor, also the instructions that torch uses: "Xeon (AVX512)"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()} ({torch.backends.cpu.get_cpu_capability()})"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """`measure_matmul_peak`, once in a process for each number of threads."""
    return _peak_with(device, dtype, torch.get_num_threads())


@functools.cache
def _peak_with(device: torch.device, dtype: torch.dtype, _num_threads: int) -> float:
    return measure_matmul_peak(device, dtype)


def measure_matmul_peak(device: torch.device, dtype: torch.dtype, budget: float = 0.15) -> float:
    """Peak FLOP/s of square matrix products with the current number of threads.

    Tries larger and larger widths for about `budget` seconds: small products do not reach the peak.
    """
    best, spent = 0.0, 0.0
    for width in _PEAK_WIDTHS["cpu" if device.type == "cpu" else "accelerator"]:
        started = time.perf_counter()
        seconds = _product_seconds(device, dtype, width, most=0.1 * budget)
        spent += time.perf_counter() - started
        best = max(best, 2 * width**3 / seconds)
        if spent + 3 * 8 * seconds > budget:
            break
    return best
