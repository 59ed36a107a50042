"""Two and four processes against one: messages of a step, losses of 20; writes results/scale.

    python benchmarks/ranks_together.py

A tiny model with experts in its recurrent layers. collectives.json counts calls of collectives (on
gloo) by number of loops, with all weights sharded and with expert parallelism. two-ranks.json has
the loss and gradient norm of every step.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "train")]
import torch.distributed as dist  # noqa: E402
from ranks import (  # noqa: E402
    MODEL,
    TRAIN,
    Collectives,
    all_steps,
    launch,
    trainer_of,
    write_text,
)

from openmythos.distributed.parallelize import Parallel  # noqa: E402
from openmythos.files import write_json  # noqa: E402
from openmythos.machine import describe  # noqa: E402
from openmythos.recurrence.loop_sampling import FixedLoops  # noqa: E402

LOOPS = (1, 2, 4, 8, 16)
KINDS = {"all_gathers": "allgather", "reduce_scatters": "reduce_scatter", "all_to_alls": "alltoall"}
SETTINGS = {
    "shards": TRAIN,
    "shards, loops recomputed": replace(TRAIN, checkpoint_loops=True),
    "experts = 2": replace(TRAIN, parallel=Parallel(experts=2)),
    "experts = 2, loops recomputed": replace(
        TRAIN, parallel=Parallel(experts=2), checkpoint_loops=True
    ),
}


def messages(folder: Path) -> dict[str, list[dict[str, int]]]:
    """Collectives called in one step, by setting and number of loops."""
    rows: dict[str, list[dict[str, int]]] = {}
    for name, setting in SETTINGS.items():
        for loops in LOOPS:
            config = replace(setting, loops=FixedLoops(mean_loops=loops))
            trainer = trainer_of(folder / "shards", MODEL, config)
            with Collectives() as found:
                trainer.run_step()
            counts = {kind: found.count(part) for kind, part in KINDS.items()}
            rows.setdefault(name, []).append({"loops": loops, **counts})
    return rows


TOGETHER = {
    2: {
        "shards": TRAIN,
        "shards, loops recomputed": replace(TRAIN, checkpoint_loops=True),
        "shards, last loop carries gradient": replace(TRAIN, backprop_loops=1),
        "experts = 2": replace(TRAIN, parallel=Parallel(experts=2)),
    },
    4: {
        "replicate = 2, shard = 2": replace(TRAIN, parallel=Parallel(replicate=2, shard=2)),
        "shard = 4, experts = 2": replace(TRAIN, parallel=Parallel(experts=2)),
    },
}


def steps(folder: Path) -> dict[str, list[dict[str, float]]]:
    """Losses and gradient norms of 20 steps for every setting of this world size."""
    found = {}
    for name, config in TOGETHER[dist.get_world_size()].items():
        metrics = all_steps(folder / "shards", MODEL, config)
        found[name] = [{"loss": m.loss, "gradient_norm": m.gradient_norm} for m in metrics]
    return found


def together(folder: Path) -> list[dict[str, Any]]:
    """Compare every setting with one process; includes the largest relative differences."""
    rows: list[dict[str, Any]] = []
    for ranks, settings in TOGETHER.items():
        for name, found in launch(ranks, steps, folder)[0].items():
            config = replace(settings[name], parallel=Parallel())
            alone = [
                {"loss": m.loss, "gradient_norm": m.gradient_norm}
                for m in all_steps(folder / "shards", MODEL, config)
            ]
            differences = {
                f"largest_difference_of_{key}": max(
                    abs(a[key] - b[key]) / abs(a[key]) for a, b in zip(alone, found, strict=True)
                )
                for key in ("loss", "gradient_norm")
            }
            rows.append(
                {"ranks": ranks, "setting": name, **differences, "steps": found, "alone": alone}
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/scale"))
    options = parser.parse_args()
    machine = describe()
    with tempfile.TemporaryDirectory() as name:
        write_text(Path(name))
        first, second = launch(2, messages, Path(name))
        rows = together(Path(name))
    assert first == second, "the ranks did not call the same collectives"
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {
        "machine": machine,
        "ranks": 2,
        "backend": "gloo",
        "recurrent_layers": MODEL.recurrent_layers,
        "messages_per_step": first,
    }
    write_json(found, options.out / "collectives.json")
    write_json({"machine": machine, "rows": rows}, options.out / "two-ranks.json")
    shown = Table("ranks", "setting", "largest difference of loss", "of gradient norm")
    for row in rows:
        largest = (f"{value:.1e}" for key, value in row.items() if key.startswith("largest"))
        shown.add_row(str(row["ranks"]), row["setting"], *largest)
    Console(highlight=False, markup=False).print(shown)
    table = Table("setting", "loops", *KINDS)
    for setting, rows in first.items():
        for row in rows:
            table.add_row(setting, *(str(number) for number in row.values()))
    Console(highlight=False, markup=False).print(table)


if __name__ == "__main__":
    main()
