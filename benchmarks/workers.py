"""Processes that run one contender each and answer with seconds and bytes.

Contenders do not share an allocator, a compilation cache in memory, or a thread pool.
"""

import contextlib
import multiprocessing
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import Any

import torch
from contenders import Contender, S, SkippedError, Workload, with_shape
from host import peak_bytes
from limits import PROMPT, clock_of
from roster import CONTENDERS

from openmythos.machine import keep_freed_memory

ROOM = 256  # new tokens that a cache has room for after the prompt
PREFILL_ROWS = (1, 8)
DECODE_ROWS = {"cpu": (1, 8), "cuda": (1, 8, 64)}


def figure_names(device: torch.device) -> list[str]:
    """What is measured by default; fewer figures on a GPU, where each one is compiled."""
    first = ["training step", "prefill, batch 8"]
    if device.type == "cpu":
        first = ["forward", "training step", *(f"prefill, batch {rows}" for rows in PREFILL_ROWS)]
    return [*first, *(f"decode, batch {rows}" for rows in DECODE_ROWS[device.type])]


def measures(
    workload: Workload, device: torch.device
) -> dict[str, Callable[[Contender], Callable[[], object]]]:
    """For each figure, a function that prepares a contender and returns the function to time."""
    generator = torch.Generator().manual_seed(0)

    def tokens(batch: int, seq: int) -> torch.Tensor:
        return torch.randint(workload.vocab, (batch, seq), generator=generator).to(device)

    batch, targets = (tokens(workload.batch, workload.seq) for _ in range(2))
    rows = DECODE_ROWS[device.type]
    prompts = {size: tokens(size, PROMPT) for size in {*PREFILL_ROWS, *rows}}

    def training(contender: Contender) -> Callable[[], object]:
        contender.start_training()
        return lambda: contender.train_step(batch, targets)

    def without_grad(contender: Contender, run: Callable[[], object]) -> Callable[[], object]:
        contender.model.eval()
        return contender.inference()(run)

    def prefill(size: int) -> Callable[[Contender], Callable[[], object]]:
        return lambda c: without_grad(c, lambda: c.prefill(prompts[size], ROOM))

    def decoding(size: int) -> Callable[[Contender], Callable[[], object]]:
        def prepare(contender: Contender) -> Callable[[], object]:
            contender.model.eval()
            with contender.inference():
                cache = contender.prefill(prompts[size], ROOM)
            return without_grad(contender, lambda: contender.decode(cache, prompts[size][:, :1]))

        return prepare

    return {
        "forward": lambda c: without_grad(c, lambda: c.forward(batch)),
        "training step": training,
        **{f"prefill, batch {size}": prefill(size) for size in PREFILL_ROWS},
        **{f"decode, batch {size}": decoding(size) for size in rows},
    }


def as_installed(name: str) -> None:
    """Malloc settings as a user of that contender has them."""
    if name.startswith("openmythos"):
        keep_freed_memory()


class Worker:
    """A contender and the figure that it is prepared for."""

    def __init__(
        self, workload: Workload, name: str, threads: int, device: torch.device, tf32: bool
    ) -> None:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        as_installed(name)
        self.device, self.clock = device, clock_of(device, threads)
        self.contender = CONTENDERS[name](workload)
        self.contender.to(device)
        self.figures = measures(workload, device)
        self.run: Callable[[], object] = lambda: None

    def prepare(self, figure: str) -> bool:
        """Whether the contender is timed for this figure."""
        if not figure.startswith(self.contender.figures):
            return False
        self.run = lambda: None  # frees the cache of the figure before
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        self.run = self.figures[figure](self.contender)
        return True

    def time(self, calls: int) -> list[float]:
        """Seconds of each of several calls in a row, after one that is not timed.

        That one brings weights into the processor's cache, or refills a GPU's allocator. A single
        call is long, and timed alone.
        """
        if calls > 1:
            self.call()
        return [self.call() for _ in range(calls)]

    def call(self) -> float:
        """Seconds of one call, until the device has finished it."""
        started = self.clock()
        self.run()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock() - started

    def start(self) -> None:
        """Do nothing: an answer says that the process has built its model."""

    def peak_megabytes(self) -> float:
        """Largest sum of all tensors on the GPU since the figure was prepared, in MiB."""
        return torch.cuda.max_memory_allocated(self.device) / 2**20

    def release(self) -> None:
        """Return unused GPU memory, which other contenders need in their turn."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def cache_bytes_per_token(self, seq: int) -> float:
        self.contender.model.eval()
        with self.contender.inference():
            held = self.contender.prefill(
                torch.zeros(1, seq, dtype=torch.long, device=self.device), 0
            )
        return self.contender.cache_bytes(held) / seq


def serve(pipe: Connection, *worker_arguments: Any) -> None:
    """Run methods of a Worker by name as they are asked for, until the pipe is closed."""
    worker: Worker | None = None
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        try:
            worker = worker or Worker(*worker_arguments)
            pipe.send((True, getattr(worker, method)(*arguments)))
        except (SkippedError, ImportError) as error:
            pipe.send((False, str(error)))
        except Exception as error:
            traceback.print_exc()
            first_line = (str(error).strip().splitlines() or [""])[0]
            pipe.send((False, f"{type(error).__name__}: {first_line}"))


class Team:
    """One process per contender; they end with the `with` block."""

    def __init__(
        self,
        workload: Workload,
        names: Iterable[str],
        threads: int,
        device: torch.device,
        tf32: bool,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: dict[str, Connection] = {}
        self._processes = []
        for name in names:
            self._pipes[name], far_end = context.Pipe()
            arguments = (far_end, workload, name, threads, device, tf32)
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            far_end.close()  # so that recv raises if the process dies
            self._processes.append(process)

    def ask(
        self, names: Iterable[str], method: str, *arguments: object, together: bool = False
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Call a method of some workers: (what they return, why others failed), by name.

        One after the other, unless `together`.
        """
        answers, failures, asked = {}, {}, list(names)
        for name in asked if together else ():
            self._order(name, method, *arguments)
        for name in asked:
            try:
                if not together:
                    self._order(name, method, *arguments)
                fine, value = self._pipes[name].recv()
            except (EOFError, OSError):
                fine, value = False, "its process ended"
            (answers if fine else failures)[name] = value
        return answers, failures

    def _order(self, name: str, method: str, *arguments: object) -> None:
        with contextlib.suppress(OSError):  # its process has ended, which recv reports
            self._pipes[name].send((method, arguments))

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes.values():
            pipe.close()
        for process in self._processes:  # no other process while the next workload is measured
            process.join()


def resident_megabytes(workload: Workload, name: str) -> float | None:
    """Peak memory in MiB that model, optimizer and three steps add to this process (CPU).

    None if the contender does not train.
    """
    torch.set_num_threads(1)
    as_installed(name)
    # A small model first: libraries and kernels that any training step loads do not count.
    small = CONTENDERS[name](with_shape(S, batch=1, seq=64))
    if "training" not in small.figures:
        return None
    small.start_training()
    small.train_step(*torch.zeros(2, 1, 64, dtype=torch.long))
    del small
    before = peak_bytes()
    contender = CONTENDERS[name](workload)
    contender.start_training()
    tokens = torch.randint(workload.vocab, (workload.batch, workload.seq))
    for _ in range(3):
        contender.train_step(tokens, tokens)
    return (peak_bytes() - before) / 2**20
