"""Which experts tokens are routed to, loop by loop, and whether it matters."""

import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from openmythos.model.mythos import OpenMythos
from openmythos.nn.block import Block
from openmythos.nn.moe import MoELayer, Router, Routing


def router_of(model: OpenMythos) -> Router:
    """The router of the first recurrent layer."""
    block = model.recurrent.layers[0]
    assert isinstance(block, Block) and isinstance(block.feed_forward, MoELayer)
    return block.feed_forward.router


def chosen_experts(model: OpenMythos, tokens: Tensor, num_loops: int) -> Tensor:
    """Indices of the experts chosen in every loop, [loops, positions, top_k]; first layer only."""
    seen: list[Tensor] = []
    handle = router_of(model).register_forward_hook(
        lambda _module, _inputs, output: seen.append(output.chosen)
    )
    try:
        with torch.no_grad():
            model.eval()(tokens, num_loops=num_loops)
    finally:
        handle.remove()
    return torch.stack(seen)


@contextmanager
def experts_of_another_loop(model: OpenMythos, other: Callable[[int], int]) -> Iterator[None]:
    """Within it, loop t = 0, 1, ... of the first recurrent layer uses the experts of loop other(t).

    `other(t)` is at most t; the experts are those that the unforced router chose in that loop of
    the same pass. Their weights are this loop's own scores of them. For passes without padding,
    halting and exit rules: all positions run all loops. Call `model` once per entry.
    """
    router, own = router_of(model), []

    def hook(_module: Router, _inputs: object, routing: Routing) -> Routing:
        own.append(routing.chosen)
        chosen = own[other(len(own) - 1)]
        config, weights = router.config, routing.scores.gather(1, chosen)
        if config.normalize_top_k:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return routing._replace(chosen=chosen, weights=weights * config.route_scale)

    handle = router.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def members(chosen: Tensor, num_experts: int) -> Tensor:
    """Of indices [loops, positions, top_k], [loops, positions, num_experts], True if chosen."""
    shape = (*chosen.shape[:2], num_experts)
    return torch.zeros(shape, dtype=torch.bool, device=chosen.device).scatter(2, chosen, True)


def jaccard_matrix(chosen: Tensor) -> Tensor:
    """Mean Jaccard index of the experts of every two loops, [loops, loops]."""
    member = members(chosen, int(chosen.max()) + 1).float()
    both = torch.einsum("ipe,jpe->ijp", member, member)
    return (both / (2 * chosen.shape[-1] - both)).mean(dim=-1)


def overlap(chosen: Tensor) -> dict[str, float]:
    """Means over tokens: Jaccard index of two loops' experts; distinct experts / top_k."""
    matrix = jaccard_matrix(chosen)
    pairs = [float(matrix[i, j]) for i, j in itertools.combinations(range(len(chosen)), 2)]
    union = members(chosen, int(chosen.max()) + 1).any(dim=0).sum(dim=1) / chosen.shape[-1]
    return {"jaccard": statistics.mean(pairs), "union_over_top_k": float(union.mean())}


def chance_overlap(num_experts: int, top_k: int) -> float:
    """Expected Jaccard index of two independent random sets of top_k experts."""
    ways = math.comb(num_experts, top_k)
    return sum(
        math.comb(top_k, same)
        * math.comb(num_experts - top_k, top_k - same)
        / ways
        * same
        / (2 * top_k - same)
        for same in range(top_k + 1)
    )


def max_violation(chosen: Tensor, num_experts: int) -> float:
    """MaxVio of indices of any shape: (largest load - mean load) / mean load."""
    load = torch.bincount(chosen.flatten(), minlength=num_experts).float()
    return float(load.max() / load.mean() - 1)
