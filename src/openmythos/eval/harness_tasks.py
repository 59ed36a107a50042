"""A run's own evaluation as tasks of lm-eval: a folder that needs no network.

For text: the likelihood of the held-out documents. For a task: multiple choice among all words,
one task of lm-eval per number of hops. Any model of lm-eval can be asked, ours by `eval.harness`
and exports by `--model hf`:

    lm_eval --model hf --model_args pretrained=DIR,num_loops=8,trust_remote_code=True \\
        --include_path FOLDER --tasks openmythos
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from openmythos.config import ConfigError, require
from openmythos.eval.accuracy import ASKED_SEED
from openmythos.files import write_atomically
from openmythos.tasks import Task
from openmythos.tasks.words import words
from openmythos.train.config import TaskData
from openmythos.train.run import Run

TAG = "openmythos"  # names all tasks of a folder at once
# Shares of the largest number of hops in training.
HOPS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
_LOADER = '''"""Reads the problems beside this file; lm-eval calls it."""

import json
from pathlib import Path

from datasets import Dataset


def load(file, **_):
    lines = Path(__file__).with_name(file).read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}
'''


def write(run: Run, folder: Path, *, examples: int = 200) -> list[str]:
    """Write the folder, which must not exist; returns the names of its tasks."""
    require(not folder.exists(), "out", str(folder), "exists already")
    data = run.config.data
    if isinstance(data, TaskData):
        made = dict(_of_task(run, data, examples))
    else:
        made = {f"{TAG}_held_out": (_held_out(run, examples), _TEXT)}
    folder.mkdir(parents=True)
    write_atomically(folder / "rows.py", _LOADER)
    for name, (rows, fields) in made.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(folder / f"{name}.jsonl", lines)
        write_atomically(folder / f"{name}.yaml", _yaml(name, fields))
    return list(made)


_TEXT: dict[str, Any] = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [
        {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
    ],
}
_CHOICE: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def _yaml(name: str, fields: dict[str, Any]) -> str:
    common = {
        "task": name,
        "tag": TAG,
        "dataset_kwargs": {"file": f"{name}.jsonl"},
        "test_split": "test",
        "num_fewshot": 0,
    }
    # JSON is YAML, but for the tag of lm-eval that names a function.
    lines = [f"{key}: {json.dumps(value)}" for key, value in (common | fields).items()]
    return "\n".join((*lines, "custom_dataset: !function rows.load")) + "\n"


def _of_task(
    run: Run, data: TaskData, examples: int
) -> Iterator[tuple[str, tuple[list[dict[str, Any]], dict[str, Any]]]]:
    context = run.config.model.context
    for hops in sorted({max(data.min_hops, round(share * data.max_hops)) for share in HOPS}):
        try:
            rows = problems(data.task, hops, examples)
        except ConfigError:
            return  # the task has no problems so long
        if len(rows[0]["context"].split()) > context:
            return
        yield f"{TAG}_{data.task.kind}_{hops:03d}", (rows, _CHOICE)


def problems(task: Task, hops: int, examples: int) -> list[dict[str, Any]]:
    """Problems as words, with all words to choose from: accuracy is that of the likeliest token.

    They are those of `eval.accuracy.accuracy_map` with as many examples.
    """
    generator = torch.Generator().manual_seed(ASKED_SEED + hops)
    batch, known = task.sample(examples, hops, generator), words(task)
    return [
        {
            "context": " ".join(known[token] for token in tokens[: at + 1]),
            "choices": known,
            "answer": answer,
            "hops": hops,
        }
        for tokens, at, answer in zip(
            batch.tokens.tolist(), batch.answer_at.tolist(), batch.answers().tolist(), strict=True
        )
    ]


def _held_out(run: Run, examples: int) -> list[dict[str, Any]]:
    """The first documents of the held-out text."""
    shards = run.shards("held_out")
    documents = _split(shards.read(0, len(shards)).tolist(), run.tokenizer.bos_id)
    texts = (run.tokenizer.decode(ids) for ids in documents)
    rows = [{"text": text} for _, text in zip(range(examples), texts, strict=False) if text]
    require(len(rows) > 0, "held-out text", len(rows), "must hold at least one document")
    return rows


def _split(ids: Iterable[int], bos: int) -> Iterator[list[int]]:
    document: list[int] = []
    for token in ids:
        if token == bos and document:
            yield document
            document = []
        if token != bos:
            document.append(token)
    if document:
        yield document
