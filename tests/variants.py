"""Tiny models with every member of every union: a new member is tested without further changes.

A member has its defaults, with sizes reduced by field name (`SIZES`). Literal and bool fields give
more variants. `VARIANTS` is a pairwise (all-pairs) covering of all choices by few models.

The combinations are pinned in variants.json: a new member adds combinations and does not change the
others or their ids. `python tests/variants.py` pins the added ones.
"""

import hashlib
import itertools
import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from openmythos.config import ConfigError
from openmythos.model.config import MythosConfig
from openmythos.model.mythos import OpenMythos
from openmythos.nn.block import Attention, FeedForward
from openmythos.nn.cache import CachePolicy
from openmythos.nn.feed_forward import GELU, GeGLU
from openmythos.nn.grouped_query import GroupedQueryAttention
from openmythos.nn.moe import MoE
from openmythos.nn.value_embedding import GatedValueEmbeddings
from openmythos.nn.view import LayerView
from openmythos.recurrence.exit_rules import ExitRule
from openmythos.recurrence.halting import ExitGate, Halting
from openmythos.recurrence.initial_state import SineHashState, StateInit, ZeroState
from openmythos.recurrence.injection import LTI
from openmythos.recurrence.injections import Concat, Injection
from openmythos.recurrence.loop_embedding import LoopEmbeddings
from openmythos.recurrence.loop_lora import LoopLoRAs

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
# Settings with which exit rules stop some positions of an untrained model within a few loops.
TUNED: dict[str, dict[str, Any]] = {
    "state_change": {"threshold": 0.12},
    "kl": {"threshold": 0.002},
    "kl_entropy": {"threshold": 0.002, "max_entropy": 3.7},
    "argmax": {"patience": 2},
}
# Further values to test, which switch a feature on or off like Literal and bool fields.
EDGES: dict[str, Any] = {
    "window": 4,
    "q_latent_dim": 0,
    "num_shared_experts": 0,
    "min_loops": 3,
    "group": 3,
}


# Members and fields left out of the pairwise covering; they occur in `OPTIONS`.
UNPAIRED = {"exit_gate", "geglu", "gelu", "sine_hash"}
UNPAIRED |= {"qk_norm_kind", "qk_bias", "bias", "orthogonal", "readout", "bias_decays"}


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
    """Every member with its defaults, and with one choice changed at a time."""
    found = []
    for base in members(union):
        found.append(base)
        hints = get_type_hints(type(base))
        for field in (field for field in fields(base) if field.name not in UNPAIRED):
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
    """A small config; `state_init` is replaced if the injection requires another one."""
    usual = {"vocab_size": VOCAB, "dim": DIM, "context": 2 * SEQ, "zero_init_outputs": False}
    usual |= {"num_loops": 3, "attention": members(Attention)[0]}
    usual |= {"feed_forward": members(FeedForward)[0]}
    usual |= {
        "recurrent_feed_forward": members(FeedForward)[-1],
        "loop_lora": members(LoopLoRAs)[0],
    }
    usual |= parts
    wanted = usual.pop("state_init", ZeroState())
    refused: ConfigError | None = None
    for state_init in (wanted, *members(StateInit)):
        try:
            return MythosConfig(**usual, state_init=state_init)
        except ConfigError as error:
            if not str(error).startswith("state_init"):
                raise
            refused = refused or error
    raise refused or AssertionError


Row = dict[str, str]  # the name of a value, by axis
TESTS = Path(__file__).parent
PINS = TESTS / "variants.json"
PINNED: dict[str, Any] = json.loads(PINS.read_text()) if PINS.exists() else {}


def cover(
    pinned: str, axes: Mapping[str, Sequence[Any]], singles: Sequence[tuple[str, str]] = ()
) -> list[dict[str, Any]]:
    """Pairwise covering: combinations with every pair of values of two axes, and all `singles`.

    Starts from the pinned combinations and adds what they miss. `axes` has the values to pair;
    `singles` are (axis, name of a value) that need to occur only once.
    """
    values = {
        axis: {name_of(value): value for value in (*axes[axis], *AXES.get(axis, ()))}
        for axis in axes
    }
    paired = {axis: [name_of(value) for value in axes[axis]] for axis in axes}
    rows = [_pinned_row(row, pinned, values) for row in PINNED.get(pinned, {}).get("rows", ())]
    rows += _missing_rows(rows, paired)
    pairs = len(rows)
    for number, (axis, name) in enumerate(singles):
        if not any(row[axis] == name for row in rows):
            rows.append(rows[number % pairs] | {axis: name})
    assert all(len(values[axis]) >= len(axes[axis]) for axis in axes), "two values of one name"
    return [{axis: values[axis][name] for axis, name in row.items()} for row in rows]


