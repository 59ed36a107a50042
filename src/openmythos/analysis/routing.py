"""Which experts tokens are routed to, loop by loop."""

import itertools
import statistics

import torch

from openmythos.model.mythos import OpenMythos
from openmythos.nn.block import Block
from openmythos.nn.moe import MoELayer


def chosen_experts(model: OpenMythos, tokens: torch.Tensor, num_loops: int) -> torch.Tensor:
    """Indices of the experts chosen in every loop, [loops, positions, top_k]; first layer only."""
    block = model.recurrent.layers[0]
    assert isinstance(block, Block) and isinstance(block.feed_forward, MoELayer)
    seen: list[torch.Tensor] = []
    handle = block.feed_forward.router.register_forward_hook(
        lambda _module, _inputs, output: seen.append(output[1])
    )
    try:
        with torch.no_grad():
            model.eval()(tokens, num_loops=num_loops)
    finally:
        handle.remove()
    return torch.stack(seen)


def overlap(chosen: torch.Tensor) -> dict[str, float]:
    """Means over tokens: Jaccard index of two loops' experts; distinct experts / top_k."""
    loops, positions, top_k = chosen.shape
    shape = (loops, positions, int(chosen.max()) + 1)
    member = torch.zeros(shape, dtype=torch.bool, device=chosen.device)
    member = member.scatter(2, chosen, True)
    jaccard = []
    for one, other in itertools.combinations(member, 2):
        both, either = (one & other).sum(dim=1), (one | other).sum(dim=1)
        jaccard.append(float((both / either).mean()))
    union = member.any(dim=0).sum(dim=1) / top_k
    return {"jaccard": statistics.mean(jaccard), "union_over_top_k": float(union.mean())}
