"""Choices of experts loop by loop, and passes that are made to use another loop's."""

import itertools

import pytest
import torch
from variants import random_tokens, tiny, tiny_config, tiny_model

from openmythos.analysis.routing import (
    chance_overlap,
    chosen_experts,
    experts_of_another_loop,
    jaccard_matrix,
    max_violation,
    overlap,
    router_of,
)
from openmythos.model.mythos import OpenMythos
from openmythos.nn.moe import MoE, Routing


def test_overlap_of_expert_sets() -> None:
    same = torch.tensor([[[0, 1]], [[1, 0]]])
    assert overlap(same) == {"jaccard": 1.0, "union_over_top_k": 1.0}
    half = torch.tensor([[[0, 1]], [[1, 2]]])
    assert overlap(half) == pytest.approx({"jaccard": 1 / 3, "union_over_top_k": 1.5})
    apart = torch.tensor([[[0, 1]], [[2, 3]]])
    assert overlap(apart) == {"jaccard": 0.0, "union_over_top_k": 2.0}


def test_overlaps_of_loops_are_those_of_their_sets() -> None:
    chosen = torch.stack([torch.randperm(6)[:2] for _ in range(3 * 5)]).view(3, 5, 2)
    matrix = jaccard_matrix(chosen)
    for i, j in itertools.product(range(3), repeat=2):
        pairs = zip(chosen[i].tolist(), chosen[j].tolist(), strict=True)
        shares = [len({*a} & {*b}) / len({*a} | {*b}) for a, b in pairs]
        assert float(matrix[i, j]) == pytest.approx(sum(shares) / len(shares))
    sets = [set(pair) for pair in itertools.combinations(range(6), 2)]
    shares = [len(a & b) / len(a | b) for a in sets for b in sets]
    assert chance_overlap(6, 2) == pytest.approx(sum(shares) / len(shares))
    assert max_violation(torch.tensor([[0, 0, 0, 1]]), 2) == pytest.approx(0.5)


def mixture() -> OpenMythos:
    return tiny_model(tiny_config(recurrent_feed_forward=tiny(MoE)), scale=0.3)


@torch.no_grad()
def test_a_loop_forced_to_its_own_experts_changes_nothing() -> None:
    model, tokens = mixture(), random_tokens(2)
    with experts_of_another_loop(model, lambda loop: loop):
        forced = model(tokens, num_loops=4).logits
    torch.testing.assert_close(forced, model(tokens, num_loops=4).logits)
    assert not router_of(model)._forward_hooks


@torch.no_grad()
def test_forced_loops_use_the_experts_of_the_first() -> None:
    """The same as a router whose choice is fixed from outside in every loop."""
    model, tokens = mixture(), random_tokens(2)
    chosen = chosen_experts(model, tokens, 4)
    assert overlap(chosen)["jaccard"] < 1  # else there is nothing to force
    with experts_of_another_loop(model, lambda _loop: 0):
        again = chosen_experts(model, tokens, 4)
    assert torch.equal(again[0], chosen[0])
    assert all(torch.equal(loop, chosen[0]) for loop in again)
    with experts_of_another_loop(model, lambda _loop: 0):
        forced = model(tokens, num_loops=4).logits
    router = router_of(model)

    def fixed(_module: object, _inputs: object, routing: Routing) -> Routing:
        weights = routing.scores.gather(1, chosen[0])
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return routing._replace(chosen=chosen[0], weights=weights)

    handle = router.register_forward_hook(fixed)
    by_hand = model(tokens, num_loops=4).logits
    handle.remove()
    torch.testing.assert_close(forced, by_hand)
