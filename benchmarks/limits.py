"""What a machine can do at most, and the time that a figure needs at least on it."""

import statistics
import time
from collections.abc import Callable

import torch
from contenders import Workload
from host import computes_bf16

from openmythos.machine import measure_matmul_peak
from openmythos.nn.cache import ExactCache
from openmythos.planning import cost

PROMPT = 512
_CPU = torch.device("cpu")


def clock_of(device: torch.device, threads: int) -> Callable[[], float]:
    """The clock of a measurement, in seconds.

    One thread of a CPU is timed by the process's CPU time, which does not run while another program
    has the core; everything else by the wall clock.
    """
    return time.process_time if device.type == "cpu" and threads == 1 else time.perf_counter


def median_seconds(
    run: Callable[[], object], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    taken = []
    for _ in range(rounds):
        started = clock()
        run()
        taken.append(clock() - started)
    return statistics.median(taken)


def machine_limits(threads: int, with_bf16: bool, device: torch.device) -> dict[str, float]:
    """Matmul peaks in FLOP/s and memory bandwidth in byte/s, at this number of CPU threads.

    On a GPU also "tf32", the peak of fp32 products whose factors are rounded to TF32.
    """
    torch.set_num_threads(threads)
    return (
        _gpu_limits(device)
        if device.type == "cuda"
        else _cpu_limits(with_bf16, clock_of(device, threads))
    )


def _cpu_limits(with_bf16: bool, clock: Callable[[], float]) -> dict[str, float]:
    found = {}
    dtypes = {"fp32": torch.float32}
    if computes_bf16(_CPU) or with_bf16:
        dtypes["bf16"] = torch.bfloat16
    for kind, dtype in dtypes.items():
        rates = []
        for m, k, n in ((1024, 1024, 1024), (2048, 256, 1024), (2048, 512, 512)):
            a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
            rounds = 30 if kind == "fp32" or computes_bf16(_CPU) else 1
            seconds = median_seconds(lambda a=a, b=b: a @ b, rounds, clock)
            rates.append(2 * m * k * n / seconds)
        found[kind] = max(rates)
    large = torch.zeros(64 << 20)
    found["bandwidth"] = large.nbytes / median_seconds(large.sum, 9, clock)
    return found


def _gpu_limits(device: torch.device) -> dict[str, float]:
    found, kept = {}, torch.get_float32_matmul_precision()
    kinds = {"fp32": ("highest", torch.float32), "tf32": ("high", torch.float32)}
    for kind, (precision, dtype) in (*kinds.items(), ("bf16", (kept, torch.bfloat16))):
        torch.set_float32_matmul_precision(precision)
        found[kind] = measure_matmul_peak(device, dtype, budget=0.5)
    torch.set_float32_matmul_precision(kept)
    large = torch.zeros(256 << 20, device=device)
    seconds = median_seconds(lambda: large.sum().item(), 9)
    found["bandwidth"] = large.nbytes / seconds
    return found


def bound_seconds(
    workload: Workload,
    figure: str,
    limits: dict[str, float],
    peak: str,
    size: int,
    *,
    reread: bool = False,
) -> float:
    """Lower bound of the time on this machine: the larger of arithmetic and memory traffic.

    `peak` names the limit of arithmetic; weights and cache take `size` bytes a number. Traffic
    counts for decoding only; `reread` is the reading of `decode_bytes`.
    """
    config, loops, moved = workload.config(), workload.loops, 0.0
    if figure.startswith("decode"):
        count = int(figure.split()[-1])
        # A new token attends to all keys, twice the mean over a causal forward pass.
        per_token = float(cost.Flops(config, 2 * PROMPT).forward(loops))
        moved = decode_bytes(workload, count, size, reread=reread)
    elif figure.startswith("prefill"):
        count = int(figure.split()[-1]) * PROMPT
        per_token = cost.Flops(config, PROMPT).forward(loops)
    else:
        count, flops = workload.batch * workload.seq, cost.Flops(config, workload.seq)
        per_token = flops.training(loops) if figure == "training step" else flops.forward(loops)
    return max(count * per_token / limits[peak], moved / limits["bandwidth"])


def decode_bytes(workload: Workload, rows: int, size: int, *, reread: bool) -> float:
    """Bytes of weights and cache that a decoded token of every row needs, `size` bytes a number.

    Without `reread`, the looped layers stay in the processor's cache: one reading for all loops,
    which all choose the same experts. With it, every loop reads from memory again. Rows choose
    their experts independently of each other.
    """
    parameters, w = cost.parameters(workload.config()), workload
    drawn = w.experts * (1 - (1 - w.top_k / w.experts) ** rows)
    once = parameters.total - parameters.recurrent + parameters.loop_lora  # one delta per loop
    looped = parameters.total - once - parameters.routed_experts * (1 - drawn / w.experts)
    cache = (
        cost.cache_bytes(
            w.config(), context=PROMPT, batch=rows, num_loops=w.loops, policy=ExactCache()
        )
        // torch.bfloat16.itemsize
    )
    return size * (once + looped * (w.loops if reread else 1) + cache)
