"""Noise that is a function of position: distribution, independence, cost."""

import pytest
import torch
from torch import Tensor

from openmythos.recurrence.initial_state import position_noise

ROWS, DIM = 2048, 256


@pytest.fixture(scope="module")
def noise() -> Tensor:
    return position_noise(torch.arange(ROWS), DIM)


def test_it_is_standard_normal(noise: Tensor) -> None:
    x = noise.double()
    wanted = torch.tensor([0.0, 1.0, 0.0, 3.0], dtype=torch.float64)
    moments = torch.stack([(x**n).mean() for n in (1, 2, 3, 4)])
    torch.testing.assert_close(moments, wanted, rtol=0, atol=0.03)
    # Kolmogorov-Smirnov: the distance of the distribution functions, 0.5% of which is chance.
    ordered = torch.special.ndtr(x.flatten().sort().values)
    uniform = (torch.arange(len(ordered), dtype=torch.float64) + 0.5) / len(ordered)
    assert float((ordered - uniform).abs().max()) < 1.73 / len(ordered) ** 0.5
    assert x.isfinite().all() and x.abs().max() < 5.3


def test_positions_and_features_and_seeds_are_independent(noise: Tensor) -> None:
    for x in (noise, noise.T):
        correlation = torch.corrcoef(x).fill_diagonal_(0)
        assert correlation.abs().max() < 6 / x.shape[1] ** 0.5
    # No period and no lattice: white in both directions.
    power = torch.fft.rfft2(noise).abs().square() / noise.numel()
    assert power.max() < 2 * torch.tensor(float(power.numel())).log()
    other = position_noise(torch.arange(ROWS), DIM, seed=1)
    assert abs(float((noise * other).mean())) < 5 / noise.numel() ** 0.5


def test_it_does_not_depend_on_what_is_asked_with_it(noise: Tensor) -> None:
    for positions in ([[7]], [[0, 1, 2], [2047, 5, 5]]):
        asked = torch.tensor(positions)
        assert torch.equal(position_noise(asked, DIM), noise[asked])


def test_it_costs_the_tokens_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing larger than [tokens, dim] is made, however far the position; nothing waits."""
    sizes: list[int] = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            assert func is not torch.ops.aten._local_scalar_dense.default
            out = func(*args, **(kwargs or {}))
            sizes.append(out.numel())
            return out

    with Recorder():
        position_noise(torch.tensor([[10**9]]), DIM)
    assert max(sizes) == DIM
