"""Every task against a solution by hand, golden samples and seeds."""

from itertools import permutations as all_orders
from typing import Any

import pytest
import torch

from openmythos.tasks import (
    IGNORE,
    Addition,
    Composition,
    FactsAndChains,
    KHop,
    Parity,
    PHop,
    PointerChasing,
    Reachability,
    TaskBatch,
    WrittenHops,
)

GOLDEN_FACTS = [[2, 3, 4, 0, 5, 1], [4, 5, 2, 0, 3, 1]]
GOLDEN_TOKENS = [[2, 7, 6, 7, 7], [3, 7, 7, 7, 7]]
GOLDEN_TARGETS = [[IGNORE, 2, 4, 3, 0], [IGNORE, 0, 4, 3, 0]]
TASKS: list[Any] = [
    KHop(),
    KHop(supervision="answer"),
    KHop(readout="padded", max_hops=8),
    PointerChasing(),
    PHop(length=24),
    Composition(),
    Addition(max_operands=8),
    Parity(),
    Parity(supervision="prefix"),
    Reachability(num_nodes=16),
    FactsAndChains(num_subjects=12, num_attributes=7),
    WrittenHops(max_hops=8),
]


def draw(task: Any, hops: int = 3, batch: int = 16, seed: int = 0, **fields: Any) -> TaskBatch:
    return task.sample(batch, hops, torch.Generator().manual_seed(seed), **fields)


@pytest.mark.parametrize("task", TASKS, ids=str)
@pytest.mark.parametrize("hops", [2, 5])
def test_batches_are_well_formed(task: Any, hops: int) -> None:
    made = draw(task, hops)
    assert made.tokens.shape == made.targets.shape and made.tokens.dtype == torch.long
    assert int(made.tokens.min()) >= 0 and int(made.tokens.max()) < task.vocab_size
    counted = made.targets[made.targets != IGNORE]
    assert int(counted.min()) >= 0 and int(counted.max()) < task.vocab_size
    assert (made.answers() != IGNORE).all()


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_seeds_decide(task: Any) -> None:
    one, same, other = draw(task), draw(task), draw(task, seed=1)
    assert one.tokens.equal(same.tokens) and one.targets.equal(same.targets)
    assert not one.tokens.equal(other.tokens)


# A step of p-hop may find nothing, and the leading digit of a sum is rarely large.
EVEN = [task for task in TASKS if not isinstance(task, PHop | Addition)]


@pytest.mark.parametrize("task", EVEN, ids=str)
def test_no_answer_is_much_likelier_than_others(task: Any) -> None:
    answers = draw(task, hops=3, batch=2000).answers()
    share = answers.bincount().max() / 2000
    assert share < max(2 / len(answers.unique()), 0.2)


def test_k_hop_follows_its_facts() -> None:
    task = KHop()
    facts = task.facts().tolist()
    assert all(sorted(row) == list(range(20)) for row in facts)
    made = draw(task, hops=6)
    for tokens, targets in zip(made.tokens.tolist(), made.targets.tolist(), strict=True):
        entity = tokens[0]
        assert targets[0] == IGNORE
        for relation, target in zip(tokens[1:], targets[1:], strict=True):
            entity = facts[relation - 20][entity]
            assert entity == target
    answer = draw(KHop(supervision="answer"), hops=6)
    assert (answer.targets[:, :-1] == IGNORE).all()
    assert answer.answers().equal(made.answers())
    padded = draw(KHop(supervision="answer", readout="padded", max_hops=9), hops=6)
    assert padded.tokens[0].tolist()[:7] == made.tokens[0].tolist()
    assert padded.tokens[0].tolist()[7:] == [24, 24, 24, 25]
    assert padded.answers().equal(made.answers()) and padded.answer_at.tolist() == [10] * 16
    with pytest.raises(ValueError, match="hops = 10"):
        draw(KHop(readout="padded", max_hops=9), hops=10)


def test_golden_k_hop() -> None:
    """A change of these numbers changes every study."""
    made = draw(KHop(num_entities=6, num_relations=2), hops=4, batch=2)
    assert KHop(num_entities=6, num_relations=2).facts().tolist() == GOLDEN_FACTS
    assert made.tokens.tolist() == GOLDEN_TOKENS
    assert made.targets.tolist() == GOLDEN_TARGETS


@pytest.mark.parametrize("marks", [False, True])
def test_pointers_lead_where_the_pairs_say(marks: bool) -> None:
    made = draw(PointerChasing(num_entities=7, marks=marks), hops=9)
    for tokens, targets in zip(made.tokens.tolist(), made.targets.tolist(), strict=True):
        if marks:
            assert tokens[2:21:3] == [8] * 7 and targets[:7] == [IGNORE] * 7
            tokens = [token for token in tokens if token != 8]
            targets = targets[7:]
        follows = dict(zip(tokens[0:14:2], tokens[1:14:2], strict=True))
        assert sorted(follows) == sorted(follows.values()) == list(range(7))
        entity, seen = tokens[14], []
        assert tokens[15:] == [7] * 9 and targets[:15] == [IGNORE] * 15
        for target in targets[15:]:
            entity = follows[entity]
            seen.append(entity)
            assert entity == target
        assert len(set(seen[:7])) == 7