def _pinned_row(row: Sequence[str], pinned: str, values: Mapping[str, Mapping[str, Any]]) -> Row:
    """A row of variants.json; axes that are not in the file get their first value."""
    found = {axis: next(iter(names)) for axis, names in values.items()}
    found |= zip(PINNED[pinned]["axes"], row, strict=True)
    for axis, name in found.items():
        assert name in values.get(axis, ()), (
            f"variants.json: {pinned} has {axis} = {name}, which is no more: drop the rows with it"
        )
    return found


def _missing_rows(rows: list[Row], axes: Mapping[str, Sequence[str]]) -> list[Row]:
    """Rows with the pairs of values that do not occur in `rows`, chosen greedily."""
    rng = random.Random(0)
    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(axes, 2)
        for x, y in itertools.product(axes[a], axes[b])
    }
    for row in rows:
        missing -= _pairs(row, axes)
    added = []
    while missing:
        # Start from a missing pair; on every other axis take the value with most missing pairs.
        row = dict(min(missing, key=repr))
        for axis in rng.sample(sorted(set(axes) - set(row)), len(axes) - len(row)):
            gain = [len(_pairs({**row, axis: name}, axes) & missing) for name in axes[axis]]
            best = [name for name, won in zip(axes[axis], gain, strict=True) if won == max(gain)]
            row[axis] = rng.choice(best)
        row = {axis: row[axis] for axis in axes}
        missing -= _pairs(row, axes)
        added.append(row)
    return added


def _pairs(row: Row, axes: Mapping[str, Any]) -> set[tuple[Any, Any]]:
    return set(itertools.combinations([(axis, row[axis]) for axis in axes if axis in row], 2))


def _paired(parts: list[Any]) -> list[Any]:
    return [part for part in parts if part.kind not in UNPAIRED]


AXES: dict[str, list[Any]] = {
    "attention": variations(Attention),
    "recurrent_feed_forward": _paired(variations(FeedForward)),
    "injection": variations(Injection),
    "halting": _paired(variations(Halting)),
    "feed_forward": _paired(members(FeedForward)),
    "loop_embedding": variations(LoopEmbeddings),
    "loop_lora": variations(LoopLoRAs),
    "state_init": _paired(members(StateInit)),
    "prelude_layers": [0, 1],
    "recurrent_layers": [1, 2],
    "coda_layers": [1, 0],
    "prelude_norm": [True, False],
    "tie_embeddings": [True, False],
}


# Options left out of the pairwise covering, in combinations that occur in public models.
OPTIONS: list[dict[str, Any]] = [
    {
        "block_norms": ("input", "branch"),
        "loop_norm": "weighted",
        "final_norm": False,
        "halting": ExitGate(threshold=0.6),
    },
    {
        "block_norms": ("input", "sum"),
        "loop_norm": "plain",
        "readout_norm": True,
        "embed_scale": 3.0,
        "injection": Concat(bias=True),
    },
    {
        "block_norms": ("branch",),
        "logit_scale": 0.5,
        "injection": LTI(max_decay=1.0),
        "attention": tiny(GroupedQueryAttention, qk_norm=True, qk_norm_kind="width", head_dim=12),
        "feed_forward": tiny(GeGLU),
        "recurrent_feed_forward": tiny(GELU),
    },
    {"block_norms": ("sum",), "logit_softcap": 4.0, "readout_norm": True},
    {
        "attention": tiny(GroupedQueryAttention, qk_norm=True, qk_norm_kind="plain"),
        "value_embeddings": GatedValueEmbeddings(gate_channels=4),
        "readout_map": True,
        "injection": LTI(discretization="euler", input_map="dense", orthogonal=True),
        "prelude_layers": 2,
        "recurrent_layers": 2,
        "coda_layers": 2,
    },
    {"halting": ExitGate(threshold=0.6, readout="freeze"), "state_init": SineHashState()},
    {"halting": ExitGate(readout="expected")},
    {"feed_forward": tiny(MoE, bias_loops=2), "recurrent_feed_forward": tiny(MoE, bias_loops=2)},
]


