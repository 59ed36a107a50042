"""The training loss: cross-entropy at one or several loops, plus costs of routers and halting."""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch

from openmythos.config import require, require_number
from openmythos.distributed.ranks import mean_over_ranks
from openmythos.model.config import MythosConfig
from openmythos.model.inputs import CollectLoops
from openmythos.model.mythos import OpenMythos
from openmythos.model.outputs import MythosLosses
from openmythos.nn.block import Block
from openmythos.types import Scalar


@dataclass(frozen=True, kw_only=True)
class FinalLoss:
    """Cross-entropy after each sequence's last loop."""

    kind: Literal["final"] = "final"
    collect_loops: ClassVar[CollectLoops] = ()
    by_halting: ClassVar[bool] = False

    def check(self, config: MythosConfig) -> None:
        """Any model will do."""

    def of(self, losses: MythosLosses) -> Scalar:
        return losses.cross_entropy


@dataclass(frozen=True, kw_only=True)
class DeepSupervision(FinalLoss):
    """Also cross-entropy after every earlier loop, its mean weighted by `weight`."""

    kind: Literal["deep"] = "deep"  # type: ignore[assignment]
    weight: float = 0.5
    collect_loops: ClassVar[CollectLoops] = "all"

    def __post_init__(self) -> None:
        require_number("weight", self.weight, above=0, at_most=1e6)

    def of(self, losses: MythosLosses) -> Scalar:
        every = torch.stack(list(losses.by_loop.values()))
        return losses.cross_entropy + self.weight * every.mean()


@dataclass(frozen=True, kw_only=True)
class ExpectedLoss(FinalLoss):
    """Cross-entropy after every loop, by the probability that halting gives it, per position."""

    kind: Literal["expected"] = "expected"  # type: ignore[assignment]
    collect_loops: ClassVar[CollectLoops] = "all"
    by_halting: ClassVar[bool] = True

    def check(self, config: MythosConfig) -> None:
        text = 'must be "final" or "deep" for a model without halting'
        require(config.halting.kind != "none", "loss.kind", self.kind, text)

    def of(self, losses: MythosLosses) -> Scalar:
        return torch.stack(list(losses.by_loop.values())).sum()


Loss = FinalLoss | DeepSupervision | ExpectedLoss


class LossParts(NamedTuple):
    """`total` is what is minimised; the parts are unweighted."""

    total: Scalar
    cross_entropy: Scalar
    balance: Scalar  # mean over MoE layers and sequences of sum f P; 1 = perfect balance
    z: Scalar
    ponder_cost: Scalar


def training_loss(
    losses: MythosLosses, loss: Loss, model: OpenMythos, *, pondering: bool = True
) -> LossParts:
    """The loss of one micro-batch; the mean over ranks is the loss of the rows of all ranks.

    `pondering`: whether the cost of halting is part of it.
    """
    total = loss.of(losses)
    zero = losses.cross_entropy.new_zeros(())
    balance, z = zero, zero
    # Rows with more loops are routed more often: divide by the mean size over ranks.
    sizes = mean_over_ranks([x for s in losses.router.values() for x in (s.sequences, s.tokens)])
    for index, (name, stats) in enumerate(losses.router.items()):
        layer = model.get_submodule(name)
        assert isinstance(layer, Block)
        layer_balance = stats.balance / sizes[2 * index].clamp_min(1)
        layer_z = stats.z / sizes[2 * index + 1].clamp_min(1)
        total = total + layer.feed_forward.router_loss(layer_balance, layer_z)
        balance = balance + layer_balance / len(losses.router)
        z = z + layer_z / len(losses.router)
    ponder_cost, halting = losses.recurrence.ponder_cost, model.recurrent.halting
    if halting is not None and ponder_cost is not None and pondering:
        total = total + halting.loss(ponder_cost)
    ponder_cost = zero if ponder_cost is None else ponder_cost
    return LossParts(total, losses.cross_entropy, balance, z, ponder_cost)
