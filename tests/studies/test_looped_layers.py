"""looped-layers: the rule on made-up runs, and words in a group that few letters generate."""

from typing import Any

import pytest
import torch
from studies.made_up import run_of

from openmythos.planning import cost
from openmythos.studies import looped_layers as study
from openmythos.studies.study import RunResult
from openmythos.tasks import Composition

ARMS = {arm.name: arm for arm in study.arms()}


def runs(**failing: int) -> list[RunResult]:
    """Five seeds that solve all; so many fail of task_layers, task_looped; `once`: percent."""
    found = []
    for task in study.TASKS:
        key = task.replace("-", "").replace("_", "").lower()
        for what, shape in (("layers", study.LAYERS), ("looped", study.LOOPED)):
            bad = failing.get(f"{key}_{what}", 0)
            shares = [0.1] * bad + [1.0] * (5 - bad)
            found += _runs(study.name_of(task, shape), shares)
        found += _runs(study.name_of(task, study.ONCE), [failing.get(f"{key}_once", 30) / 100] * 3)
    return found


def _runs(name: str, shares: list[float]) -> list[RunResult]:
    return [run_of(name, {"accuracy": share}, seed) for seed, share in enumerate(shares)]


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "holds"),
        ({"addition_looped": 1}, "holds"),
        ({"addition_looped": 2}, "holds in part"),
        ({"addition_looped": 2, "addition_layers": 3}, "holds"),  # not solved by layers either
        ({"phop_looped": 2}, "does not hold here"),
        ({"phop_once": 90, "s5_layers": 5}, "premise not met"),
    ],
)
def test_only_tasks_that_layers_solve_count(changes: Any, verdict: str) -> None:
    finding = study.judge(runs(**changes))
    assert finding.verdict == verdict, finding.sentence
    assert len(finding.table) == len(ARMS)


def test_a_loop_has_the_parameters_of_a_layer() -> None:
    counts = {name: cost.parameters(arm.model).total for name, arm in ARMS.items()}
    for task in study.TASKS:
        assert counts[f"{task}, 1 x 6"] == counts[f"{task}, 1 x 1"] < counts[f"{task}, 6 x 1"] / 3


@pytest.mark.parametrize("size", [3, 4])
def test_swaps_of_neighbours_reach_the_whole_group(size: int) -> None:
    """A product by a swap exchanges two values; long words lead everywhere."""
    task = Composition(size=size, factors="adjacent")
    batch = task.sample(2000, 3 * size, torch.Generator().manual_seed(0))
    assert len(batch.tokens.unique()) == size - 1
    first, second = batch.tokens[:, 0], batch.targets[:, 1]
    same = batch.tokens[:, 1] == first
    assert (second[same] == 0).all() and (second[~same] != 0).all()  # a swap undoes itself
    lengths = batch.targets.unique()
    assert len(lengths) == task.vocab_size
