"""Queues, restarts, cancellation and draining, with an engine that waits for the test."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
from serving.conftest import client_of, wait_until
from starlette.testclient import TestClient

from openmythos.config import ConfigError
from openmythos.inference.engine import Engine
from openmythos.inference.request import (
    EngineLimits,
    EngineRequest,
    EngineStats,
    Event,
    Finished,
    NewToken,
    RowInfo,
)
from openmythos.model.mythos import OpenMythos
from openmythos.serve.limits import ServerLimits
from openmythos.serve.service import Service


@dataclass
class Gate:
    """What a test does with its engines: let them step, break them."""

    opened: threading.Event = field(default_factory=threading.Event)
    broken: threading.Event = field(default_factory=threading.Event)
    hung: threading.Event = field(default_factory=threading.Event)
    failing: threading.Event = field(default_factory=threading.Event)
    made: list["GatedEngine"] = field(default_factory=list)

    def engine(self) -> "GatedEngine":
        self.made.append(GatedEngine(self))
        return self.made[-1]


class GatedEngine:
    """Says "a" once per step and row, if the gate is open."""

    def __init__(self, gate: Gate) -> None:
        self.gate, self.number = gate, itertools.count()
        self.requests: dict[int, EngineRequest] = {}
        self.said: dict[int, int] = {}
        self.ended: list[Event] = []
        self.model = None

    @property
    def idle(self) -> bool:
        return not self.requests and not self.ended

    def add(self, request: EngineRequest) -> int:
        number = next(self.number)
        self.requests[number], self.said[number] = request, 0
        return number

    def cancel(self, request: int, sample: int | None = None) -> None:
        if self.requests.pop(request, None):
            self.ended.append(self._finished(request, "cancelled"))

    def step(self) -> list[Event]:
        if self.gate.broken.is_set():
            self.gate.broken.clear()
            raise BrokenPipeError("broken by the test")
        while self.gate.hung.is_set():
            time.sleep(0.01)
        time.sleep(0.002)
        events, self.ended = self.ended, []
        for number, request in list(self.requests.items() if self.gate.opened.is_set() else ()):
            if self.gate.failing.is_set():
                self.gate.failing.clear()
                del self.requests[number]
                events.append(self._finished(number, "error", "logits: are not finite"))
                continue
            self.said[number] += 1
            events.append(NewToken(request=number, sample=0, token=97, loops=2))
            if self.said[number] == request.options.max_new_tokens:
                del self.requests[number]
                events.append(self._finished(number, "length"))
        return events

    def _finished(self, number: int, reason: Any, message: str = "") -> Finished:
        said = self.said[number]
        return Finished(
            request=number,
            sample=0,
            reason=reason,
            new_tokens=said,
            token_loops=2 * said,
            message=message,
        )

    def rows(self) -> list[RowInfo]:
        return [
            RowInfo(
                request=number,
                sample=0,
                phase="loop",
                loop=1,
                num_loops=2,
                prompt_tokens=1,
                new_tokens=self.said[number],
            )
            for number in self.requests
        ]

    def stats(self) -> EngineStats:
        return EngineStats(rows_running=len(self.requests), token_loops=2 * sum(self.said.values()))


LIMITS = ServerLimits(max_requests=2, hang_seconds=0.2, request_seconds=5)
ASK = {"prompt": "x", "max_tokens": 3}


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.hung.clear()
    made.opened.set()


@pytest.fixture
def started(
    make_service: Callable[..., Service], gate: Gate
) -> Iterator[tuple[TestClient, Service, ThreadPoolExecutor]]:
    """Two gated replicas of two requests each, and threads for requests that wait."""
    service = make_service(LIMITS, gate.engine, 2)
    with ThreadPoolExecutor(8) as threads, client_of(service) as client:
        wait_until(lambda: _states(client) == ["ready", "ready"])
        yield client, service, threads
        gate.hung.clear()
        gate.opened.set()


def _states(client: TestClient) -> list[str]:
    return [replica["state"] for replica in client.get("/health").json()["replicas"]]


def _rows(client: TestClient) -> int:
    return len(client.get("/engine").json()["rows"])


def _ask(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/completions", json=ASK | body)


def test_a_full_server_says_when_to_try_again(started: Any, gate: Gate) -> None:
    client, service, threads = started
    waiting = [threads.submit(_ask, client) for _ in range(4)]
    wait_until(lambda: _rows(client) == 4)
    # The least busy replica got each.
    assert [len(replica.work) for replica in service.replicas.all] == [2, 2]
    refused = _ask(client)
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    # Too many prompts at once could never be taken: no reason to try again.
    assert _ask(client, prompt=["x"] * 5).status_code == 400
    gate.opened.set()
    assert {answer.result().json()["choices"][0]["text"] for answer in waiting} == {"aaa"}
    assert _ask(client, prompt=["x"] * 4).status_code == 200
    assert _rows(client) == 0


def test_a_replica_that_dies_fails_its_work_and_comes_back(started: Any, gate: Gate) -> None:
    client, _, threads = started
    lost, kept = (threads.submit(_ask, client) for _ in range(2))
    wait_until(lambda: _rows(client) == 2)
    gate.broken.set()
    wait_until(lambda: lost.done() or kept.done())
    failed, other = (lost, kept) if lost.done() else (kept, lost)
    assert failed.result().status_code == 500
    assert "died" in failed.result().json()["error"]["message"]
    assert client.get("/health").json()["status"] == "degraded"
    assert client.get("/ready").status_code == 200
    gate.opened.set()
    assert other.result().status_code == 200
    wait_until(lambda: _states(client) == ["ready", "ready"])
    health = client.get("/health").json()
    assert health["status"] == "ok" and sum(x["restarts"] for x in health["replicas"]) == 1
    assert "openmythos_replica_restarts 1.0" in client.get("/metrics").text
    assert _ask(client, prompt=["x"] * 4).status_code == 200


def test_a_stream_whose_replica_dies_is_not_complete(started: Any, gate: Gate) -> None:
    client, _, threads = started
    gate.opened.set()
    answer = threads.submit(_ask, client, stream=True, max_tokens=80)
    wait_until(lambda: _rows(client) == 1)
    gate.broken.set()
    text = answer.result().text
    assert '"error"' in text.split("\n\n")[-2] and "[DONE]" not in text


def test_a_row_that_fails_fails_alone(started: Any, gate: Gate) -> None:
    client, _, threads = started
    asked = [threads.submit(_ask, client) for _ in range(4)]
    wait_until(lambda: _rows(client) == 4)
    gate.failing.set()
    gate.opened.set()
    answers = [answer.result() for answer in asked]
    assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 500]
    (failed,) = [answer for answer in answers if answer.status_code == 500]
    assert failed.json()["error"]["message"] == "logits: are not finite"
    assert _states(client) == ["ready", "ready"]


def test_a_small_pool_gives_the_same_text_and_refuses_what_never_fits(
    make_service: Callable[..., Service], model: OpenMythos, client: TestClient
) -> None:
    def small() -> Engine:
        return Engine(model, EngineLimits(max_rows=8, pages=40, page_tokens=4))

    bodies = [
        {"prompt": "x" * (1 + 2 * i), "max_tokens": 12, "num_loops": 1 + i % 3, "seed": i}
        for i in range(8)
    ]
    expected = [client.post("/v1/completions", json=b).json()["choices"] for b in bodies]
    with ThreadPoolExecutor(8) as threads, client_of(make_service(engine=small)) as tight:
        wait_until(lambda: tight.get("/ready").status_code == 200)
        asked = [threads.submit(tight.post, "/v1/completions", json=body) for body in bodies]
        answers = [answer.result().json() for answer in asked]
        assert [answer.get("choices") for answer in answers] == expected
        for stream in (False, True):
            body = {"prompt": "x" * 80, "max_tokens": 12, "num_loops": 9, "stream": stream}
            assert tight.post("/v1/completions", json=body).status_code == 400
        assert "openmythos_engine_pages_used 0.0" in tight.get("/metrics").text


def test_a_step_that_hangs_is_seen(started: Any, gate: Gate) -> None:
    client, _, threads = started
    gate.hung.set()
    answer = threads.submit(_ask, client)
    wait_until(lambda: client.get("/health").status_code == 503)
    assert "hangs" in _states(client)
    gate.opened.set()
    gate.hung.clear()
    assert answer.result().status_code == 200 and client.get("/health").status_code == 200


def test_draining_refuses_new_work_and_ends_what_was_accepted(started: Any, gate: Gate) -> None:
    client, service, threads = started
    accepted = threads.submit(_ask, client)
    wait_until(lambda: _rows(client) == 1)
    service.replicas.draining = True
    assert client.get("/ready").status_code == 503
    assert client.get("/health").json()["status"] == "draining"
    assert _ask(client).status_code == 503
    service.replicas.fail_all("the server was stopped")
    assert accepted.result().json()["error"]["message"] == "the server was stopped"
    gate.opened.set()
    wait_until(lambda: gate.made[0].idle and gate.made[1].idle)


def test_a_request_that_takes_too_long_is_ended(
    make_service: Callable[..., Service], gate: Gate
) -> None:
    service = make_service(ServerLimits(request_seconds=0.1), gate.engine)
    with client_of(service) as client:
        wait_until(lambda: client.get("/ready").status_code == 200)
        assert _ask(client).status_code == 504
        wait_until(lambda: gate.made[0].idle, 2)
        metrics = client.get("/metrics").text
        assert 'openmythos_requests_total{route="/v1/completions",status="504"} 1.0' in metrics


def test_prompts_in_line_are_bounded_in_token_loops(
    make_service: Callable[..., Service], gate: Gate
) -> None:
    service = make_service(ServerLimits(max_prompt_token_loops=100), gate.engine)
    with ThreadPoolExecutor(4) as threads, client_of(service) as client:
        wait_until(lambda: client.get("/ready").status_code == 200)
        # 3 tokens (one starts the text) of 64 loops are too many, but nothing else waits.
        first = threads.submit(_ask, client, prompt="xy", num_loops=64)
        wait_until(lambda: _rows(client) == 1)
        assert _ask(client, num_loops=1).status_code == 429
        gate.opened.set()
        assert first.result().status_code == 200
        assert _ask(client, num_loops=1).status_code == 200


def test_a_model_that_cannot_be_loaded_is_told_to_the_server(
    make_service: Callable[..., Service],
) -> None:
    def load() -> Engine:
        raise ConfigError("step = 5: there is none")

    service = make_service(engine=load)
    (replica,) = service.replicas.all
    with client_of(service) as client:
        wait_until(lambda: replica.load_error == "step = 5: there is none")
        assert client.get("/ready").status_code == 503
