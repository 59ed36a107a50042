"""A tiny language model behind the application, in a thread of the test's own process."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from variants import tiny_config

from openmythos.data.tokenizer import ByteTokenizer
from openmythos.inference.engine import Engine
from openmythos.inference.request import EngineLimits
from openmythos.model.mythos import OpenMythos
from openmythos.serve import app
from openmythos.serve.limits import ServerLimits
from openmythos.serve.replicas import Replicas, in_thread
from openmythos.serve.service import Service
from openmythos.serve.source import Served

CONTEXT = 96


@pytest.fixture(scope="session")
def model() -> OpenMythos:
    return OpenMythos(tiny_config(vocab_size=257, context=CONTEXT), seed=3).eval()


@pytest.fixture(scope="session")
def folder(model: OpenMythos, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder with a tokenizer."""
    path = tmp_path_factory.mktemp("served") / "tiny-lm"
    model.save_pretrained(path)
    ByteTokenizer().save(path)
    return path


Started = Callable[..., TestClient]


@pytest.fixture(scope="session")
def make_service(model: OpenMythos, folder: Path) -> Callable[..., Service]:
    """A service of the model with limits of its own; not started."""

    def make(
        limits: ServerLimits | None = None,
        engine: Callable[[], Any] | None = None,
        count: int = 1,
        **options: Any,
    ) -> Service:
        limits = ServerLimits() if limits is None else limits
        load = engine or (lambda: Engine(model, EngineLimits(max_rows=8)))
        pool = Replicas(count, in_thread(load), limits)
        return Service.open(Served.open(folder), pool, limits, **options)

    return make


def client_of(service: Service, **options: Any) -> TestClient:
    """A client of the application; to be used as a context manager, which starts replicas."""
    return TestClient(
        app.create(service, **options), base_url="http://localhost", raise_server_exceptions=False
    )


def wait_until(true: Callable[[], Any], seconds: float = 10.0) -> None:
    """Poll until it is true; fails after so long."""
    import time

    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def client(make_service: Callable[..., Service]) -> Iterator[TestClient]:
    """A client of the tiny model, ready."""
    with client_of(make_service()) as found:
        wait_until(lambda: found.get("/ready").status_code == 200)
        yield found
