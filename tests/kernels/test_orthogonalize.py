"""Muon's orthogonalisation: fast = reference, and what it makes of singular values."""

from dataclasses import replace

import pytest
import torch

from openmythos import kernels, machine
from openmythos.kernels.orthogonalize import orthogonalize, reference

SHAPES = [(6, 9), (9, 6), (8, 8), (1, 5), (3, 6, 10), (3, 10, 6)]


def some(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("stacks", [False, True], ids=["one by one", "stacks"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.1)]
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fast_equals_reference(
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    tolerance: float,
    stacks: bool,
) -> None:
    monkeypatch.setattr(kernels, "CPU", replace(kernels.CPU, stacks=stacks))
    x = some(*shape)
    found = orthogonalize(x.to(dtype), dtype)
    assert found.dtype == dtype and found.shape == x.shape
    torch.testing.assert_close(found.double(), reference(x), rtol=0, atol=tolerance)


def test_singular_values_come_near_one_and_vectors_stay() -> None:
    x = some(12, 20)
    u, values, v = torch.linalg.svd(x, full_matrices=False)
    assert values.max() / values.min() > 5
    found = orthogonalize(x)
    inner = u.T @ found @ v.T
    assert inner.diagonal().min() > 0.6 and inner.diagonal().max() < 1.3
    torch.testing.assert_close(inner, torch.diag(inner.diagonal()), rtol=0, atol=1e-9)


def test_nothing_stays_nothing() -> None:
    assert torch.equal(orthogonalize(torch.zeros(3, 4), torch.float32), torch.zeros(3, 4))
    assert orthogonalize(torch.zeros(0, 3, 4)).shape == (0, 3, 4)


@pytest.mark.parametrize("fast", [torch.float32, torch.bfloat16], ids=str)
def test_it_computes_in_the_fast_dtype_of_the_device(
    monkeypatch: pytest.MonkeyPatch, fast: torch.dtype
) -> None:
    monkeypatch.setattr(machine, "fast_dtype", lambda _device: fast)
    x = some(4, 6)
    assert orthogonalize(x.float()).dtype == fast
    assert orthogonalize(x).dtype == torch.float64
