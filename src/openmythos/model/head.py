"""From hidden states to logits and losses: scale, softcap, cross-entropy."""

import torch
import torch.nn.functional as F
from torch import Tensor

from openmythos.kernels.cross_entropy import IGNORE, linear_cross_entropy
from openmythos.kernels.precision import at_least_fp32
from openmythos.model.config import MythosConfig
from openmythos.types import Hidden, Logits, PerToken, Scalar, TokenIds


def logits_of(config: MythosConfig, hidden: Hidden, weight: Tensor) -> Logits:
    """cap * tanh(scale W h / cap), or scale W h if cap = 0; weight [vocab, dim]."""
    return scaled(config, F.linear(hidden, weight))


def scaled(config: MythosConfig, logits: Logits) -> Logits:
    """cap * tanh(scale * logits / cap), or scale * logits if cap = 0."""
    if config.logit_scale != 1:
        logits = logits * config.logit_scale
    cap = config.logit_softcap
    return cap * torch.tanh(logits / cap) if cap else logits


def loss_of(config: MythosConfig, hidden: Hidden, weight: Tensor, targets: TokenIds) -> Scalar:
    """Mean cross-entropy in nats over the targets that are not IGNORE.

    Without a softcap the logits of all tokens are never in memory at once.
    """
    if config.logit_softcap:
        logits = at_least_fp32(logits_of(config, hidden, weight)).flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE)
    if config.logit_scale != 1:
        hidden = hidden * config.logit_scale
    return linear_cross_entropy(hidden, weight, targets)


def weighted_sum(logits: Logits, targets: TokenIds, weights: PerToken) -> Scalar:
    """The sum of the losses of all targets, each times its weight [batch, seq]."""
    rows = at_least_fp32(logits).flatten(0, 1)
    losses = F.cross_entropy(rows, targets.flatten(), ignore_index=IGNORE, reduction="none")
    return (losses * weights.flatten()).sum()
