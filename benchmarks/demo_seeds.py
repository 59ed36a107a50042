"""Run the demo recipe with several seeds and write results/demo: JSON, CSV, PNG.

    python benchmarks/demo_seeds.py --seeds 3

All numbers on the demo in the README come from here. A seed changes initial weights, data order and
sampled loops; corpus, split and tokenizer stay the same. `--set` changes the recipe, as in
`openmythos train`; the demo with LoRA per loop instead of an embedding of the loop is

    python benchmarks/demo_seeds.py --seeds 3 --out results/demo-lora --set \\
        model.loop_embedding=none model.loop_lora=lora model.loop_lora.rank=4 \\
        model.loop_lora.num_loops=8
"""

import argparse
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from openmythos.analysis import plots
from openmythos.cli.commands import DEMO_LOOPS as LOOPS
from openmythos.config import apply_overrides, to_dict
from openmythos.files import write_json
from openmythos.machine import describe, keep_freed_memory
from openmythos.recipes import catalogue, report
from openmythos.train.config import RunConfig
from openmythos.train.run import Run, train


def run_seed(config: RunConfig, seed: int) -> dict[str, object]:
    """Train and evaluate one seed in a temporary run folder."""
    config = replace(config, train=replace(config.train, seed=seed))
    with tempfile.TemporaryDirectory() as folder:
        run = Run.create(Path(folder) / "run", config)
        started = time.perf_counter()
        speeds = [metrics.tokens_per_second for metrics in train(run)]
        seconds = time.perf_counter() - started
        found = report.evaluate(run, LOOPS)
    print(f"seed {seed}: {seconds:.0f} s, {found.bits_per_byte}", flush=True)
    return {
        "seed": seed,
        "training_seconds": round(seconds, 1),
        "tokens_per_second_median": round(statistics.median(speeds)),
        "held_out": {str(loop): asdict(result) for loop, result in found.loops.items()},
        "compressors_bits_per_byte": dict(found.compressors),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/demo"))
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="changes")
    options = parser.parse_args()
    config = apply_overrides(catalogue.get("demo"), options.changes)
    keep_freed_memory()
    machine = describe()
    runs = [run_seed(config, seed) for seed in range(options.seeds)]
    curves = {
        f"seed {run['seed']}": {loop: run["held_out"][str(loop)]["bits_per_byte"] for loop in LOOPS}
        for run in runs
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(
        {
            "command": shlex.join(["python", "benchmarks/demo_seeds.py", *sys.argv[1:]]),
            "config": to_dict(config),
            "hardware": machine,
            "threads": torch.get_num_threads(),
            "runs": runs,
        },
        options.out / "results.json",
    )
    figure = plots.loss_against_loops(
        curves,
        references=runs[0]["compressors_bits_per_byte"],
        trained_loops=float(config.train.loops.mean_loops),
    )
    rows = [
        {"seed": name.removeprefix("seed "), "num_loops": loop, "bits_per_byte": bits}
        for name, curve in curves.items()
        for loop, bits in curve.items()
    ]
    plots.save_figure(figure, options.out / "loops.png", rows)


if __name__ == "__main__":
    main()
