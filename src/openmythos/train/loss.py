"""The training loss: cross-entropy at one or several loops, plus costs of routers and halting."""

import sys
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from openmythos.config import require_number
from openmythos.model.config import MythosConfig
from openmythos.model.mythos import MythosOutput
from openmythos.nn.moe import MoE
from openmythos.recurrence.halting import ACT
from openmythos.types import Logits, Scalar, TokenIds

IGNORE = -100


@dataclass(frozen=True, kw_only=True)
class FinalLoss:
    """Cross-entropy after each sequence's last loop."""

    kind: Literal["final"] = "final"
    collect_loops: ClassVar[range] = range(0)


@dataclass(frozen=True, kw_only=True)
class DeepSupervision:
    """Also cross-entropy after every earlier loop, its mean weighted by `weight`."""

    kind: Literal["deep"] = "deep"
    weight: float = 0.5
    collect_loops: ClassVar[range] = range(1, sys.maxsize)

    def __post_init__(self) -> None:
        require_number("weight", self.weight, above=0)


Loss = FinalLoss | DeepSupervision


class LossParts(NamedTuple):
    """`total` is what is minimised; the parts are unweighted."""

    total: Scalar
    cross_entropy: Scalar
    balance: Scalar  # mean over MoE layers and sequences of sum f P; 1 = perfect balance
    z: Scalar
    ponder_cost: Scalar


def training_loss(
    output: MythosOutput, targets: TokenIds, loss: Loss, config: MythosConfig
) -> LossParts:
    """All parts of the loss of one micro-batch; targets of IGNORE do not count."""
    cross_entropy = token_loss(output.logits, targets)
    total = cross_entropy
    if isinstance(loss, DeepSupervision):
        total = total + loss.weight * _loop_loss(output, targets)
    zero = cross_entropy.new_zeros(())
    balance, z = zero, zero
    for name, stats in output.router.items():
        inside = name.startswith("recurrent")
        moe = config.recurrent_feed_forward if inside else config.feed_forward
        assert isinstance(moe, MoE)
        layer_balance = stats.balance / stats.sequences.clamp_min(1)
        layer_z = stats.z / stats.tokens.clamp_min(1)
        total = total + moe.balance_weight * layer_balance + moe.z_weight * layer_z
        balance = balance + layer_balance / len(output.router)
        z = z + layer_z / len(output.router)
    ponder_cost = output.recurrence.ponder_cost
    if isinstance(config.halting, ACT) and ponder_cost is not None:
        total = total + config.halting.ponder_weight * ponder_cost
    return LossParts(total, cross_entropy, balance, z, zero if ponder_cost is None else ponder_cost)


def token_loss(logits: Logits, targets: TokenIds) -> Scalar:
    """Mean cross-entropy in nats over the targets that count."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE)


def _loop_loss(output: MythosOutput, targets: Tensor) -> Tensor:
    """Mean over loops of the cross-entropy of the rows that ran them."""
    order = output.recurrence.order
    targets = targets if order is None else targets[order]
    losses = [token_loss(logits, targets[: len(logits)]) for logits in output.loop_logits]
    return sum(losses[1:], start=losses[0]) / len(losses)
