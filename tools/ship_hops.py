"""Train the model that the package ships: `python tools/ship_hops.py` (minutes on one core).

Recipe `hops` with more steps, which brings chains of 60 lookups from 99.9% to all of a sample. The
weights are written only if longer chains need more loops and are answered with them. task.json
records the recipe, the sha256 of the weights, and what they were trained with; another processor
or version of torch gives other weights.
"""

import platform
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from openmythos.config import apply_overrides, to_dict
from openmythos.eval.accuracy import accuracy_map
from openmythos.files import sha256_of, write_json
from openmythos.machine import describe
from openmythos.model.storage import WEIGHTS_FILE
from openmythos.recipes import catalogue
from openmythos.serve.source import SHIPPED, TASK_FILE
from openmythos.train.config import TaskData
from openmythos.train.run import Run, train

RECIPE = "hops"
CHANGES = ("train.num_steps=3000", "train.device=cpu")
HOPS, EXAMPLES = (5, 10, 20, 30, 40, 50, 60), 400


def main() -> int:
    torch.set_num_threads(1)
    config = apply_overrides(catalogue.get(RECIPE), CHANGES)
    assert isinstance(config.data, TaskData)
    with TemporaryDirectory() as folder:
        run = Run.create(Path(folder) / "run", config)
        for metrics in train(run):
            if metrics.step % 300 == 0:
                print(f"step {metrics.step}: loss {metrics.loss:.3f}", flush=True)
        model = run.load_model()
    accuracy = {}
    for hops in HOPS:
        few, enough = round(hops / 2), hops + 4
        found = accuracy_map(model, config.data.task, (hops,), (few, enough), examples=EXAMPLES)
        accuracy |= {
            str(hops): {str(loops): round(share, 4) for loops, share in found[hops].items()}
        }
        print(f"{hops} lookups: {found[hops]}", flush=True)
        if found[hops][enough] < 0.99 or found[hops][few] > 0.25:
            print("not written: this training did not learn to answer longer chains by looping")
            return 1
    model.save_pretrained(SHIPPED)
    record = {
        "task": to_dict(config.data.task),
        "max_hops": config.data.max_hops,
        "recipe": RECIPE,
        "changes": list(CHANGES),
        "sha256": sha256_of(SHIPPED / WEIGHTS_FILE),
        "trained_on": {"torch": torch.__version__, "python": platform.python_version()}
        | {"cpu": describe()["cpu"]},
        "accuracy": accuracy,
    }
    write_json(record, SHIPPED / TASK_FILE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
