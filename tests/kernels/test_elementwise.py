"""The native norm, gate and rotation equal their references, for any width and layout."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from openmythos import kernels
from openmythos.kernels import elementwise, gated, native, norm, rope
from openmythos.nn.layout import rope_tables

pytestmark = pytest.mark.skipif(native.library("elementwise") is None, reason="no C++ compiler")
EPS = 1e-5
WIDTHS = st.sampled_from([1, 3, 16, 24, 37, 64, 130])
ROWS = st.sampled_from([1, 2, 63, 64, 65, 200])


def check(fast: Callable[..., Tensor], reference: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Outputs and gradients of `fast` in fp32 are those of `reference` in fp64."""
    assert elementwise.accepts(*inputs)
    wide = [x.double().requires_grad_() for x in inputs]
    found = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    wanted, y = reference(*wide), fast(*found)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (wanted * weights).sum().backward()
    (y * weights).sum().backward()
    close = {"rtol": 2e-5, "atol": 2e-5, "check_dtype": False}
    torch.testing.assert_close(y, wanted, **close)
    for a, b in zip(found, wide, strict=True):
        torch.testing.assert_close(a.grad, b.grad, **close)
    with torch.no_grad():
        torch.testing.assert_close(fast(*inputs), y, rtol=1e-6, atol=1e-6)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@given(rows=ROWS, width=WIDTHS)
def test_norm(rows: int, width: int) -> None:
    check(
        lambda x, w: norm.rms_norm(x, w, EPS),
        lambda x, w: norm.reference(x, w, EPS),
        drawn(rows, 2, width)[:, 1],
        1 + 0.1 * drawn(width),
    )


@given(rows=ROWS, width=WIDTHS)
def test_gate(rows: int, width: int) -> None:
    x = 3 * drawn(rows, 2 * width)
    check(gated.gated_linear, gated.reference, x, drawn(5, width) / width**0.5)


@pytest.mark.parametrize("extreme", [-1e30, -88.0, 88.0, 1e30])
def test_a_gate_far_from_zero_is_finite(extreme: float) -> None:
    x = torch.tensor([[extreme, 1.0]])
    y = elementwise.gate(x)
    torch.testing.assert_close(y, gated.activated(x.double()).float(), rtol=1e-6, atol=1e-30)


@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    seq=st.integers(1, 9),
    width=st.sampled_from([2, 6, 16, 34, 64]),
    each=st.booleans(),
    turned=st.booleans(),
)
def test_rotation(batch: int, heads: int, seq: int, width: int, each: bool, turned: bool) -> None:
    starts = torch.arange(batch if each else 1)[:, None]
    tables = rope_tables(starts + torch.arange(seq), width, 10_000.0)
    cos, sin = (x[:, None] for x in tables)
    if turned:  # as attention has it: heads beside width in memory, a part of a wider map
        x = drawn(batch, seq, heads, width + 3)[..., :width].transpose(1, 2)
    else:
        x = drawn(batch, heads, seq, width)
    check(
        lambda x: rope.rotate(x, cos, sin),
        lambda x: rope.reference(x, cos.double(), sin.double()),
        x,
    )


def test_what_has_no_native_form_is_left_to_torch() -> None:
    x = drawn(4, 8)
    assert elementwise.accepts(x)
    for other in (x.double(), x.bfloat16(), x.to("meta"), x[:0]):
        assert not elementwise.accepts(other)
    with kernels.use("torch"):
        assert not elementwise.accepts(x)
    with FlopCounterMode(display=False):
        assert not elementwise.accepts(x)
    seen = []
    torch.func.vmap(lambda row: (seen.append(elementwise.accepts(row)), row)[1])(x)
    assert seen == [False]


class _AllForms(torch.nn.Module):
    def forward(self, x: Tensor, tables: Tensor) -> Tensor:
        weight = x.new_ones(x.shape[-1])
        x = gated.activated(norm.rms_norm(x, weight, EPS))
        return rope.rotate(x[:, None, None], tables, tables)


def test_compiled_code_is_for_any_number_of_rows() -> None:
    """On both sides of the size from which on the native forms are used."""
    few, many = (elementwise.FEWEST // width for width in (600, 100))
    rows = torch.export.Dim("rows", min=2, max=many)
    shapes = {"x": {0: rows}, "tables": {}}
    tables = drawn(1, 1, 1, 300)
    with torch.no_grad():
        model = _AllForms()
        program = torch.export.export(
            model, (drawn(few, 600), tables), dynamic_shapes=shapes, strict=False
        )
        for count in (2, few, many):
            x = drawn(count, 600)
            torch.testing.assert_close(program.module()(x, tables), model(x, tables))
