"""The training loss: cross-entropy at one or several loops, plus costs of routers and halting."""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch

from openmythos.config import require_number
from openmythos.distributed.ranks import mean_over_ranks
from openmythos.model.config import MythosConfig
from openmythos.model.inputs import CollectLoops
from openmythos.model.outputs import MythosLosses
from openmythos.nn.moe import MoE
from openmythos.recurrence.halting import ACT
from openmythos.types import Scalar


@dataclass(frozen=True, kw_only=True)
class FinalLoss:
    """Cross-entropy after each sequence's last loop."""

    kind: Literal["final"] = "final"
    collect_loops: ClassVar[CollectLoops] = ()


@dataclass(frozen=True, kw_only=True)
class DeepSupervision:
    """Also cross-entropy after every earlier loop, its mean weighted by `weight`."""

    kind: Literal["deep"] = "deep"
    weight: float = 0.5
    collect_loops: ClassVar[CollectLoops] = "all"

    def __post_init__(self) -> None:
        require_number("weight", self.weight, above=0, at_most=1e6)


Loss = FinalLoss | DeepSupervision


class LossParts(NamedTuple):
    """`total` is what is minimised; the parts are unweighted."""

    total: Scalar
    cross_entropy: Scalar
    balance: Scalar  # mean over MoE layers and sequences of sum f P; 1 = perfect balance
    z: Scalar
    ponder_cost: Scalar


def training_loss(losses: MythosLosses, loss: Loss, config: MythosConfig) -> LossParts:
    """All parts of the loss of one micro-batch; its mean over ranks is that of all their rows."""
    cross_entropy = losses.cross_entropy
    total = cross_entropy
    if isinstance(loss, DeepSupervision):
        total = total + loss.weight * torch.stack(list(losses.by_loop.values())).mean()
    zero = cross_entropy.new_zeros(())
    balance, z = zero, zero
    # Of rows that loop more often, here or on another rank, there is more to average over.
    sizes = mean_over_ranks([x for s in losses.router.values() for x in (s.sequences, s.tokens)])
    for index, (name, stats) in enumerate(losses.router.items()):
        inside = name.startswith("recurrent")
        moe = config.recurrent_feed_forward if inside else config.feed_forward
        assert isinstance(moe, MoE)
        layer_balance = stats.balance / sizes[2 * index].clamp_min(1)
        layer_z = stats.z / sizes[2 * index + 1].clamp_min(1)
        total = total + moe.balance_weight * layer_balance + moe.z_weight * layer_z
        balance = balance + layer_balance / len(losses.router)
        z = z + layer_z / len(losses.router)
    ponder_cost = losses.recurrence.ponder_cost
    if isinstance(config.halting, ACT) and ponder_cost is not None:
        total = total + config.halting.ponder_weight * ponder_cost
    return LossParts(total, cross_entropy, balance, z, zero if ponder_cost is None else ponder_cost)
