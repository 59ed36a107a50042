"""Every test runs with the same seed and hypothesis examples, on one thread."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import register_random, settings


class TorchRandom:
    """Registers torch's generator with hypothesis, which reseeds it before every example."""

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

# For small tensors a second thread gains nothing, and is 100 times slower on a busy machine.
torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")  # skipped here: one line in the summary for all of them


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Run a test on the CPU and on a GPU; `variants.here` is the device for its tensors."""
    found = torch.device(request.param)
    if found.type == "cpu":
        yield found
        return
    from variants import OnDevice

    with OnDevice(found):
        yield found
