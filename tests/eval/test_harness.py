"""lm-eval: our models by `eval.harness`, their exports by lm-eval's own class."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from hub.test_export_outside import environment, other_python
from variants import tiny_config

from openmythos import ConfigError, OpenMythos
from openmythos.config import apply_overrides
from openmythos.data.tokenizer import ByteTokenizer
from openmythos.eval import harness, harness_tasks
from openmythos.eval.accuracy import accuracy_map
from openmythos.hub import export
from openmythos.recipes import catalogue
from openmythos.tasks import KHop
from openmythos.tasks.words import Words, words
from openmythos.train.run import Run, train

LOOPS = (1, 2, 5)
EXAMPLES = 30


def test_problems_are_those_of_eval_in_words() -> None:
    task = KHop(num_entities=5, num_relations=2)
    rows, known = harness_tasks.problems(task, 3, EXAMPLES), words(task)
    encoder = Words(task)
    for row in rows:
        tokens = torch.tensor(encoder.encode(row["context"]))
        assert encoder.decode(tokens.tolist()) == row["context"]
        right = task.chain(tokens[:1], tokens[None, 1:] - task.num_entities).answers()
        assert row["choices"][row["answer"]] == known[int(right)]
    with pytest.raises(ConfigError, match="word = 'e5': must be one of e0, "):
        encoder.encode("e0 e5")


@pytest.mark.skipif(harness.INSTALLED, reason="lm-eval is installed")
def test_a_missing_package_is_named() -> None:
    with pytest.raises(ConfigError, match=r"lm-eval needs: pip install 'openmythos\[eval\]'"):
        harness.HarnessModel(OpenMythos(tiny_config()), ByteTokenizer())


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Run]:
    """What a process with lm-eval found, and the run on a task that it evaluated."""
    folder = tmp_path_factory.mktemp("harness")
    python = other_python("lm-eval", "lm_eval==0.4.13", "accelerate")
    small = ["train.num_steps=40", "train.batch_size=16", "data.max_hops=3", "train.device=cpu"]
    run = Run.create(folder / "hops", apply_overrides(catalogue.get("hops"), small))
    for _ in train(run):
        pass
    harness_tasks.write(run, folder / "tasks", examples=EXAMPLES)
    task = run.config.data.task  # type: ignore[union-attr]
    export.write(run.load_model(), folder / "hops-hf", text=export.Text(task=task))
    text = OpenMythos(tiny_config(vocab_size=257, context=64), seed=1).eval()
    text.save_pretrained(folder / "text")
    export.write(text, folder / "text-hf", text=export.Text(tokenizer=ByteTokenizer()))
    command = [python, Path(__file__).with_name("harness_outside.py"), folder]
    names = environment(folder, with_package=True) | {"HF_DATASETS_CACHE": str(folder / "data")}
    done = subprocess.run(command, capture_output=True, text=True, env=names)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "found.json").read_text()), run


@pytest.mark.slow
def test_log_likelihoods_equal_those_of_the_export(scored: Any) -> None:
    """To the rounding of fp32: the two make different batches."""
    found, _ = scored
    assert len(found["own"]) == len(found["hf"]) > 8
    for own, theirs in zip(found["own"], found["hf"], strict=True):
        assert own[0] == pytest.approx(theirs[0], rel=1e-6)
        assert own[1] == theirs[1]
    assert found["own_rolling"] == pytest.approx(found["hf_rolling"], rel=1e-6)
    assert found["own_text"] == found["hf_text"]


@pytest.mark.slow
def test_accuracy_against_loops_is_that_of_eval(scored: Any) -> None:
    """By our adapter without transformers, by lm-eval's class, and by `openmythos eval`."""
    found, run = scored
    task = run.config.data.task
    expected = accuracy_map(run.load_model(), task, (1, 2, 3), LOOPS, examples=EXAMPLES)
    for hops, by_loops in expected.items():
        name = f"openmythos_k_hop_{hops:03d}"
        for loops, share in by_loops.items():
            assert found["accuracy"][name][str(loops)]["acc"] == pytest.approx(share)
        assert found["hf_accuracy"][name] == pytest.approx(by_loops[5])
    assert expected[1][5] > 0.3
