"""The native product of few rows and a matrix equals torch's."""

import pytest
import torch

from openmythos import kernels
from openmythos.kernels import few_rows_native, linear, native

pytestmark = pytest.mark.skipif(native.library("few_rows") is None, reason="no C++ compiler")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of inputs of each native call."""
    found: list[int] = []
    run = few_rows_native.linear

    def counted(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        found.append(x.numel())
        return run(x, weight)

    monkeypatch.setattr(few_rows_native, "linear", counted)
    return found


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (3, 7), (16, 16), (45, 33), (130, 100)])
@pytest.mark.parametrize("dtypes", [("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")])
def test_equals_torch(outputs: int, inputs: int, dtypes: tuple[str, str], calls: list[int]) -> None:
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator).to(kinds[dtypes[1]])
    tolerance = 1e-5 if dtypes[0] == "fp32" else 1e-2
    for rows in (1, 2, 3, 7, linear.MOST_ROWS):
        x = torch.randn(rows, 1, inputs, generator=generator).to(kinds[dtypes[0]])
        with torch.no_grad():
            found = linear.linear(x, weight)
        wanted = linear.reference(x.float(), weight.float())
        assert found.shape == (rows, 1, outputs) and found.dtype == x.dtype
        torch.testing.assert_close(found.float(), wanted, rtol=tolerance, atol=tolerance)
        with torch.no_grad():  # a row alone has the bits that it has among others
            assert torch.equal(linear.linear(x[-1:], weight), found[-1:])
    assert len(calls) == 10


def test_all_else_is_left_to_torch(calls: list[int]) -> None:
    weight, x = torch.randn(6, 4, requires_grad=True), torch.randn(2, 4)
    linear.linear(x, weight).sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        linear.linear(torch.randn(linear.MOST_ROWS + 1, 4), weight)
        linear.linear(torch.randn(0, 4), weight)
        linear.linear(x.double(), weight.double())
        linear.linear(x, weight.T.contiguous().T)
        with torch.autocast("cpu", torch.bfloat16):
            assert linear.linear(x, weight).dtype == torch.bfloat16
        with kernels.use("torch"):
            linear.linear(x, weight)
    assert calls == []
