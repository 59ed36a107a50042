"""Tiny models over every member of every union, so that a new member is tested by being there.

A member is built from its defaults, shrunk by field name; its Literal and bool fields give further
variants. `VARIANTS` covers every pair of choices (not every combination) with few models.
"""

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from openmythos.config import ConfigError
from openmythos.model.config import MythosConfig
from openmythos.model.mythos import OpenMythos
from openmythos.nn.block import Attention, FeedForward
from openmythos.nn.cache import CachePolicy
from openmythos.recurrence.conditioning import LoopEmbeddings, LoopLoRAs
from openmythos.recurrence.halting import ExitRule, Halting
from openmythos.recurrence.injection import Injection
from openmythos.recurrence.recurrent_block import StateInit

VOCAB, DIM, SEQ = 50, 32, 12

# Sizes by field name, for every config that has such a field.
SIZES: dict[str, Any] = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "kv_latent_dim": 8,
    "q_latent_dim": 12,
    "nope_head_dim": 8,
    "rope_head_dim": 4,
    "value_head_dim": 8,
    "hidden_dim": 24,
    "num_experts": 4,
    "expert_dim": 16,
    "rank": 2,
    "num_loops": 2,  # per-loop parameters: fewer than the loops that tests run
    "targets": ("*",),
    "bias_init": -0.5,
    "patience": 1,
}
# What makes a rule fire in some of a few loops of an untrained model.
TUNED: dict[str, dict[str, Any]] = {
    "state_change": {"threshold": 0.12},
    "kl": {"threshold": 0.002},
    "kl_entropy": {"threshold": 0.002, "max_entropy": 3.7},
    "argmax": {"patience": 2},
}
# Values that switch something off or on, beside the Literal and bool fields.
EDGES: dict[str, Any] = {
    "window": 4,
    "q_latent_dim": 0,
    "num_shared_experts": 0,
    "min_loops": 3,
    "group": 3,
}


def tiny(cls: type, **changes: Any) -> Any:
    """A small instance of one member of a union."""
    names = {field.name for field in fields(cls)}
    sizes = {name: size for name, size in SIZES.items() if name in names}
    kind = get_args(get_type_hints(cls)["kind"])[0]
    return cls(**(sizes | TUNED.get(kind, {}) | changes))


def members(union: Any) -> list[Any]:
    """One small instance per member."""
    return [tiny(member) for member in get_args(union) or (union,)]


def variations(union: Any) -> list[Any]:
    """Every member, and every member with one choice made differently."""
    found = []
    for base in members(union):
        found.append(base)
        hints = get_type_hints(type(base))
        for field in fields(base):
            name, wanted, now = field.name, hints[field.name], getattr(base, field.name)
            others: list[Any] = [EDGES[name]] if name in EDGES else []
            if wanted is bool:
                others = [not now]
            elif get_origin(wanted) is Literal:
                others = [choice for choice in get_args(wanted) if choice != now]
            found += [replace(base, **{name: other}) for other in others]
    return found


def name_of(part: Any) -> str:
    """A short test id that says what differs from the small default."""
    if not hasattr(part, "kind"):
        return str(part)
    usual = tiny(type(part))
    changed = [
        f"{field.name}={getattr(part, field.name)}"
        for field in fields(part)
        if getattr(part, field.name) != getattr(usual, field.name)
    ]
    return " ".join([part.kind, *changed])


def tiny_config(**parts: Any) -> MythosConfig:
    """A small config; an injection that dictates the initial state gets the one that it wants."""
    usual = {"vocab_size": VOCAB, "dim": DIM, "context": 2 * SEQ, "zero_init_outputs": False}
    usual |= {"num_loops": 3, "attention": members(Attention)[0]}
    usual |= {"feed_forward": members(FeedForward)[0]}
    usual |= {
        "recurrent_feed_forward": members(FeedForward)[-1],
        "loop_lora": members(LoopLoRAs)[0],
    }
    usual |= parts
    wanted = usual.pop("state_init", "zeros")
    refused: ConfigError | None = None
    for state_init in (wanted, *get_args(StateInit)):
        try:
            return MythosConfig(**usual, state_init=state_init)
        except ConfigError as error:
            if not str(error).startswith("state_init"):
                raise
            refused = refused or error
    raise refused or AssertionError


