"""Every test starts from one seed, on one thread, with the same hypothesis examples."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import register_random, settings


class TorchRandom:
    """Torch's generator for hypothesis, which reseeds it before every example."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def getstate(self) -> torch.Tensor:
        return torch.get_rng_state()

    def setstate(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


TORCH_RANDOM = TorchRandom()  # hypothesis keeps only a weak reference
register_random(TORCH_RANDOM)

settings.register_profile("openmythos", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("openmythos")

# On tensors this small a second thread gains nothing, and costs a hundredfold on a busy machine.
torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")  # from here, so that all make one line of the summary


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Runs a test on the CPU and on a GPU; `variants.here` puts its models and tensors there."""
    found = torch.device(request.param)
    if found.type == "cpu":
        yield found
        return
    from variants import OnDevice

    with OnDevice(found):
        yield found
