"""Constants of the weights are computed again when the weights change, and only then."""

import copy

import pytest
import torch
from torch import Tensor

from openmythos.kernels import native
from openmythos.kernels.constants import Kept
from openmythos.recurrence.injection import LTI

pytestmark = pytest.mark.skipif(native.library("few_rows") is None, reason="no C++ compiler")


def test_computed_once_for_the_same_numbers() -> None:
    kept, calls, x = Kept(), [], torch.nn.Parameter(torch.ones(3))

    def double() -> tuple[Tensor, ...]:
        calls.append(1)
        return (2 * x.detach(),)

    with torch.inference_mode():
        for _ in range(3):
            assert kept(double, (x,))[0].tolist() == [2, 2, 2]
        assert len(calls) == 1
        x.data[1] = 5  # no version counter tells of it
        assert kept(double, (x,))[0].tolist() == [2, 10, 2]
        x.data = x.data.double()
        assert kept(double, (x,))[0].dtype == torch.float64
        x.data.fill_(float("nan"))
        assert kept(double, (x,))[0].isnan().all()
    kept(double, (x,))  # with gradients: always
    kept(double, (x,))
    assert len(calls) == 6


def test_an_injection_and_its_copy() -> None:
    layer, encoded = LTI().build(4), torch.randn(2, 1, 4)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    wanted = layer.prepare(encoded)
    with torch.no_grad():
        for _ in range(2):
            assert all(map(torch.equal, layer.prepare(encoded), wanted))
        twin = copy.deepcopy(layer)
        twin.log_rate.add_(1)
        assert not torch.equal(twin.prepare(encoded).decay, wanted.decay)
        assert torch.equal(layer.prepare(encoded).decay, wanted.decay)
    assert layer.prepare(encoded).decay.requires_grad
