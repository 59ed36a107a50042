"""unseen-compositions: the rule on made-up runs, and a training set without leaks."""

from typing import Any

import pytest
import torch
from studies.made_up import run_of

from openmythos.kernels.cross_entropy import IGNORE
from openmythos.planning import cost
from openmythos.studies import unseen_compositions as study
from openmythos.studies.study import RunResult
from openmythos.tasks.pairs import PARTS, FactPairs

ARMS = {arm.name: arm for arm in study.arms()}


def run(name: str, seed: int, ood: float, at: tuple[int, int, int], fits: float) -> RunResult:
    """Each part jumps from 0 to its last value at a step of ten."""
    loops = str(8 if ARMS[name].model.num_loops > 1 else 1)
    last = dict(zip(PARTS, (fits, fits, ood), strict=True))

    def found(step: int) -> dict[str, Any]:
        times = dict(zip(PARTS, at, strict=True))
        return {part: {"pairs": 9, loops: last[part] * (step >= times[part])} for part in PARTS}

    curve = found(10) | {"by_step": {str(step): found(step) for step in range(1, 11)}}
    return run_of(name, curve, seed)


def runs(
    looped: float = 0.9,
    layers: float = 0.02,
    at: tuple[int, int, int] = (2, 4, 8),
    fits: float = 0.99,
) -> list[RunResult]:
    return [
        run(name, seed, layers if "layers" in name else looped, at, fits)
        for name in ARMS
        for seed in range(3)
    ]


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "holds"),
        ({"at": (2, 2, 8)}, "holds in part"),
        ({"looped": 0.7}, "does not hold here"),
        ({"layers": 0.2}, "does not hold here"),
        ({"fits": 0.9}, "premise not met"),
    ],
)
def test_loops_must_compose_and_layers_must_not(changes: Any, verdict: str) -> None:
    finding = study.judge(runs(**changes))
    assert finding.verdict == verdict, finding.sentence
    assert len(finding.table) == len(ARMS)
    assert len(f"{study.STUDY.headline} {finding.brief}".split()) <= 25


def test_one_bad_seed_is_not_averaged_away() -> None:
    made = [*runs(0.99), run(study.LOOPED, 3, 0.6, (2, 4, 8), 0.99)]
    assert study.judge(made).verdict == "does not hold here"


def test_a_part_is_reached_where_it_stays_learned() -> None:
    one = run(study.LOOPED, 0, 0.9, (2, 4, 8), 0.99)
    assert study.reached(one, "held_out", 0.95) == 0.4
    one.curve["by_step"]["6"]["held_out"]["8"] = 0.1
    assert study.reached(one, "held_out", 0.95) == 0.7
    assert study.reached(one, "ood", 0.95) is None and study.phases(one)
    one.curve["by_step"]["7"]["held_out"]["8"] = 0.1
    assert not study.phases(one)  # the last two at the same time


def test_equal_parameters_are_equal() -> None:
    counts = {name: cost.parameters(arm.model).total for name, arm in ARMS.items()}
    assert counts[study.EQUAL] == pytest.approx(counts[study.LOOPED], rel=0.08)
    assert counts[study.UNSHARED] > 5 * counts[study.LOOPED]


def test_nothing_that_is_asked_later_occurs_in_training() -> None:
    """By counting the rows that training draws, for a small table of facts."""
    task = FactPairs(num_entities=8, num_relations=6, alone=0.2, per_fact=2.0, facts_seed=3)
    alone, facts = task.is_alone(), task.chains.facts()
    parts = {part: {tuple(row) for row in task.pairs(part).tolist()} for part in PARTS}
    drawn, singles = set(), set()
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        batch = task.sample(50, 2, generator)
        assert batch.tokens.shape == (50, 3)
        for (start, first, second), targets in zip(
            batch.tokens.tolist(), batch.targets.tolist(), strict=True
        ):
            relation = first - task.num_entities
            assert targets[1] == facts[relation, start]
            if second == task.chains.padding:
                singles.add((relation, start))
                assert targets[2] == IGNORE
            else:
                drawn.add((start, relation, second - task.num_entities))
                assert targets[2] == facts[second - task.num_entities, targets[1]]
    assert drawn == parts["train"] and not drawn & (parts["held_out"] | parts["ood"])
    assert len(singles) == 8 * 6  # every fact is asked alone
    for part, wanted in (("train", False), ("held_out", False), ("ood", True)):
        for start, first, second in parts[part]:
            pair = (alone[first, start], alone[second, facts[first, start]])
            assert all(bool(fact) == wanted for fact in pair)
    assert len(parts["train"]) == 2 * int((~alone).sum())
    others = FactPairs(num_entities=8, num_relations=6, alone=0.2, per_fact=2.0, facts_seed=4)
    assert not others.chains.facts().equal(facts)
