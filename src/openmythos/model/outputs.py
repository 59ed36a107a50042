"""What a pass of the model returns."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from openmythos.nn.block import LayerStats
from openmythos.nn.feed_forward import RouterStats
from openmythos.recurrence.trace import RecurrentOutput
from openmythos.types import Logits, Scalar


@dataclass(frozen=True)
class MythosOutput:
    """Logits of every position, and what was recorded of the loops.

    `loop_logits[n]` are the logits after n loops, for the requested counts (see RecurrentOutput
    for rows that ran different numbers of loops). `router` has the MoE statistics by layer name,
    in training.
    """

    logits: Logits
    recurrence: RecurrentOutput
    router: Mapping[str, RouterStats]
    loop_logits: Mapping[int, Tensor]


@dataclass(frozen=True)
class MythosLosses:
    """Mean cross-entropy in nats per token after the last loop, and by number of loops.

    `by_loop` has the requested counts. If sequences ran different numbers of loops, an entry is the
    mean over those that ran that loop.
    """

    cross_entropy: Scalar
    by_loop: Mapping[int, Tensor]
    recurrence: RecurrentOutput
    router: Mapping[str, RouterStats]


def by_layer(router: Mapping[str, LayerStats]) -> dict[str, RouterStats]:
    """The statistics by layer name, of the layers that have a router; `router` has each part's."""
    return {
        f"{part}.{index}": stats
        for part, layers in router.items()
        for index, stats in enumerate(layers)
        if stats is not None
    }
