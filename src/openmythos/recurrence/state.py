"""The state between loops, the inputs that are constant over loops, and the layers' views."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, ParamSpec, TypeVar

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from openmythos.kernels.experts import ExpertWeights
from openmythos.nn.layout import AttentionContext
from openmythos.nn.linear import Deltas
from openmythos.nn.view import Halting, KVView, LayerView, NoCache
from openmythos.recurrence.injection import Drive
from openmythos.types import Hidden, KeyValues, LoopsPerToken, Mask

P = ParamSpec("P")
T = TypeVar("T")


class LoopState(NamedTuple):
    """The state between loops; every tensor has the batch as its first dimension."""

    hidden: Hidden
    loops_used: LoopsPerToken
    active: Mask | None  # positions that still loop; None if none can stop
    halt: Any  # state of the halting layer, a tree of tensors [batch, seq, ...]
    kv: tuple[KeyValues, ...]  # of every layer, kept only if positions can stop

    def moved(
        self, hidden: Hidden, active: Mask, halt: Any, views: Sequence[LayerView]
    ) -> "LoopState":
        """The state after a loop of the active positions, in which the layers had `views`."""
        assert self.active is not None
        kept = tuple(view.kv.kept() for view in views if isinstance(view.kv, Halting))
        return LoopState(hidden, self.loops_used + self.active, active, halt, kept)

    def map(self, function: Callable[..., Tensor], *others: "LoopState") -> "LoopState":
        """Apply `function` to every tensor, together with the same tensor of each other state."""

        def mapped(*x: Any) -> Any:
            if isinstance(x[0], Tensor):
                return function(*x)
            return tree_map(mapped, *x) if x[0] else x[0]  # an empty field takes its time, too

        return LoopState(*map(mapped, self, *others))


@dataclass(frozen=True)
class LoopInputs:
    """The inputs that are constant over loops.

    `keeps_shape`: halted positions are computed too and their results dropped, so that no shape
    depends on data.
    """

    drive: Drive
    context: AttentionContext
    expert_weights: Sequence[ExpertWeights | None]  # of every layer
    collects: bool  # router statistics: in training
    columns: Tensor | None = None  # [batch, width] the packed positions; None: all
    keeps_shape: bool = False

    def rows(self, start: int, stop: int) -> "LoopInputs":
        """The inputs of a slice of the batch."""
        drive = self.drive._replace(input_term=self.drive.input_term[start:stop])
        return replace(self, drive=drive, context=self.context.select(slice(start, stop)))

    def pick(self, columns: Tensor, total: int) -> "LoopInputs":
        """The inputs at the positions `columns` [batch, width], which see up to `total` keys."""
        term, context = self.drive.input_term, self.context.pick(columns, total)
        drive = self.drive._replace(input_term=term.gather(1, index_at(columns, term)))
        return replace(self, drive=drive, context=context, columns=columns)

    def views(
        self,
        state: LoopState,
        deltas: Deltas,
        kv: Sequence[KVView] | None,
        loop: Tensor | None = None,
    ) -> list[LayerView]:
        """What each layer sees in one loop; `kv` has a view per layer, None: no cache.

        `loop`: its index, as in `LayerView`.
        """
        sources = [NoCache()] * len(self.expert_weights) if kv is None else kv
        active = None
        if state.active is not None:
            if self.keeps_shape or not bool(state.active.all()):
                active = state.active
            before = state.kv or [None] * len(sources)
            sources = [
                Halting(source, old, active, self.columns)
                for source, old in zip(sources, before, strict=True)
            ]
        computed = None if self.keeps_shape else active
        return [
            LayerView(self.context, source, deltas, weights, computed, self.collects, loop=loop)
            for source, weights in zip(sources, self.expert_weights, strict=True)
        ]


def index_at(columns: Tensor, x: Tensor) -> Tensor:
    """[batch, width] as an index into x [batch, seq, ...] along its positions."""
    return columns.view(*columns.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])


class Scheduled(nn.Module):
    """Options of the block that `recurrence.schedule` reads.

    `checkpoint_loops`: activation checkpointing of every loop. `record_norms`: record the norm of
    every loop's state. `sync_num_loops(n)`: the maximum of n over the ranks of an expert-parallel
    group.
    """

    checkpoint_loops = False
    record_norms = False
    sync_num_loops: Callable[[int], int] | None = None

    def scheduled(self, run: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call run(...) as one forward pass of this module: FSDP gathers the weights once."""
        return run(*args, **kwargs)
