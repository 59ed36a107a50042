"""The model that the package ships: its recipe, its hash, and that it needs its loops."""

import pytest
import torch

from openmythos.cli.serve import Serve
from openmythos.eval.accuracy import accuracy_map
from openmythos.files import read_json, sha256_of
from openmythos.recipes import catalogue
from openmythos.serve.source import SHIPPED, TASK_FILE, Served

WEIGHTS = SHIPPED / "model.safetensors"


def test_it_is_the_recipes_model_and_small() -> None:
    record = read_json(SHIPPED / TASK_FILE)
    recipe = catalogue.get(record["recipe"])
    served = Served.open(Serve().folder)
    assert served.source.config == recipe.model
    assert served.trained is not None and recipe.data.task == served.trained.task  # type: ignore[union-attr]
    assert record["sha256"] == sha256_of(WEIGHTS)
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 700_000
    assert sum(p.numel() for p in served.load("cpu", "fp32", None).parameters()) == 148_288


def accuracy(hops: int, loops: tuple[int, ...], examples: int) -> dict[int, float]:
    """The share of right answers by loops."""
    served = Served.open("")
    assert served.trained is not None
    model = served.load("cpu", "fp32", None)
    task = served.trained.task
    return accuracy_map(model, task, (hops,), loops, examples=examples)[hops]


def test_more_lookups_need_more_loops() -> None:
    short, long = accuracy(6, (3, 10), 24), accuracy(24, (10, 28), 24)
    assert short[3] < 0.3 and short[10] == 1
    # What suffices for 6 lookups does not for 24, which are more than in training.
    assert long[10] < 0.3 and long[28] == 1


@pytest.mark.slow
@pytest.mark.parametrize("hops", [5, 10, 20, 30, 40, 50, 60])
def test_it_answers_three_times_the_trained_length(hops: int) -> None:
    found = accuracy(hops, (round(hops / 2), hops - 3, hops + 4, 64), 200)
    assert found[round(hops / 2)] < 0.2
    assert found[hops + 4] > 0.99 and found[64] > 0.99


def test_its_words_are_the_tasks(tmp_path: object) -> None:
    served = Served.open("")
    tokenizer = served.tokenizer
    ids = tokenizer.prompt_ids("e3 r1 r0")
    assert ids == [3, 21, 20] and tokenizer.decode(ids) == "e3 r1 r0 "
    facts = torch.tensor(served.task_facts()["facts"])  # type: ignore[index]
    assert facts.shape == (4, 20)
    assert all(row.sort().values.tolist() == list(range(20)) for row in facts)
    with pytest.raises(ValueError, match="word = 'x'"):
        tokenizer.prompt_ids("e3 x")
