"""Every test starts from one seed, on at most two threads, with the same hypothesis examples."""

import os

import pytest
import torch
from hypothesis import register_random, settings


class TorchRandom:
    """Torch's generator as hypothesis sees one: it is reseeded before every example."""

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

torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
