"""Every test runs with the same seed and hypothesis examples, on one thread."""

import os
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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a CUDA device one of the tests for it is skipped in the name of all."""
    wanted = [item for item in items if item.get_closest_marker("gpu")]
    if not wanted or torch.cuda.is_available():
        return
    reason = f"no CUDA device for this and {len(wanted) - 1} other tests marked gpu"
    wanted[0].add_marker(pytest.mark.skip(reason=reason))
    config.hook.pytest_deselected(items=wanted[1:])
    left = {id(item) for item in wanted[1:]}
    items[:] = [item for item in items if id(item) not in left]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def no_waiting_for_the_disk() -> Iterator[None]:
    """No test cuts the power, so what is written need not be on the disk when it goes on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _file: None)
        yield


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
