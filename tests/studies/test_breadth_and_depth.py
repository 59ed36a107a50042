"""breadth-and-depth: the verdict of made-up runs, and what is measured of a known answer."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from studies.made_up import run_of

from openmythos import OpenMythos
from openmythos.eval.accuracy import ASKED_SEED
from openmythos.planning import cost
from openmythos.studies import breadth_and_depth as study
from openmythos.studies.study import RunResult

ARMS = {arm.name: arm for arm in study.arms()}
CROSSED = [
    study.name_of(width, loops)
    for width in (study.DENSE, study.MIXTURE)
    for loops in (1, study.LOOPS)
]
# Facts and 5-hop chains of: dense with one loop and six, experts with one and six.
CLAIMED = ((0.4, 0.4, 0.9, 0.9), (0.05, 0.95, 0.05, 0.97))


def runs(facts: tuple[float, ...], chains: tuple[float, ...], noise: float = 0.01) -> Any:
    def run(name: str, seed: int, known: float, right: float) -> RunResult:
        loops = str(ARMS[name].model.num_loops)
        shift = noise * (seed - 1)
        curve: Mapping[str, Any] = {
            "facts": {loops: known + shift},
            "fact_nats": {loops: 1.0},
            "chains": {str(hops): {loops: right - shift} for hops in range(1, study.HOPS + 1)},
        }
        return run_of(name, curve, seed, parameters=10_000)

    cells = dict(zip(CROSSED, zip(facts, chains, strict=True), strict=True))
    cells[study.LAYERS] = cells[study.WIDE] = (0.9, 0.9)
    return [run(name, seed, *cell) for name, cell in cells.items() for seed in range(3)]


@pytest.mark.parametrize(
    ("facts", "chains", "verdict"),
    [
        (*CLAIMED, "holds"),
        # Loops hold facts as well, or experts answer chains as well.
        ((0.4, 0.6, 0.9, 0.95), CLAIMED[1], "holds in part"),
        (CLAIMED[0], (0.05, 0.8, 0.2, 0.95), "holds in part"),
        # Experts add no more facts than loops do.
        ((0.4, 0.4, 0.4, 0.4), CLAIMED[1], "does not hold here"),
        # Nobody answers chains: loops add nothing that is theirs.
        (CLAIMED[0], (0.05, 0.05, 0.05, 0.05), "does not hold here"),
        ((0.9, 0.9, 1.0, 1.0), CLAIMED[1], "premise not met"),
        (CLAIMED[0], (0.9, 0.95, 0.9, 0.97), "premise not met"),
    ],
)
def test_a_double_dissociation_needs_both_halves(facts: Any, chains: Any, verdict: str) -> None:
    finding = study.judge(runs(facts, chains))
    assert finding.verdict == verdict, finding.sentence
    assert len(finding.table) == len(ARMS)
    assert len(f"{study.STUDY.headline} {finding.brief}".split()) <= 21  # a row of the README


def test_effects_are_means_over_the_other_factor() -> None:
    experts, loops = study.effects(runs((0.1, 0.2, 0.4, 0.8), CLAIMED[1], 0.0), study.facts)
    assert experts == pytest.approx([0.45] * 3)  # 0.3 with one loop, 0.6 with six
    assert loops == pytest.approx([0.25] * 3)


def test_arms_are_matched_as_they_say() -> None:
    counts = {name: cost.parameters(arm.model) for name, arm in ARMS.items()}
    dense, experts = (counts[study.name_of(w, 1)] for w in (study.DENSE, study.MIXTURE))
    assert experts.active == pytest.approx(dense.total, rel=0.04)  # the router is 3%
    for width in (study.DENSE, study.MIXTURE):
        assert counts[study.name_of(width, 1)] == counts[study.name_of(width, study.LOOPS)]
    assert counts[study.WIDE].total == pytest.approx(experts.total, rel=0.02)
    deep = ARMS[study.name_of(study.DENSE, study.LOOPS)].model
    assert ARMS[study.LAYERS].model.effective_depth(1) == deep.effective_depth(study.LOOPS)
    # What the facts hold is more than two bits per parameter of the dense model, and less than one
    # of the experts.
    bits = study.TASK.num_facts * torch.tensor(float(study.TASK.num_subjects)).log2().item()
    assert bits > 2 * dense.total and bits < experts.total


def test_facts_and_chains_are_counted_apart() -> None:
    """By another pass over the same problems."""
    arm = ARMS[study.name_of(study.DENSE, study.LOOPS)]
    task, model = study.TASK, OpenMythos(arm.model, seed=0).eval()
    found = study.ask(model, task, 3, (2,), ASKED_SEED, 50)[2]
    batch = task.sample(50, 3, torch.Generator().manual_seed(ASKED_SEED + 3))
    with torch.no_grad():
        logs = model(batch.tokens, num_loops=2).logits.log_softmax(dim=-1)
    single = batch.targets[:, 1:16:2]
    wanted = logs[:, 1:16:2].gather(2, single[..., None])
    assert found.fact_nats == pytest.approx(float(-wanted.mean()), rel=1e-4)
    best = logs.argmax(dim=-1)
    assert found.facts == pytest.approx(float((best[:, 1:16:2] == single).float().mean()))
    assert found.chains == pytest.approx(float((best[:, -1] == batch.answers()).float().mean()))
    assert study.bits(runs(*CLAIMED)[0]) == pytest.approx(0.64 * (6.3219 - 1.4427), rel=1e-3)
