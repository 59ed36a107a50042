"""Exit rules of rows that are in different loops, each at one token.

The same decisions as those of `recurrence.exit_rules.ExitTracker` on a batch of one such row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openmythos.recurrence.exit_rules import EarlyExit, LoopView


@dataclass
class RowExit:
    """What the rule of a row has seen of its token."""

    rule: EarlyExit
    streak: int = 0
    logits: Tensor | None = None  # [1, vocab] after the loop before

    def restart(self) -> None:
        self.streak, self.logits = 0, None


def leaving(
    exits: Sequence[RowExit],
    loops_run: Sequence[int],
    not_before: Sequence[int],
    previous: Tensor,
    state: Tensor,
    logits: Tensor | None,
) -> list[bool]:
    """Which rows of the same rule end their loops now.

    `not_before`: the most loops that an earlier token of the row ran. `previous` and `state`
    [rows, 1, dim] before and after the loop, `logits` [rows, 1, vocab] if the rule needs them.
    """
    rule, before = exits[0].rule, None
    if logits is not None:
        each = logits.unbind()
        # After its first loop a row has no earlier logits to compare with: not judged below.
        before = torch.stack(
            [
                now if row.logits is None else row.logits
                for row, now in zip(exits, each, strict=True)
            ]
        )
    converged = rule.converged(LoopView(previous, state, before, logits))[:, 0].tolist()
    found = []
    for index, row in enumerate(exits):
        if logits is None or row.logits is not None:
            row.streak = row.streak + 1 if converged[index] else 0
        if logits is not None:
            row.logits = logits[index]
        ends = loops_run[index] >= rule.min_loops and row.streak >= rule.patience
        found.append(ends and (rule.scope == "token" or loops_run[index] >= not_before[index]))
    return found
