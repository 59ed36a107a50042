"""Schemathesis on the OpenAPI file: whatever fits the schema, or nearly, gets no 500."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from serving.conftest import client_of, wait_until

from openmythos.serve.limits import ServerLimits
from openmythos.serve.service import Service

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
POSITIVE = schemathesis.GenerationMode.POSITIVE
LIMITS = ServerLimits(max_new_tokens=8, max_loops=4, request_seconds=20)


@pytest.fixture(scope="module")
def running(make_service: Callable[..., Service]) -> Any:
    """The application with its routes, started."""
    service = make_service(LIMITS)
    with client_of(service) as client:
        wait_until(lambda: client.get("/ready").status_code == 200)
        yield service, client


def operations() -> list[tuple[str, str]]:
    """All (method, path) of the OpenAPI file, but the endless stream of /engine."""
    return [
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/loops"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/{name}"),
        ("GET", "/tokenizer_info"),
        ("GET", "/health"),
        ("GET", "/ready"),
        ("GET", "/metrics"),
        ("GET", "/version"),
    ]


def test_every_route_is_asked(running: Any) -> None:
    _, client = running
    paths = client.get("/openapi.json").json()["paths"]
    known = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    assert known == {*operations(), ("GET", "/engine")}


@pytest.mark.parametrize(("method", "path"), operations())
def test_no_request_gets_a_500(running: Any, method: str, path: str) -> None:
    service, client = running
    schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    headers = {"content-type": "application/json"} if method == "POST" else {}
    modes = list(schemathesis.GenerationMode) if method == "POST" else [POSITIVE]
    for mode in modes:

        @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=schema[path][method].as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            made = case.as_transport_kwargs(base_url="http://localhost")
            body = {"json": made["json"]} if "json" in made else {"content": made.get("data")}
            answer = client.request(
                method, made["url"], params=made.get("params"), headers=headers, **body
            )
            assert answer.status_code < 500, (made, answer.text)
            if answer.status_code >= 400:
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

        ask()
    assert service.replicas.all[0].restarts == 0
