"""The study of latents: its verdict rule on made-up runs, and what zeroed latents are."""

from itertools import product

import pytest
import torch
from studies.made_up import run_of

from openmythos import OpenMythos
from openmythos.eval.accuracy import answers
from openmythos.planning import cost
from openmythos.studies import latent_reasoning as study
from openmythos.studies.statistics import mcnemar
from openmythos.studies.study import RunResult
from openmythos.tasks.reasoning import LatentThoughts

ARMS = {arm.name: arm for arm in study.arms()}
SEEDS = 2


def runs(
    plain: float = 0.6,
    written: float = 0.95,
    latents: float = 0.9,
    pauses: float = 0.7,
    loops: float = 0.97,
    zeroed: float = 0.5,
) -> list[RunResult]:
    shares = dict(zip(ARMS, (plain, written, latents, pauses, loops, 0.8), strict=True))
    found = []
    for (name, share), seed in product(shares.items(), range(SEEDS)):
        right = round(1000 * share)
        curve = {
            "accuracy": {"1": 1.0, "2": 0.9, "3": 0.9, "4": 0.8, "6": share},
            "right": "1" * right + "0" * (1000 - right),
            "flops": 1e6,
            "milliseconds": 2.0,
        }
        if name == study.LATENTS:
            curve["zeroed"] = zeroed
        found.append(run_of(name, curve, seed))
    return found


def test_arms_differ_in_nothing_but_what_they_are_named_after() -> None:
    counts = {name: cost.parameters(arm.model).total for name, arm in ARMS.items()}
    assert len({count for name, count in counts.items() if name != study.DEEP}) == 1
    kinds = [arm.run.data.thoughts.kind for arm in ARMS.values()]  # type: ignore[union-attr]
    assert kinds == ["none", "written", "latents", "pauses", "none", "none"]
    assert len({arm.run.train.num_steps for arm in ARMS.values()}) == 1


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "holds"),
        ({"loops": 0.89}, "does not hold here"),
        ({"loops": 0.93, "written": 0.99}, "does not hold here"),
        ({"zeroed": 0.8}, "holds in part"),
        ({"pauses": 0.895}, "holds"),  # 10 of 2000 problems: p = 0.002
        ({"pauses": 0.897}, "holds in part"),  # 6: p = 0.03
        ({"pauses": 0.92}, "holds in part"),
        ({"latents": 0.7, "pauses": 0.6, "zeroed": 0.6}, "holds in part"),
        ({"latents": 0.7, "pauses": 0.7, "zeroed": 0.6}, "does not hold here"),
        ({"plain": 0.86}, "premise not met"),
        ({"written": 0.8, "loops": 0.8, "latents": 0.8}, "premise not met"),
    ],
)
def test_verdicts(changed: dict[str, float], verdict: str) -> None:
    finding = study.judge(runs(**changed))
    assert finding.verdict == verdict, finding.sentence
    assert {row["arm"] for row in finding.table} == set(ARMS)


def test_mcnemar_by_hand() -> None:
    pairs = [(True, True)] * 50 + [(True, False)] * 5 + [(False, True)] * 1
    assert mcnemar(pairs) == pytest.approx(2 * (1 + 6) / 2**6)
    assert mcnemar([(True, True), (False, False)]) == 1.0
    assert mcnemar([(True, False)] * 9) == pytest.approx(2 / 2**9)


@torch.no_grad()
def test_zeroed_latents_are_positions_with_an_embedding_of_zeros() -> None:
    model = OpenMythos(ARMS[study.LATENTS].model, seed=0).eval()
    for weight in model.parameters():
        weight += 0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    tokens = study.TASK.sample(20, 3, torch.Generator().manual_seed(0)).tokens
    found = study.without_latents(model, tokens, 3)
    fed = answers(model, study.TASK, LatentThoughts(), tokens, 3, num_loops=1)
    embedded = torch.cat((model.embed(tokens), torch.zeros(20, 3, 64)), dim=1)
    hook = model.embed.register_forward_hook(lambda *_: embedded)
    logits = model(torch.cat((tokens, tokens[:, :3]), dim=1)).logits
    hook.remove()
    assert torch.equal(found, logits[:, -1].argmax(dim=-1))
    assert not torch.equal(fed, found)
