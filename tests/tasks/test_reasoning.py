"""Thoughts between question and answer: what is given, what is learned, at every stage."""

from typing import Any

import pytest
import torch

from openmythos.config import ConfigError, from_dict, to_dict
from openmythos.tasks import IGNORE, KHop, Parity, Reachability
from openmythos.tasks.reasoning import (
    LatentThoughts,
    NoThoughts,
    PauseThoughts,
    Thoughts,
    WrittenThoughts,
)
from openmythos.train.config import TaskData

TASK, HOPS = Reachability(num_nodes=8, num_names=10), 3
BLANK, ASK = 11, 10
QUESTION = 6 * 2 + 4  # tokens: edges, question mark, start, candidates


def data(thoughts: Thoughts, **changes: Any) -> TaskData:
    usual: dict[str, Any] = {"min_hops": 1, "first_hops": HOPS, "max_hops": HOPS} | changes
    return TaskData(task=TASK, thoughts=thoughts, **usual)


def draw(thoughts: Thoughts, progress: float = 1.0) -> Any:
    return data(thoughts).problems(4, HOPS, torch.Generator().manual_seed(0), progress)


def test_steps_lead_along_edges_to_the_answer() -> None:
    question, steps = TASK.solved(20, HOPS, torch.Generator().manual_seed(0))
    assert torch.equal(steps[:, -1], question.answers())
    for tokens, way in zip(question.tokens.tolist(), steps.tolist(), strict=True):
        edges = set(zip(tokens[:12:2], tokens[1:12:2], strict=True))
        assert edges >= set(zip([tokens[-3], *way], way, strict=False))


@pytest.mark.parametrize("kind", [PauseThoughts, LatentThoughts])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_blanks_replace_the_first_steps_and_are_not_learned(kind: Any, stage: int) -> None:
    question, steps = TASK.solved(4, HOPS, torch.Generator().manual_seed(0))
    made = draw(kind(stage_share=0.25), progress=0.25 * stage)
    assert torch.equal(made.tokens[:, :QUESTION], question.tokens)
    blanks = made.tokens[:, QUESTION : QUESTION + stage]
    assert (blanks == BLANK).all() and torch.equal(
        made.tokens[:, QUESTION + stage :], steps[:, stage:]
    )
    # Learned: the steps that are left, each at the position before it, then the answer.
    learned = made.targets[:, QUESTION - 1 + stage :]
    assert torch.equal(learned, torch.cat((steps[:, stage:], question.answers()[:, None]), dim=1))
    assert (made.targets[:, : QUESTION - 1 + stage] == IGNORE).all()
    assert torch.equal(made.answers(), question.answers())
    marks = torch.arange(made.tokens.shape[1])
    inside = (marks >= QUESTION) & (marks < QUESTION + stage)
    wanted = inside.expand(4, -1) if kind is LatentThoughts else None
    assert (made.latents is None) if wanted is None else torch.equal(made.latents, wanted)


def test_written_steps_stay_and_without_thoughts_nothing_is_added() -> None:
    question, steps = TASK.solved(4, HOPS, torch.Generator().manual_seed(0))
    made = draw(WrittenThoughts())
    assert torch.equal(made.tokens, torch.cat((question.tokens, steps), dim=1))
    plain = draw(NoThoughts())
    assert torch.equal(plain.tokens, question.tokens)
    assert torch.equal(plain.targets, question.targets)


def test_configs() -> None:
    staged = data(LatentThoughts(stage_share=0.2))
    assert from_dict(TaskData, to_dict(staged)) == staged
    assert (staged.vocab_size, data(NoThoughts()).vocab_size) == (12, 11)
    with pytest.raises(ConfigError, match=r"stage_share = 0.4: leaves steps written at the end"):
        data(LatentThoughts(stage_share=0.4))
    with pytest.raises(ConfigError, match="first_hops = 2: must be max_hops with thoughts"):
        data(WrittenThoughts(), first_hops=2)
    with pytest.raises(ConfigError, match=r"task.kind = 'parity': has no steps"):
        TaskData(task=Parity(), thoughts=WrittenThoughts())


def test_steps_of_a_chain_lead_from_fact_to_fact() -> None:
    task = KHop(supervision="answer", readout="padded", max_hops=5, facts_seed=2)
    question, steps = task.solved(30, 4, torch.Generator().manual_seed(0))
    facts, entity = task.facts(), question.tokens[:, 0]
    for hop in range(4):
        entity = facts[question.tokens[:, 1 + hop] - task.num_entities, entity]
        assert steps[:, hop].equal(entity)
    assert question.answers().equal(entity) and (question.targets != IGNORE).sum() == 30
