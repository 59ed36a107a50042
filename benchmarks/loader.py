"""How much of a training step is spent waiting for its batch; writes results/scale/loader.json.

    python benchmarks/loader.py --steps 4

Runs the recipe `small` on Python's source code: after a warmup step, --steps training steps and the
time of `Loader.batch` in each. The loader is also timed alone, over many more steps.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from host import command_line
from rich.console import Console

from openmythos.config import to_dict
from openmythos.data.loader import Batch, BatchSource, Loader
from openmythos.files import write_json
from openmythos.machine import describe, keep_freed_memory
from openmythos.model.mythos import OpenMythos
from openmythos.recipes import catalogue
from openmythos.train.config import RunConfig
from openmythos.train.run import Run
from openmythos.train.trainer import Trainer

OUT = Console(highlight=False, markup=False)


class Timed(Loader):
    """Wraps a loader and records the seconds that each batch takes."""

    def __init__(self, loader: BatchSource) -> None:
        vars(self).update(vars(loader))
        self.seconds: list[float] = []

    def batch(self, step: int) -> Batch:
        started = time.perf_counter()
        batch = super().batch(step)
        self.seconds.append(time.perf_counter() - started)
        return batch


def measure(recipe: RunConfig, steps: int, batches: int) -> dict[str, Any]:
    """Seconds per step and per batch of a recipe, and the loader's share of the step time."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run.create(Path(folder) / "run", recipe)
        config = run.config.train
        timed = Timed(run.source())
        model = OpenMythos(run.config.model, seed=config.seed)
        stepping = Trainer(model, timed, config).steps()
        whole = []
        for _ in range(steps + 1):
            started = time.perf_counter()
            next(stepping)
            whole.append(time.perf_counter() - started)
        alone = Timed(run.source())
        for step in range(batches):
            alone.batch(step)
    tokens = config.batch_size * config.seq_len
    return {
        "step_seconds": whole[1:],
        "batch_seconds": timed.seconds[1:],
        "share": sum(timed.seconds[1:]) / sum(whole[1:]),
        "alone_median_seconds": statistics.median(alone.seconds),
        "alone_tokens_per_second": tokens / statistics.median(alone.seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batches", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("results/scale"))
    options = parser.parse_args()
    keep_freed_memory()
    machine = describe()
    recipe = catalogue.get("small")
    found = measure(recipe, options.steps, options.batches)
    mean = statistics.mean(found["step_seconds"])
    OUT.print(
        f"loader: {found['share']:.4%} of a step of {mean:.2f} s; "
        f"alone {found['alone_tokens_per_second'] / 1e6:.1f} million tokens per second"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(
        {
            "command": command_line(),
            "hardware": machine,
            "threads": torch.get_num_threads(),
            "recipe": to_dict(recipe),
            **found,
        },
        options.out / "loader.json",
    )


if __name__ == "__main__":
    main()