def _variant_id(parts: Mapping[str, Any]) -> str:
    """The values of the first four axes, and a hash of all values that are not the default."""
    others = [
        f"{axis}={name_of(part)}"
        for axis, part in sorted(parts.items())
        if axis not in AXES or part != AXES[axis][0]
    ]
    digest = hashlib.sha256("; ".join(others).encode()).hexdigest()[:4]
    return f"{', '.join(name_of(parts[name]) for name in list(AXES)[:4])} #{digest}"


def _usual(part: Any) -> Any:
    return tiny(type(part)) if hasattr(part, "kind") else part


_MEMBERS = {name: [v for v in values if v == _usual(v)] for name, values in AXES.items()}
_OTHERS = [(name, name_of(v)) for name, vs in AXES.items() for v in vs if v != _usual(v)]


def _with_options(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, and for each of `OPTIONS` a copy of one row with that option set."""
    step = len(rows) // len(OPTIONS)
    return [*rows, *(row | option for row, option in zip(rows[::step], OPTIONS, strict=False))]


_ALL = cover("variants", AXES)
VARIANTS = [tiny_config(**parts) for parts in _with_options(_ALL)]
VARIANT_IDS = [_variant_id(parts) for parts in _with_options(_ALL)]
# For expensive tests that depend less on details: every pair of members, and every other variation
# once.
_FEW = cover("few", _MEMBERS, _OTHERS)
FEW_VARIANTS = [tiny_config(**parts) for parts in _with_options(_FEW)]
FEW_VARIANT_IDS = [_variant_id(parts) for parts in _with_options(_FEW)]

# All combinations of members of the unions that decide what a position sees or when it stops.
COMBINATIONS = [
    tiny_config(attention=a, recurrent_feed_forward=f, injection=i, halting=h)
    for a, f, i, h in itertools.product(
        *map(_paired, map(members, (Attention, FeedForward, Injection, Halting)))
    )
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

_RULE_PARTS = cover("rules", _MEMBERS | {"rule": EXIT_RULES})
RULE_VARIANTS = [
    (tiny_config(**{name: parts[name] for name in AXES}), parts["rule"]) for parts in _RULE_PARTS
]
RULE_VARIANT_IDS = [f"{name_of(parts['rule'])}, {_variant_id(parts)}" for parts in _RULE_PARTS]
COVERS = {"variants": _ALL, "few": _FEW, "rules": _RULE_PARTS}


class OnDevice(TorchFunctionMode):
    """Default device for tensors that tests create; the package must name its devices itself.

    So a tensor that the package creates on the wrong device makes a test fail.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func in _device_constructors() and kwargs.get("device") is None
        if not made or not Path(sys._getframe(1).f_code.co_filename).is_relative_to(TESTS):
            return func(*args, **kwargs)
        if kwargs.get("generator") is not None:  # a CPU generator: the same numbers on every device
            return func(*args, **kwargs).to(self.device)
        return func(*args, **kwargs, device=self.device)


def here() -> torch.device:
    """The device of the tests' tensors; see `OnDevice` and the fixture `device`."""
    return torch.empty(0).device


def tiny_model(config: MythosConfig, seed: int = 0, scale: float = 0.1) -> OpenMythos:
    """A model in eval mode; noise is added to all parameters and buffers."""
    model = OpenMythos(config, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor += scale * torch.randn(tensor.shape, generator=generator, device="cpu")
    return model.to(here())


def active_positions(x: Tensor, view: LayerView) -> int:
    """The number of positions that a feed-forward layer computes for these arguments."""
    return x[..., 0].numel() if view.active is None else int(view.active.sum())


def random_tokens(batch: int, seq: int = SEQ, seed: int = 0) -> Tensor:
    """Token ids [batch, seq]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (batch, seq), generator=generator)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Gradients by parameter name; zeros for a parameter without a gradient."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


def assert_gradients_close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Compare gradients up to rounding, relative to the largest element of each."""
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        atol = 1e-6 + 1e-4 * float(gradient.abs().max())
        message = f"gradient of {name}"
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-3, atol=atol, msg=lambda m, head=message: f"{head}: {m}"
        )


def pin() -> None:
    """Write the combinations to variants.json, one per line."""
    parts = []
    for name, rows in COVERS.items():
        axes = list(rows[0])
        lines = [json.dumps([name_of(row[axis]) for axis in axes]) for row in rows]
        text = ",\n    ".join(lines)
        parts.append(f'  "{name}": {{"axes": {json.dumps(axes)},\n  "rows": [\n    {text}]}}')
    PINS.write_text("{\n" + ",\n".join(parts) + "\n}\n")


if __name__ == "__main__":
    pin()
