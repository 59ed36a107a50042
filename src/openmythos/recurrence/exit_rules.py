"""Exit rules: at inference, when a position stops looping because further loops change little.

They work for any model, trained for it or not. With scope "token" or "prefix" a position that has
stopped keeps its state and its keys and values, and costs no feed-forward compute in later loops.
With scope "sequence" it goes on for the sake of later positions, and only its output is kept.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from openmythos.config import require_int, require_number
from openmythos.recurrence.trace import RecurrentOutput
from openmythos.types import Hidden, Logits, Mask, PerToken

Scope = Literal["token", "prefix", "sequence"]


class LoopView(NamedTuple):
    """What an exit rule sees after a loop; the logits are those of coda and head."""

    previous: Hidden
    state: Hidden
    previous_logits: Logits | None
    logits: Logits | None


class LoopStates(NamedTuple):
    """State before and after a loop, and the coda's input if the loops ended after it."""

    previous: Hidden
    state: Hidden
    output: Hidden


@runtime_checkable
class EarlyExit(Protocol):
    """Interface of exit rules but `FixedExit`: the config of a rule is the rule.

    A position exits once `converged` was True in `patience` loops in a row, after `min_loops`; for
    `scope` see `_Converging`, which has these fields for a rule to inherit.
    """

    @property
    def needs_logits(self) -> bool:
        """Whether `LoopView.logits` are computed for the rule."""

    @property
    def min_loops(self) -> int: ...
    @property
    def patience(self) -> int: ...
    @property
    def scope(self) -> Scope: ...

    def converged(self, view: LoopView) -> Mask:
        """[batch, seq], True where a further loop would change little."""


@dataclass(frozen=True, kw_only=True)
class FixedExit:
    """Never exits early; `num_loops` sets the number of loops."""

    kind: Literal["fixed"] = "fixed"
    needs_logits: ClassVar[bool] = False

    def converged(self, view: LoopView) -> Mask:
        return torch.zeros(view.state.shape[:2], dtype=torch.bool, device=view.state.device)


@dataclass(frozen=True, kw_only=True)
class _Converging(ABC):
    """A position exits once it has converged in `patience` loops in a row, after `min_loops`.

    With `scope` "prefix" or "sequence" it also waits for all earlier positions. "prefix" stops a
    position there, so that later ones are computed on a state that was not quite done. "sequence"
    stops none until the last has converged: what the coda gets of a position equals that of a pass
    of as many loops without a rule. A cached token keeps the keys and values of its own pass.
    """

    needs_logits: ClassVar[bool]
    min_loops: int = 1
    patience: int = 1
    scope: Scope = "token"

    def __post_init__(self) -> None:
        require_int("min_loops", self.min_loops, minimum=1)
        require_int("patience", self.patience, minimum=1)

    @abstractmethod
    def converged(self, view: LoopView) -> Mask:
        """[batch, seq], True where a further loop would change little."""


@dataclass(frozen=True, kw_only=True)
class StateChangeExit(_Converging):
    """|h' - h| / |h'| < threshold (Huginn's latent difference, 0.03)."""

    kind: Literal["state_change"] = "state_change"
    threshold: float = 0.03
    needs_logits = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("threshold", self.threshold, above=0)

    def converged(self, view: LoopView) -> Mask:
        change = (view.state - view.previous).float().norm(dim=-1)
        return change < self.threshold * view.state.float().norm(dim=-1)


@dataclass(frozen=True, kw_only=True)
class KLExit(_Converging):
    """KL(p_loop || p_{loop-1}) < threshold (Huginn, 5e-4)."""

    kind: Literal["kl"] = "kl"
    threshold: float = 5e-4
    needs_logits = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("threshold", self.threshold, above=0)

    def converged(self, view: LoopView) -> Mask:
        return _kl(view) < self.threshold