@pytest.mark.parametrize("hops", [1, 2, 4])
def test_p_hop_by_its_definition(hops: int) -> None:
    task = PHop(alphabet=3, length=20)
    made = draw(task, hops)
    for symbols, targets in zip(made.tokens.tolist(), made.targets.tolist(), strict=True):
        for i in range(20):
            place: int | None = i
            for _ in range(hops):
                if place is not None:
                    found = [j for j in range(1, place + 1) if symbols[j - 1] == symbols[place]]
                    place = max(found, default=None)
            assert targets[i] == (3 if place is None else symbols[place])


def test_composition_multiplies_permutations() -> None:
    orders = list(all_orders(range(5)))
    made = draw(Composition(), hops=4)
    for word, targets in zip(made.tokens.tolist(), made.targets.tolist(), strict=True):
        for end in range(1, 5):
            value = list(range(5))
            for factor in word[:end]:
                value = [orders[factor][x] for x in value]
            assert orders[targets[end - 1]] == tuple(value)


def test_addition_is_right_digit_by_digit() -> None:
    task = Addition(max_operands=32)
    assert task.answer_digits == 5
    made = task.write(torch.tensor([[999, 1, 23]]))
    text = "".join("0123456789+="[token] for token in made.tokens[0].tolist())
    assert text == "999+001+023=3201"
    assert made.targets[0].tolist() == [IGNORE] * 11 + [3, 2, 0, 1, 0]
    with pytest.raises(ValueError, match="hops = 33"):
        draw(task, hops=33)


def test_parity_is_the_sum_of_bits() -> None:
    made = draw(Parity(), hops=9)
    assert made.answers().equal(made.tokens.sum(dim=1) % 2)
    assert (made.targets[:, :-1] == IGNORE).all()


@pytest.mark.parametrize("hops", [1, 4, 7])
def test_only_the_right_candidate_is_reachable_and_both_are_as_deep(hops: int) -> None:
    made = draw(Reachability(num_nodes=16), hops, batch=40)
    first = 0
    for tokens, answer in zip(made.tokens.tolist(), made.answers().tolist(), strict=True):
        edges = list(zip(tokens[0:-4:2], tokens[1:-4:2], strict=True))
        assert len(edges) == 14 and tokens[-4] == 32
        depth = {tokens[-3]: 0}
        for _ in edges:
            depth |= {v: depth[u] + 1 for u, v in edges if u in depth}
        candidates = tokens[-2:]
        assert [c in depth for c in candidates] == [c == answer for c in candidates]
        assert depth[answer] == hops
        first += candidates[0] == answer
    assert 8 < first < 32


def test_facts_and_chains_are_those_of_their_tables() -> None:
    task = FactsAndChains(num_subjects=9, num_attributes=5, facts_per_row=3)
    values, first = task.values().tolist(), task.chains.vocab_size
    made, chain_facts = draw(task, hops=4, batch=200), task.chains.facts().tolist()
    seen = set()
    for tokens, targets in zip(made.tokens.tolist(), made.targets.tolist(), strict=True):
        for column in task.fact_columns().tolist():
            subject, attribute = tokens[column - 1] - first, tokens[column] - first - 9
            assert targets[column - 1] == IGNORE
            assert targets[column] == first + values[attribute][subject]
            seen.add((subject, attribute))
        entity = tokens[6]
        for relation, target in zip(tokens[7:], targets[7:], strict=True):
            entity = chain_facts[relation - 20][entity]
            assert target == entity
    assert len(seen) == task.num_facts == 45  # every fact is asked, by every pair of tokens
    assert made.answers().equal(made.targets[:, -1])
    assert not FactsAndChains(facts_seed=1).values().equal(FactsAndChains().values())


def test_what_is_written_is_what_each_hop_reaches() -> None:
    task = WrittenHops(max_hops=7)
    made, plain = draw(task, hops=5), draw(KHop(), hops=5)
    assert made.answers().equal(plain.answers())
    assert task.prompts(made).shape == (16, 9)
    rows = zip(made.tokens.tolist(), made.targets.tolist(), plain.targets.tolist(), strict=True)
    for tokens, targets, reached in rows:
        assert tokens[6:8] == [task.chains.padding] * 2 and tokens[8] == tokens[0]
        assert targets[:8] == [IGNORE] * 8 and targets[8:] == reached[1:]
        assert tokens[9:] == reached[1:-1]  # each token written is the one before's target
    with pytest.raises(ValueError, match="hops = 8"):
        draw(task, hops=8)
