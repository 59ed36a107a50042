"""Time this project's model in two checkouts, taking turns: did a change make it slower?

    git worktree add ../before COMMIT
    python benchmarks/before_after.py ../before . --workload S --precision fp32 --rounds 11

Prints, for a training step, prefill and decoding at batch 1 and 8, the median times and the median
of the paired ratios after / before. Each checkout runs in a process of its own, on one thread.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

OPERATIONS = ("train", "prefill 1", "prefill 8", "decode 1", "decode 8")
PROMPT, ROOM, TOKENS = 512, 400, 20


def serve(root: Path, workload: str, precision: str) -> None:
    """Answer every operation's name on stdin with its seconds."""
    sys.path[:0] = [str(root / "src"), str(root / "benchmarks")]
    import torch
    from contenders import WORKLOADS, Ours

    from openmythos.machine import keep_freed_memory

    torch.set_num_threads(1)
    keep_freed_memory()
    chosen = WORKLOADS[workload]
    model: Any = Ours(chosen, precision)  # type: ignore[arg-type]
    model.start_training()
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Any:
        return torch.randint(0, chosen.config().vocab_size, shape, generator=generator)

    batch = draw(chosen.batch, chosen.seq)
    prompts = {number: draw(number, PROMPT) for number in (1, 8)}
    new = {number: draw(number, 1) for number in (1, 8)}

    def seconds(operation: str) -> float:
        kind, _, number = operation.partition(" ")
        cache = model.prefill(prompts[int(number)], ROOM) if kind == "decode" else None
        started = time.perf_counter()
        if kind == "train":
            model.train_step(batch, batch)
        elif kind == "prefill":
            model.prefill(prompts[int(number)], ROOM)
        else:
            for _ in range(TOKENS):
                model.decode(cache, new[int(number)])
        return time.perf_counter() - started

    for operation in OPERATIONS:
        seconds(operation)
    for line in sys.stdin:
        print(seconds(line.strip()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--workload", choices=("S", "M"), default="S")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.after, options.workload, options.precision)
        return
    shape = ("--workload", options.workload, "--precision", options.precision, "--serve")
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, ".", str(root.resolve()), *shape],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for root in (options.before, options.after)
    ]

    def ask(worker: Any, operation: str) -> float:
        worker.stdin.write(f"{operation}\n")
        worker.stdin.flush()
        return float(worker.stdout.readline())

    try:
        for operation in OPERATIONS:
            pairs = []
            for number in range(options.rounds):
                order = workers if number % 2 == 0 else workers[::-1]
                taken = [ask(worker, operation) for worker in order]
                pairs.append(taken if number % 2 == 0 else taken[::-1])
            before, after = (1e3 * statistics.median(x) for x in zip(*pairs, strict=True))
            ratio = statistics.median(b / a for a, b in pairs)
            print(f"{operation:10} {before:9.1f} ms {after:9.1f} ms  {ratio:.3f}", flush=True)
    finally:
        for worker in workers:
            worker.kill()


if __name__ == "__main__":
    main()
