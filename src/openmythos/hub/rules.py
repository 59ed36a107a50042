"""Tables of tensors: which of a checkpoint's become which of ours, and back.

A `Rule` names some of their tensors and some of ours, and has the change in both directions. A
format is a list of rules that covers every tensor of either side.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from openmythos.model.config import MythosConfig

Change = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class MismatchError(Exception):
    """Tensors that do not have the values that a rule needs; the text says which."""


@dataclass(frozen=True)
class Rule:
    """`forward` makes `ours` of `theirs`, `back` the reverse.

    `optional`: skipped where the checkpoint lacks its first tensor, and not written.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    forward: Change
    back: Change
    optional: bool = False

    def then(self, forward: Change, back: Change) -> "Rule":
        """The same rule with one more change on our side."""
        return replace(
            self,
            forward=lambda x: forward(self.forward(x)),
            back=lambda x: self.back(back(x)),
        )


def same(theirs: str, ours: str) -> Rule:
    """Only the name differs."""
    return Rule((theirs,), (ours,), lambda x: x, lambda x: x)


def stacked(theirs: Sequence[str], ours: str, sizes: Sequence[int], dim: int = 0) -> Rule:
    """Ours is theirs, concatenated along `dim`; `sizes` are theirs along it."""
    return Rule(
        tuple(theirs),
        (ours,),
        lambda x: [torch.cat([_sized(t, n, dim) for t, n in zip(x, sizes, strict=True)], dim)],
        lambda x: [part.contiguous() for part in torch.split(x[0], list(sizes), dim)],
    )


def fused(theirs: str, ours: Sequence[str], sizes: Sequence[int], dim: int = 0) -> Rule:
    """Theirs is ours, concatenated along `dim`."""

    def split(x: Sequence[Tensor]) -> Sequence[Tensor]:
        return [
            part.contiguous()
            for part in torch.split(_sized(x[0], sum(sizes), dim), list(sizes), dim)
        ]

    return Rule((theirs,), tuple(ours), split, lambda x: [torch.cat(list(x), dim)])


def _sized(x: Tensor, size: int, dim: int) -> Tensor:
    if x.ndim <= dim or x.shape[dim] != size:
        raise MismatchError(f"has shape {list(x.shape)}, must have {size} along dimension {dim}")
    return x


def interleaved(rule: Rule, head_dim: int, parts: int = 1) -> Rule:
    """Reorder the rows of every head from pairs (2i, 2i + 1) to pairs (i, i + head_dim / 2).

    Of the first `parts` tensors of ours. Scores do not change if queries and keys are reordered.
    """

    def halves(x: Tensor) -> Tensor:
        pairs = x.reshape(-1, head_dim // 2, 2, *x.shape[1:])
        return pairs.transpose(1, 2).reshape(x.shape)

    def pairs(x: Tensor) -> Tensor:
        two = x.reshape(-1, 2, head_dim // 2, *x.shape[1:])
        return two.transpose(1, 2).reshape(x.shape)

    return rule.then(
        lambda x: [*map(halves, x[:parts]), *x[parts:]],
        lambda x: [*map(pairs, x[:parts]), *x[parts:]],
    )


def scaled(rule: Rule, factor: float) -> Rule:
    """Ours is `factor` times theirs."""
    return rule.then(lambda x: [t * factor for t in x], lambda x: [t / factor for t in x])


def plus_one(theirs: str, ours: str) -> Rule:
    """Norm weights that are stored without their 1; in fp32, where the sum loses least."""
    return same(theirs, ours).then(
        lambda x: [t.to(torch.promote_types(t.dtype, torch.float32)) + 1 for t in x],
        lambda x: [t.to(torch.promote_types(t.dtype, torch.float32)) - 1 for t in x],
    )


def reshaped(theirs: str, ours: str, their_shape: Sequence[int], our_shape: Sequence[int]) -> Rule:
    """The same numbers in another shape."""

    def view(x: Sequence[Tensor], given: Sequence[int], wanted: Sequence[int]) -> Sequence[Tensor]:
        if list(x[0].shape) != list(given):
            raise MismatchError(f"has shape {list(x[0].shape)}, must be {list(given)}")
        return [x[0].reshape(*wanted)]

    return Rule(
        (theirs,),
        (ours,),
        lambda x: view(x, their_shape, our_shape),
        lambda x: view(x, our_shape, their_shape),
    )


def copies(theirs: str, *ours: str) -> Rule:
    """One tensor of theirs is several of ours; only equal ones can be written."""

    def one(x: Sequence[Tensor]) -> Sequence[Tensor]:
        if not all(torch.equal(x[0], other) for other in x[1:]):
            raise MismatchError(f"{' and '.join(ours)} differ, the format has one tensor for them")
        return [x[0]]

    return Rule((theirs,), ours, lambda x: [x[0].clone() for _ in ours], one)


def constant(ours: str, shape: Sequence[int], value: float) -> Rule:
    """A tensor that the format does not have: `value` everywhere."""

    def absent(x: Sequence[Tensor]) -> Sequence[Tensor]:
        if not bool((x[0] == value).all()):
            raise MismatchError(
                f"{ours} is not {value:g} everywhere, the format has no tensor for it"
            )
        return []

    return Rule((), (ours,), lambda _x: [torch.full(tuple(shape), value)], absent)


def tied(head: str, embedding: str) -> Rule:
    """A second copy of the embedding, which must be equal to it bit for bit."""

    def equal(x: Sequence[Tensor]) -> Sequence[Tensor]:
        if not x[0].is_meta and not torch.equal(*x):
            raise MismatchError(f"differs from {embedding}, but the config ties them")
        return []

    return Rule((head, embedding), (), equal, lambda x: x, optional=True)


def under(theirs: str, ours: str, rules: Iterable[Rule]) -> list[Rule]:
    """The rules with prefixes before their names and ours."""
    return [
        replace(
            rule,
            theirs=tuple(theirs + name for name in rule.theirs),
            ours=tuple(ours + name for name in rule.ours),
        )
        for rule in rules
    ]


def layers(config: MythosConfig) -> list[tuple[str, int]]:
    """(our prefix, index within its part) of every layer, in the order in which they first run."""
    parts = {
        "prelude": config.prelude_layers,
        "recurrent.layers": config.recurrent_layers,
        "coda": config.coda_layers,
    }
    return [(f"{part}.{i}.", i) for part, number in parts.items() for i in range(number)]
