"""Expert parallelism: tokens are dispatched to the ranks of their experts, outputs combined."""

from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from openmythos.kernels.experts import ExpertWeights, count_rows, routed_experts
from openmythos.kernels.precision import as_autocast


class Dispatched(NamedTuple):
    """The rows that this rank received for its local experts."""

    rows: Tensor  # [received, dim]
    expert: Tensor  # [received], counted from the first expert of this rank
    sizes: tuple[list[int], list[int]]  # rows sent to and received from each rank


@runtime_checkable
class TokenDispatcher(Protocol):
    """Dispatches rows to the ranks of their experts; combines the outputs in the same order.

    Both calls are collective: a rank without rows calls them with an empty batch.
    """

    def dispatch(self, rows: Tensor, counts: Tensor) -> Dispatched:
        """Send rows [rows, dim], sorted by expert; counts [num_experts] has the rows of each."""
        ...

    def combine(self, results: Tensor, dispatched: Dispatched) -> Tensor:
        """The expert outputs [rows, dim] of the rows that this rank sent, in their order."""
        ...


def dispatched_experts(
    tokens: Tensor,
    row_weights: Tensor,
    chosen: Tensor,
    weights: ExpertWeights,
    num_experts: int,
    dispatcher: TokenDispatcher,
) -> Tensor:
    """`routed_experts` with expert parallelism: `weights` has the local of num_experts experts."""
    tokens = as_autocast(tokens)
    choices, top_k = chosen.flatten(), chosen.shape[-1]
    order = choices.argsort()
    # One row per choice, so that their gradients are summed in a fixed order.
    rows = tokens[:, None].expand(-1, top_k, -1).flatten(0, 1).index_select(0, order)
    received = dispatcher.dispatch(rows, count_rows(choices, num_experts))
    ones = received.rows.new_ones(len(received.rows), 1)
    results = routed_experts(received.rows, ones, received.expert[:, None], weights)
    returned = dispatcher.combine(results, received).index_select(0, order.argsort())
    returned = returned.view(*chosen.shape, returned.shape[-1])
    return (returned * row_weights.to(returned.dtype)[..., None]).sum(dim=1)
