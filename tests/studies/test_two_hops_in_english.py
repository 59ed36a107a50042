"""two-hops-in-english: the rule on made-up runs, and sentences that say what they should."""

from typing import Any

import pytest
import torch
from studies.made_up import two_runs

from openmythos.studies import two_hops_in_english as study
from openmythos.studies.study import RunResult
from openmythos.tasks import EnglishPairs
from openmythos.tasks.batch import IGNORE
from openmythos.tasks.english import FUNCTION

ARMS = {arm.name: arm for arm in study.arms()}


def runs(**changes: float) -> list[RunResult]:
    """The loop answers all, layers what they were asked; `changes` as looped_ood_known."""
    found = []
    for name, arm in ARMS.items():
        loops = "8" if arm.model.num_loops > 1 else "1"
        curve: dict[str, Any] = {}
        for part in study.PARTS:
            for way in ("known", "new"):
                share = float(name == study.LOOPED or part == "train")
                key = f"{name.replace('8 layers', 'deep')}_{part}_{way}"
                curve[f"{part}, {way}"] = {loops: changes.get(key, share)}
        found += two_runs(name, curve)
    return found


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "holds"),
        ({"looped_held_out_new": 0.5}, "holds in part"),
        ({"looped_held_out_new": 0.5, "looped_held_out_known": 0.9}, "does not hold here"),
        ({"looped_ood_known": 0.4}, "does not hold here"),
        ({"deep_ood_known": 0.2}, "does not hold here"),
        ({"deep_train_known": 0.9}, "premise not met"),
    ],
)
def test_the_loop_must_compose_in_any_wording(changes: Any, verdict: str) -> None:
    finding = study.judge(runs(**changes))
    assert finding.verdict == verdict, finding.sentence
    assert len(finding.table) == len(ARMS)
    assert len(f"{study.STUDY.headline} {finding.brief}".split()) <= 25


def test_sentences_say_what_they_ask() -> None:
    """Read back as words; the answer follows the last, and unseen wordings stay unseen."""
    task = EnglishPairs(num_entities=20, num_relations=12)
    words = [f"A{i}" for i in range(20)] + [f"R{i}" for i in range(12)] + [*FUNCTION, "."]
    assert task.vocab_size == len(words)
    facts = task.pairs.chains.facts()
    batch = task.sample(300, 2, torch.Generator().manual_seed(0))
    seen = set()
    for tokens, targets, last in zip(
        batch.tokens.tolist(), batch.targets.tolist(), batch.answer_at.tolist(), strict=True
    ):
        text = [words[token] for token in tokens]
        assert all(word == "." for word in text[last + 1 :]) and text[last] != "."
        (start,) = (int(word[1:]) for word in text if word[0] == "A")
        relations = [int(word[1:]) for word in text if word[0] == "R"]
        outer_first = "of" in text and text[last] != f"R{relations[-1]}"
        answer = start
        for relation in reversed(relations) if outer_first else relations:
            answer = int(facts[relation, answer])
        assert [t for t in targets if t != IGNORE] == [answer] == [targets[last]]
        seen.add(" ".join(word[0] if word[0] in "AR" else word for word in text[: last + 1]))
    assert seen == {
        *("the R of A is", "A has as R", "who is the R of A ?", "A 's R is"),
        *("the R of the R of A is", "the R of A has as R", "who is the R of the R of A ?"),
    }
    new = task.asked("held_out", 5, study.NEW)
    assert [words[t][0] for t in new.tokens[0].tolist()[:6]] == ["A", "'", "R", "'", "R", "i"]
