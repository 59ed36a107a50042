"""What a looped cache holds and what sharing it costs; writes results/cache.

    python benchmarks/cache.py --seeds 3

Bytes: presets at 16 loops, compared with multi-head keys and values at the same effective depth.
Loss: the demo model is trained with each seed, then scored on held-out text token by token with
each cache policy. The first half of each window is the prompt.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from figures import cost_lines
from host import command_line
from rich.console import Console
from rich.table import Table

from openmythos import presets
from openmythos.analysis import plots
from openmythos.config import to_dict
from openmythos.eval.likelihood import decoded_loss
from openmythos.files import write_json
from openmythos.machine import describe, keep_freed_memory
from openmythos.nn.cache import (
    CachePolicy,
    ExactCache,
    FirstLoopCache,
    GroupedLoopCache,
    LastLoopCache,
)
from openmythos.planning import cost
from openmythos.recipes import catalogue
from openmythos.studies.statistics import mean_and_half_width
from openmythos.train.run import Run, train

PRESETS = ("1b", "3b", "10b", "50b", "100b", "500b", "1t")
LOOPS = 16
EVALUATED_LOOPS = 8
POLICIES: dict[str, CachePolicy] = {
    "exact": ExactCache(),
    "groups of 2": GroupedLoopCache(group=2),
    "groups of 4": GroupedLoopCache(group=4),
    "last loop": LastLoopCache(),
    "first loop": FirstLoopCache(),
}
WINDOWS, WINDOW = 64, 256
OUT = Console(highlight=False, markup=False)


def sizes() -> list[dict[str, Any]]:
    """Cache bytes per token in bf16: in total, and of the recurrent block."""
    rows = []
    for name in PRESETS:
        config = presets.get(name)
        depth = config.effective_depth(LOOPS)
        full = 2 * config.dim * 2 * depth  # keys and values of every head, two bytes each
        exact, shared = (
            cost.cache_bytes(config, context=1, num_loops=LOOPS, policy=policy)
            for policy in (ExactCache(), LastLoopCache())
        )
        outer = (config.prelude_layers + config.coda_layers) * config.attention.kv_width(config.dim)
        rows.append(
            {
                "preset": name,
                "layers_executed": depth,
                "full_multi_head": full,
                "exact": exact,
                "shared": shared,
                "exact_ratio": full / exact,
                "shared_ratio": exact / shared,
                "total_ratio": full / shared,
                "recurrent_shared_ratio": (exact - 2 * outer) / (shared - 2 * outer),
            }
        )
    return rows


def trained_losses(seed: int) -> dict[str, float]:
    """Train the demo model with this seed; returns nats per token for every cache policy."""
    recipe = catalogue.get("demo")
    recipe = replace(recipe, train=replace(recipe.train, seed=seed))
    with tempfile.TemporaryDirectory() as folder:
        run = Run.create(Path(folder) / "run", recipe)
        for metrics in train(run):
            if metrics.step % 50 == 0:
                OUT.print(f"seed {seed}: step {metrics.step}, loss {metrics.loss:.3f}")
        model, shards = run.load_model(), run.shards("held_out")
        return {
            name: decoded_loss(
                model, shards, policy, num_loops=EVALUATED_LOOPS, window=WINDOW, windows=WINDOWS
            )
            for name, policy in POLICIES.items()
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/cache"))
    options = parser.parse_args()
    keep_freed_memory()
    machine = describe()
    rows = sizes()
    table = Table("preset", "full K/V", "exact", "less", "loops share", "less", "of the block")
    for row in rows:
        table.add_row(
            row["preset"],
            *(f"{row[key] / 1024:.0f} KiB" for key in ("full_multi_head", "exact")),
            f"{row['exact_ratio']:.1f}x",
            f"{row['shared'] / 1024:.0f} KiB",
            f"{row['shared_ratio']:.1f}x",
            f"{row['recurrent_shared_ratio']:.0f}x",
        )
    OUT.print(table)
    losses = [trained_losses(seed) for seed in range(options.seeds)]
    costs = {}
    for name in POLICIES:
        mean, half = mean_and_half_width([run[name] - run["exact"] for run in losses])
        costs[name] = {"added_nats_per_token": mean, "half_width_95": half}
        OUT.print(f"{name}: {mean:+.4f} +- {half:.4f} nats per token")
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(
        {
            "command": command_line(),
            "hardware": machine,
            "bytes_per_token_at_16_loops": rows,
            "recipe": to_dict(catalogue.get("demo")),
            "evaluated_loops": EVALUATED_LOOPS,
            "scored": f"{WINDOWS} windows of {WINDOW} tokens, second halves",
            "nats_per_token": [{"seed": seed, **run} for seed, run in enumerate(losses)],
            "added_by_policy": costs,
        },
        options.out / "cache.json",
    )
    panels = {
        "preset": {
            label: {index: row[key] / 1024 for index, row in enumerate(rows)}
            for label, key in (
                ("full multi-head K/V", "full_multi_head"),
                ("latent, exact", "exact"),
                ("latent, loops share a slot", "shared"),
            )
        }
    }
    figure = cost_lines(
        panels, y_labels=("KiB per token, 16 loops",), x_names=PRESETS, logarithmic=True
    )
    plots.save_figure(figure, options.out / "cache.png", rows)


if __name__ == "__main__":
    main()