def pairwise(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Few combinations in which every two values of two axes meet at least once (greedy)."""
    rng = random.Random(0)
    indices = {name: range(len(values)) for name, values in axes.items()}
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(axes, 2)
        for i, j in itertools.product(indices[a], indices[b])
    }
    rows: list[dict[str, int]] = []
    while missing:
        # Start from a pair not met yet, then give each other axis its most useful value.
        row = dict(min(missing, key=repr))
        for name in rng.sample(sorted(set(axes) - set(row)), len(axes) - len(row)):
            gain = [len(_pairs({**row, name: i}, axes) & missing) for i in indices[name]]
            best = [i for i in indices[name] if gain[i] == max(gain)]
            row[name] = rng.choice(best)
        missing -= _pairs(row, axes)
        rows.append(row)
    return [{name: axes[name][i] for name, i in row.items()} for row in rows]


def _pairs(row: Mapping[str, int], axes: Mapping[str, Any]) -> set[tuple[Any, Any]]:
    return set(itertools.combinations([(name, row[name]) for name in axes if name in row], 2))


AXES: dict[str, list[Any]] = {
    "attention": variations(Attention),
    "recurrent_feed_forward": variations(FeedForward),
    "injection": variations(Injection),
    "halting": variations(Halting),
    "feed_forward": members(FeedForward),
    "loop_embedding": variations(LoopEmbeddings),
    "loop_lora": variations(LoopLoRAs),
    "state_init": list(get_args(StateInit)),
    "prelude_layers": [0, 1],
    "recurrent_layers": [1, 2],
    "coda_layers": [1, 0],
    "prelude_norm": [True, False],
    "tie_embeddings": [True, False],
}


def _variant_id(parts: Mapping[str, Any]) -> str:
    return ", ".join(name_of(parts[name]) for name in list(AXES)[:4])


def _usual(part: Any) -> Any:
    return tiny(type(part)) if hasattr(part, "kind") else part


_MEMBERS = {name: [v for v in values if v == _usual(v)] for name, values in AXES.items()}


def _pairs_of_members() -> list[dict[str, Any]]:
    """Every pair of members, and every other variation of a member once."""
    rows = pairwise(_MEMBERS)
    others = [(n, v) for n, values in AXES.items() for v in values if v != _usual(v)]
    return rows + [rows[i % len(rows)] | {n: v} for i, (n, v) in enumerate(others)]


_ALL, _FEW = pairwise(AXES), _pairs_of_members()
VARIANTS = [tiny_config(**parts) for parts in _ALL]
VARIANT_IDS = [f"{i}: {_variant_id(parts)}" for i, parts in enumerate(_ALL)]
# For what costs more and depends less on details.
FEW_VARIANTS = [tiny_config(**parts) for parts in _FEW]
FEW_VARIANT_IDS = [f"{i}: {_variant_id(parts)}" for i, parts in enumerate(_FEW)]

# Every combination of members of the unions that decide what a position can see or when it stops.
COMBINATIONS = [
    tiny_config(attention=a, recurrent_feed_forward=f, injection=i, halting=h)
    for a, f, i, h in itertools.product(*map(members, (Attention, FeedForward, Injection, Halting)))
]
COMBINATION_IDS = [
    "-".join((c.attention.kind, c.recurrent_feed_forward.kind, c.injection.kind, c.halting.kind))
    for c in COMBINATIONS
]

CACHE_POLICIES = variations(CachePolicy)
EXIT_RULES = [
    rule
    for base in members(ExitRule)
    for rule in (
        [replace(base, scope=scope) for scope in ("token", "prefix")]
        if hasattr(base, "scope")
        else [base]
    )
]

_RULE_PARTS = pairwise(_MEMBERS | {"rule": EXIT_RULES})
RULE_VARIANTS = [
    (tiny_config(**{name: parts[name] for name in AXES}), parts["rule"]) for parts in _RULE_PARTS
]
RULE_VARIANT_IDS = [
    f"{i}: {name_of(parts['rule'])}, {_variant_id(parts)}" for i, parts in enumerate(_RULE_PARTS)
]


def tiny_model(config: MythosConfig, seed: int = 0, scale: float = 0.1) -> OpenMythos:
    """A model in eval mode with every parameter and buffer moved off its initial value."""
    model = OpenMythos(config, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor += scale * torch.randn(tensor.shape, generator=generator)
    return model


def random_tokens(batch: int, seq: int = SEQ, seed: int = 0) -> Tensor:
    """Token ids [batch, seq]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (batch, seq), generator=generator)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Gradient of every parameter by name; one that got none counts as zero."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


def assert_gradients_close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Compare sums that were added up in another order: relative to each gradient's size."""
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        atol = 1e-6 + 1e-4 * float(gradient.abs().max())
        message = f"gradient of {name}"
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-3, atol=atol, msg=lambda m, head=message: f"{head}: {m}"
        )
