"""Asks a model and its export with lm-eval, in its own process: `harness_outside.py FOLDER`."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

TEXTS = [
    ("", "The end."),
    ("def main(", "):\n    return"),
    ("a b", " c"),
    ("one two three four", " five six seven eight nine ten eleven"),
    ("same", " start"),
    ("same", " stop"),
    ("caf\u00e9 ", "cr\u00e8me"),
    *((f"count {i}", f" {i * i}") for i in range(6)),
]


@contextmanager
def without_transformers() -> Iterator[None]:
    """Inside the block transformers is not to be found, as if it were not installed."""
    find = PathFinder.find_spec

    def others(name: str, *args: Any) -> Any:
        return None if name.partition(".")[0] == "transformers" else find(name, *args)

    with patch.object(PathFinder, "find_spec", others):
        yield


def requests(kind: str, rows: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=row, idx=i) for i, row in enumerate(rows)]


def answers(model: Any, name: str) -> dict[str, Any]:
    """Log-likelihoods and a continuation."""
    whole = [(" ".join(text for pair in TEXTS for text in pair),), ("short",)]
    options = {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False}
    return {
        name: model.loglikelihood(requests("loglikelihood", TEXTS)),
        f"{name}_text": model.generate_until(
            requests("generate_until", [("def f(", options), ("x", options)])
        ),
        f"{name}_rolling": model.loglikelihood_rolling(requests("loglikelihood_rolling", whole)),
    }


def ours(folder: Path, tasks: str) -> dict[str, Any]:
    """By the package's adapter."""
    from openmythos import OpenMythos
    from openmythos.data.tokenizer import ByteTokenizer
    from openmythos.eval import harness
    from openmythos.tasks.words import Words
    from openmythos.train.run import Run

    text = OpenMythos.from_pretrained(folder / "text")
    found = answers(harness.HarnessModel(text, ByteTokenizer(), num_loops=5), "own")
    run = Run.open(folder / "hops")
    own = harness.HarnessModel(run.load_model(), Words(run.config.data.task))  # type: ignore[union-attr]
    found["accuracy"] = harness.evaluate(own, ["openmythos"], (1, 2, 5), folder=tasks)
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    tasks = str(folder / "tasks")
    with without_transformers():
        found = ours(folder, tasks)
    assert "transformers" not in sys.modules
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    load = {"trust_remote_code": True, "device": "cpu", "batch_size": 4, "num_loops": 5}
    theirs = HFLM(pretrained=str(folder / "text-hf"), **load)
    found |= answers(theirs, "hf")
    # Its windows begin with the start token already, which its encoding would add once more.
    theirs.add_bos_token = False
    found["hf_rolling"] = answers(theirs, "again")["again_rolling"]
    results = simple_evaluate(
        "hf",
        model_args=f"pretrained={folder / 'hops-hf'},trust_remote_code=True,num_loops=5",
        tasks=["openmythos"],
        task_manager=TaskManager(include_path=tasks),
        device="cpu",
    )["results"]
    found["hf_accuracy"] = {task: metrics["acc,none"] for task, metrics in results.items()}
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