@dataclass(frozen=True, kw_only=True)
class KLEntropyExit(_Converging):
    """KL < threshold and entropy H(p_loop) < max_entropy nats (Loop, Think & Generalize)."""

    kind: Literal["kl_entropy"] = "kl_entropy"
    threshold: float = 1e-3
    max_entropy: float = 3.0
    needs_logits = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("threshold", self.threshold, above=0)
        require_number("max_entropy", self.max_entropy, above=0)

    def converged(self, view: LoopView) -> Mask:
        assert view.logits is not None
        log_p = F.log_softmax(view.logits.float(), dim=-1)
        entropy = -(log_p.exp() * log_p).sum(dim=-1)
        return (_kl(view) < self.threshold) & (entropy < self.max_entropy)


@dataclass(frozen=True, kw_only=True)
class ArgmaxExit(_Converging):
    """The most likely token is the same as after the loop before (`patience` times in a row)."""

    kind: Literal["argmax"] = "argmax"
    patience: int = 5
    needs_logits = True

    def converged(self, view: LoopView) -> Mask:
        assert view.logits is not None and view.previous_logits is not None
        return view.logits.argmax(dim=-1) == view.previous_logits.argmax(dim=-1)


ExitRule = FixedExit | StateChangeExit | KLExit | KLEntropyExit | ArgmaxExit


def _kl(view: LoopView) -> PerToken:
    assert view.logits is not None and view.previous_logits is not None
    log_p = F.log_softmax(view.logits.float(), dim=-1)
    log_q = F.log_softmax(view.previous_logits.float(), dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


class ExitTracker:
    """Applies an exit rule loop by loop to one forward pass.

    `readout` maps (state, loop) to logits and is called only for rules that need them. `valid`
    [batch, seq] is False at padding, `not_before` [batch] is the largest number of loops that a
    cached token ran (prefix scope).
    """

    def __init__(
        self,
        rule: EarlyExit,
        readout: Callable[[Hidden, int], Logits],
        valid: Mask,
        not_before: Tensor | None,
    ) -> None:
        self.rule = rule
        self._readout = readout
        self._valid = valid
        self._not_before = not_before
        self._streak = torch.zeros(valid.shape, dtype=torch.long, device=valid.device)
        self._logits: Tensor | None = None
        self._exited = torch.zeros_like(valid)  # scope "sequence" only, as are the next two
        self._output: Tensor | None = None
        self._loops = self._streak
        self.loops_run = 0

    def update(self, view: LoopStates, active: Mask, loop: int) -> Mask:
        """Of the `active` positions, those that run another loop."""
        rule = self.rule
        self.loops_run = loop + 1
        logits = self._readout(view.output, loop) if rule.needs_logits else None
        # After the first loop there are no earlier logits to compare with.
        if not rule.needs_logits or self._logits is not None:
            converged = rule.converged(LoopView(view.previous, view.state, self._logits, logits))
            self._streak = torch.where(converged, self._streak + 1, 0)
        self._logits = logits
        if loop + 1 < rule.min_loops:
            return active
        leaves = (self._streak >= rule.patience) | ~active
        if rule.scope != "token":
            # Padding and positions that have already stopped do not block later positions.
            leaves = (leaves | self._exited | ~self._valid).long().cummin(dim=1).values.bool()
            if self._not_before is not None:
                leaves = leaves & (loop + 1 >= self._not_before[:, None])
        if rule.scope == "sequence":
            self._keep_outputs(leaves & ~self._exited, view.output, loop + 1)
            leaves = self._exited.all(dim=1, keepdim=True)
        return active & ~leaves

    def _keep_outputs(self, exits: Mask, output: Hidden, loops: int) -> None:
        kept = output if self._output is None else self._output
        self._output = torch.where(exits[..., None], output, kept)
        self._loops = torch.where(exits, loops, self._loops)
        self._exited = self._exited | exits

    def finish(self, out: RecurrentOutput) -> RecurrentOutput:
        """The output of the loops; with scope "sequence" every position's from where it exited."""
        if self._output is None:
            return out
        state = torch.where(self._exited[..., None], self._output, out.state)
        loops = torch.where(self._exited, self._loops, out.loops_used)
        return replace(out, state=state, loops_used=loops)
