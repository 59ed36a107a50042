"""How many messages a training step of two processes takes; writes results/scale/collectives.json.

    python benchmarks/collectives.py

A tiny model whose recurrent layers have experts, against the number of loops, with every weight in
shards and with the experts held by one rank or the other. Counted as they are called, on gloo.
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
from ranks import MODEL, TRAIN, Collectives, launch, trainer_of, write_text  # noqa: E402

from openmythos.config import write_json  # noqa: E402
from openmythos.recurrence.loop_sampling import FixedLoops  # noqa: E402
from openmythos.train.parallel import Parallel  # noqa: E402

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
    """Of one step, by setting and number of loops."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/scale"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        write_text(Path(name))
        first, second = launch(2, messages, Path(name))
    assert first == second, "the ranks did not call the same collectives"
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {
        "command": "python benchmarks/collectives.py",
        "ranks": 2,
        "backend": "gloo",
        "recurrent_layers": MODEL.recurrent_layers,
        "messages_per_step": first,
    }
    write_json(found, options.out / "collectives.json")
    table = Table("setting", "loops", *KINDS)
    for setting, rows in first.items():
        for row in rows:
            table.add_row(setting, *(str(number) for number in row.values()))
    Console(highlight=False, markup=False).print(table)


if __name__ == "__main__":
    main()
