"""The native layer equals its reference, a row alone equals a row in a batch, and all else falls
back to torch."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from openmythos.kernels import few_rows, few_rows_native, native
from openmythos.kernels.few_rows import (
    Delta,
    DenseWeights,
    ExpertsWeights,
    GroupedWeights,
    LatentWeights,
    LayerWeights,
    Norm,
    Places,
)

DIM, COLUMNS, SLOTS = 40, 140, 3
ROWS = 7  # one tile of four rows, one of two and one of one

needs_compiler = pytest.mark.skipif(
    native.library("few_rows") is None, reason="no C++ compiler: nothing to compare"
)


def norm(width: int, *, weighted: bool = True) -> Norm:
    return Norm(1 + 0.1 * torch.randn(width) if weighted else None, 1e-5)


def matrix(outputs: int, inputs: int) -> Tensor:
    return torch.randn(outputs, inputs) / inputs**0.5


def latent(*, query: int = 24, qk: bool = True, heads: int = 3, size: int = 10) -> LatentWeights:
    rope, value, width = 6, 20, 24
    return LatentWeights(
        heads=heads,
        nope_dim=size,
        value_dim=value,
        query=matrix(heads * (size + rope), query or DIM),
        kv_down=matrix(width + rope, DIM),
        kv_up=matrix(heads * (size + value), width),
        output=matrix(DIM, heads * value),
        kv_latent_norm=norm(width),
        query_down=matrix(query, DIM) if query else None,
        query_latent_norm=norm(query) if query else None,
        query_norm=norm(size + rope) if qk else None,
        key_norm=norm(rope) if qk else None,
    )


def grouped(
    *, kv_heads: int, size: int, kind: str = "head", bias: bool = False, heads: int = 4
) -> GroupedWeights:
    def qk_norm(count: int) -> Norm | None:
        width = count * size if kind == "width" else size
        return norm(width, weighted=kind != "plain") if kind else None

    return GroupedWeights(
        heads=heads,
        kv_heads=kv_heads,
        query=matrix(heads * size, DIM),
        key=matrix(kv_heads * size, DIM),
        value=matrix(kv_heads * size, DIM),
        output=matrix(DIM, heads * size),
        query_norm=qk_norm(heads),
        key_norm=qk_norm(kv_heads),
        norm_by_width=kind == "width",
        query_bias=torch.randn(heads * size) if bias else None,
        key_bias=torch.randn(kv_heads * size) if bias else None,
    )


def dense(hidden: int, activation: Any = "silu", *, gated: bool = True) -> DenseWeights:
    up = matrix(2 * hidden if gated else hidden, DIM)
    return DenseWeights(up=up, down=matrix(DIM, hidden), activation=activation, gated=gated)


def moe(*, softmax: bool, normalize: bool, shared: bool, loops: int = 0) -> ExpertsWeights:
    experts, hidden = 6, 16
    return ExpertsWeights(
        router=matrix(experts, DIM),
        router_bias=torch.randn(*[loops] * bool(loops), experts) / 5,
        gate_up=torch.stack([matrix(2 * hidden, DIM) for _ in range(experts)]),
        down=torch.stack([matrix(DIM, hidden) for _ in range(experts)]),
        top_k=2,
        softmax=softmax,
        normalize=normalize,
        route_scale=1.7,
        shared=dense(20) if shared else None,
    )


# (attention, features that are rotated)
ATTENTIONS = {
    "latent, qk_norm": lambda: (latent(), 6),
    "latent, no query latent": lambda: (latent(query=0, qk=False), 6),
    "latent, 9 heads, no positions": lambda: (latent(heads=9, size=32), 0),
    "grouped, biases": lambda: (grouped(kv_heads=2, size=12, bias=True), 12),
    "grouped, normed by width": lambda: (grouped(kv_heads=2, size=12, kind="width"), 8),
    "one head each, plain norm": lambda: (grouped(kv_heads=4, size=20, kind="plain"), 20),
    "one key head": lambda: (grouped(kv_heads=1, size=16, kind="", heads=5), 16),
}
FEED_FORWARDS = {
    "swiglu": lambda: dense(37),
    "geglu": lambda: dense(16, "gelu"),
    "relu2": lambda: dense(50, "relu2", gated=False),
    "gelu": lambda: dense(5, "gelu", gated=False),
    "moe, sigmoid, shared": lambda: moe(softmax=False, normalize=True, shared=True),
    "moe, softmax": lambda: moe(softmax=True, normalize=False, shared=False),
    "moe, biases of 3 loops": lambda: moe(softmax=False, normalize=True, shared=False, loops=3),
}
# Every kind of either, most of them with the latent attention or the SwiGLU.
PAIRS = [(a, "swiglu") for a in ATTENTIONS] + [("latent, qk_norm", f) for f in FEED_FORWARDS]


def layer(attention: str, feed_forward: str, norms: tuple[str, ...]) -> tuple[LayerWeights, int]:
    """The layer with norms at `norms`, and the number of rotated features."""
    weights, rotary = ATTENTIONS[attention]()
    names = [field.name for field in fields(LayerWeights) if field.name.endswith("norm")]
    made = {
        name: norm(DIM)
        if name.split("_", 1)[1] in norms or name.rsplit("_", 2)[1] in norms
        else None
        for name in names
    }
    return LayerWeights(
        attention=weights, feed_forward=FEED_FORWARDS[feed_forward](), **made
    ), rotary


def places(weights: LayerWeights, rotary: int, *, hidden: bool) -> Places:
    """Rows in slots and at columns of their own, some of which do not write."""
    angle = torch.randn(ROWS, rotary // 2)
    cos, sin = angle.cos().repeat(1, 2), torch.cat((-angle.sin(), angle.sin()), dim=-1)
    column = torch.randint(70, COLUMNS, (ROWS,))
    mask = torch.rand(ROWS, COLUMNS) > 0.3
    mask[torch.arange(ROWS), column] = True
    return Places(
        kv=torch.randn(SLOTS, ROWS + 2, COLUMNS, weights.attention.kv_width),
        column=column,
        slot=torch.randint(0, SLOTS, (ROWS,)),
        line=torch.randperm(ROWS + 2)[:ROWS],
        first=torch.randint(0, 60, (ROWS,)),
        writes=torch.rand(ROWS) > 0.2,
        mask=mask if hidden else None,
        cos=cos if rotary else None,
        sin=sin if rotary else None,
        loop=torch.randint(0, 5, (ROWS,)),
    )


def paged(given: Places, *, shuffled: bool = False) -> Places:
    """The same keys and values in pages of 12 columns, in an order of their own; also the lines."""
    assert given.slot is not None and given.line is not None
    size, blocks = 12, -(-COLUMNS // 12)
    pages = torch.randperm(ROWS * blocks).view(ROWS, blocks)
    line = torch.randperm(ROWS) if shuffled else torch.arange(ROWS)
    kv = torch.full((ROWS * blocks, size, given.kv.shape[-1]), float("nan"))
    rows = torch.nn.functional.pad(given.kv[given.slot, given.line], (0, 0, 0, 4))
    kv[pages[line]] = rows.view(ROWS, blocks, size, -1)
    return replace(given, kv=kv, pages=pages, slot=None, line=line if shuffled else None)


def maps(weights: LayerWeights) -> Iterator[tuple[str, Tensor]]:
    """The maps of a layer that a delta may change."""
    parts: list[Any] = [weights.attention, weights.feed_forward]
    parts += [getattr(weights.feed_forward, "shared", None)]
    for part in parts:
        for name in ("query_down", "query", "key", "value", "kv_down", "kv_up", "output"):
            if getattr(part, name, None) is not None:
                yield name, getattr(part, name)
        if isinstance(part, DenseWeights):
            yield from (("up", part.up), ("down", part.down))
        if isinstance(part, ExpertsWeights):
            yield "router", part.router


def deltas(weights: LayerWeights, shape: tuple[int, ...]) -> dict[str, Delta]:
    """A delta of every map: one of all rows, or with shape (ROWS,) one of each."""
    return {
        name: Delta(torch.randn(*shape, 5, w.shape[1]) / 9, torch.randn(*shape, w.shape[0], 5) / 5)
        for name, w in maps(weights)
    }


def row_of(part: Any, r: int) -> Any:
    """Of everything that has a row per token only row r."""
    if isinstance(part, Tensor):
        return part[r : r + 1].contiguous()
    if isinstance(part, Places):
        names = ("column", "slot", "line", "pages", "first", "writes", "mask", "cos", "sin", "loop")
        return replace(part, **{name: row_of(getattr(part, name), r) for name in names})
    return part


def copied(given: Places) -> Places:
    return replace(given, kv=given.kv.clone())


def in_bf16(part: Any) -> Any:
    """All weights of a layer in bf16."""
    if isinstance(part, Tensor):
        return part.bfloat16()
    if isinstance(part, Norm):
        return part._replace(weight=None if part.weight is None else part.weight.bfloat16())
    if hasattr(part, "__dataclass_fields__"):
        return replace(part, **{f.name: in_bf16(getattr(part, f.name)) for f in fields(part)})
    return part


@needs_compiler
@pytest.mark.parametrize(("attention", "feed_forward"), PAIRS)
@pytest.mark.parametrize("norms", [("norm",), ("norm", "branch", "sum")], ids=["pre", "all norms"])
def test_native_layer_equals_the_reference(
    attention: str, feed_forward: str, norms: tuple[str, ...]
) -> None:
    weights, rotary = layer(attention, feed_forward, norms)
    for shape, hidden in (((), False), ((ROWS,), True)):
        x, where = torch.randn(ROWS, DIM), places(weights, rotary, hidden=hidden)
        changes, other = deltas(weights, shape), copied(where)
        wanted = few_rows.reference(x, weights, where, changes)
        found = few_rows_native.fast(x, weights, other, changes)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other.kv, where.kv, rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize(("attention", "feed_forward"), PAIRS)
def test_a_row_alone_has_the_same_bits_as_in_a_batch(attention: str, feed_forward: str) -> None:
    weights, rotary = layer(attention, feed_forward, ("norm",))
    x, where = torch.randn(ROWS, DIM), places(weights, rotary, hidden=True)
    changes, alone = deltas(weights, (ROWS,)), copied(where)
    together = few_rows_native.fast(x, weights, where, changes)
    for r in range(ROWS):
        own = {name: Delta(*(row_of(t, r) for t in delta[:2])) for name, delta in changes.items()}
        out = few_rows_native.fast(row_of(x, r), weights, row_of(alone, r), own)
        assert torch.equal(out[0], together[r]), f"row {r}"
    assert torch.equal(alone.kv, where.kv)


@needs_compiler
@pytest.mark.parametrize(("attention", "feed_forward"), PAIRS[:: len(PAIRS) - 1])
def test_rows_may_share_deltas_by_an_index(attention: str, feed_forward: str) -> None:
    weights, rotary = layer(attention, feed_forward, ("norm",))
    x, where = torch.randn(ROWS, DIM), places(weights, rotary, hidden=False)
    index = torch.tensor([2, 2, 2, 0, 1, 1, 2])
    table = deltas(weights, (3,))
    own = {name: Delta(delta.down[index], delta.up[index]) for name, delta in table.items()}
    shared = {name: delta._replace(which=index) for name, delta in table.items()}
    wanted = few_rows.reference(x, weights, copied(where), own)
    for run in (few_rows.reference, few_rows_native.fast):
        found = run(x, weights, copied(where), shared)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    alone = few_rows_native.fast(x, weights, copied(where), own)
    assert torch.equal(few_rows_native.fast(x, weights, copied(where), shared), alone)


@needs_compiler
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("hidden", [False, True], ids=["", "masked"])
def test_pages_hold_what_lines_do(attention: str, hidden: bool) -> None:
    weights, rotary = layer(attention, "swiglu", ("norm",))
    x, lines = torch.randn(ROWS, DIM), places(weights, rotary, hidden=hidden)
    pages, natively = paged(lines, shuffled=True), paged(lines, shuffled=True)
    wanted = few_rows.reference(x, weights, lines, {})
    after = paged(lines)
    for where, run in ((pages, few_rows.reference), (natively, few_rows_native.fast)):
        found = run(x, weights, where, {})
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert where.pages is not None and after.pages is not None
        own = where.pages if where.line is None else where.pages[where.line]
        kv, expected = where.kv[own], after.kv[after.pages]
        torch.testing.assert_close(kv, expected, rtol=1e-5, atol=1e-5)
    # Pages of any size change no bit: an engine's numbers are those of `generate`.
    in_lines = few_rows_native.fast(x, weights, copied(lines), {})
    assert torch.equal(few_rows_native.fast(x, weights, paged(lines), {}), in_lines)


@needs_compiler
@pytest.mark.parametrize(("attention", "feed_forward"), PAIRS[:: len(PAIRS) - 1])
def test_bf16_weights_are_computed_with_in_fp32(attention: str, feed_forward: str) -> None:
    weights, rotary = layer(attention, feed_forward, ("norm",))
    rounded = in_bf16(weights)
    widened = replace(rounded, **{f.name: _wide(getattr(rounded, f.name)) for f in fields(rounded)})
    x, where = torch.randn(ROWS, DIM), places(weights, rotary, hidden=False)
    other = copied(where)
    wanted = few_rows.reference(x, widened, where, {})
    found = few_rows_native.fast(x, rounded, other, {})
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    # A cache and an input in bf16 are rounded on the way in and out, and nowhere else.
    half = replace(other, kv=other.kv.bfloat16())
    wide = replace(half, kv=half.kv.float())
    x = x.bfloat16()
    found = few_rows_native.fast(x, rounded, half, {})
    wanted = few_rows.reference(x.float(), widened, wide, {})
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(half.kv.float(), wide.kv, rtol=1e-2, atol=1e-2)


def _wide(part: Any) -> Any:
    if isinstance(part, Tensor):
        return part.float()
    if isinstance(part, Norm):
        return part._replace(weight=_wide(part.weight))
    if hasattr(part, "__dataclass_fields__"):
        return replace(part, **{f.name: _wide(getattr(part, f.name)) for f in fields(part)})
    return part


@needs_compiler
def test_what_the_kernel_does_not_cover_is_named() -> None:
    weights, _ = layer("latent, qk_norm", "swiglu", ("norm",))
    assert not few_rows_native.unsupported(weights)
    half = replace(
        weights, feed_forward=replace(weights.feed_forward, up=torch.zeros(74, DIM).half())
    )
    assert few_rows_native.unsupported(half) == "weights are torch.float16"
    turned = replace(weights.feed_forward, down=torch.zeros(37, DIM).T)
    reason = few_rows_native.unsupported(replace(weights, feed_forward=turned))
    assert reason == "a weight is not contiguous"


def test_without_a_compiler_the_library_is_none_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    caplog.set_level(logging.INFO)
    assert native.library.__wrapped__("few_rows") is None
    assert [record.message for record in caplog.records] == [
        "torch's operators are used, not the native kernel few_rows: there is no C++ compiler "
        "(c++, g++, clang++ or $CXX)"
    ]


@needs_compiler
def test_a_failing_compiler_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "wrong.cpp").write_text("#error on purpose\n")
    (tmp_path / "vectors.h").touch()
    monkeypatch.setattr(native, "SOURCES", tmp_path)
    with pytest.raises(native.BuildError, match="on purpose"):
        native.build("wrong", tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


BUILD = """
import sys
from pathlib import Path
from openmythos.kernels import native
print(native.build("few_rows", Path(sys.argv[1]), ("-O0",)))
"""


@needs_compiler
@pytest.mark.slow
def test_two_processes_build_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BUILD, str(tmp_path)]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    names = {run.communicate()[0].strip() for run in runs}
    assert [run.returncode for run in runs] == [0, 0]
    assert names == {str(path) for path in tmp_path.iterdir()} and len(names) == 1


COMPARE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from openmythos.kernels import native
native.THIS_CPU = tuple(sys.argv[3:])
native.cache_folder = lambda: Path(sys.argv[2])
native.build.__defaults__ = (native.THIS_CPU,)
from hypothesis import settings
settings.register_profile("any time", deadline=None)  # the first call compiles
settings.load_profile("any time")
import test_elementwise
import test_few_keys
import test_few_rows as tests
test_elementwise.test_norm()
test_elementwise.test_gate()
test_elementwise.test_rotation()
test_few_keys.test_it_equals_the_reference()
for attention, feed_forward in tests.PAIRS:
    tests.test_native_layer_equals_the_reference(attention, feed_forward, ("norm",))
    tests.test_a_row_alone_has_the_same_bits_as_in_a_batch(attention, feed_forward)
"""


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("cpu", [(), ("-mavx2", "-mfma")], ids=["plain", "AVX2"])
def test_other_instruction_sets_compute_the_same(cpu: tuple[str, ...], tmp_path: Path) -> None:
    command = [sys.executable, "-c", COMPARE, str(Path(__file__).parent), str(tmp_path), *cpu]
    subprocess.run(command, check=True)
