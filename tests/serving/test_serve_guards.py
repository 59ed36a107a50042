"""What never reaches a route: wrong hosts, keys, sizes and types."""

import asyncio
import re
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from openmythos.serve.guards import Guards
from openmythos.serve.limits import ServerLimits

LIMITS = ServerLimits(max_body_bytes=100, body_seconds=0.05)


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that answers with the body it got."""
    message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message["body"]})


def call(
    guards: Guards,
    *,
    path: str = "/v1/completions",
    method: str = "POST",
    headers: dict[str, str] | None = None,
    body: list[bytes | None] | None = None,
) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body); None in `body` is a client that sends nothing more."""
    given = {"content-type": "application/json", "host": "localhost"} | (headers or {})
    raw = [(k.encode(), v.encode("latin-1")) for k, v in given.items()]
    scope = {"type": "http", "path": path, "method": method, "headers": raw}
    chunks: Iterator[bytes | None] = iter(body or [b"{}"])
    left = len(body or [b"{}"])
    sent: list[Message] = []

    async def receive() -> Message:
        nonlocal left
        chunk, left = next(chunks), left - 1
        if chunk is None:
            await asyncio.sleep(10)
        return {"type": "http.request", "body": chunk, "more_body": left > 0}

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(guards(scope, receive, send))
    start, *parts = sent
    found = {k.decode(): v.decode() for k, v in start["headers"]}
    return start["status"], found, b"".join(part["body"] for part in parts)


def test_a_body_arrives_whole() -> None:
    status, headers, body = call(Guards(echo, LIMITS), body=[b"ab", b"", b"cd"])
    assert (status, body) == (200, b"abcd")
    assert re.fullmatch(r"[0-9a-f]{24}", headers["x-request-id"])
    assert "'unsafe" not in headers["content-security-policy"]
    assert "default-src 'none'" in headers["content-security-policy"]


@pytest.mark.parametrize(
    ("given", "kept"), [("abc-1:2", True), ("a b", False), ("x" * 129, False), ("", False)]
)
def test_a_request_id_is_kept_if_it_is_harmless(given: str, kept: bool) -> None:
    _, headers, _ = call(Guards(echo, LIMITS), headers={"x-request-id": given})
    assert (headers["x-request-id"] == given) == kept


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"headers": {"content-length": "101"}}, 413),
        ({"headers": {"content-length": "9" * 50}}, 413),
        ({"body": [b"x" * 60, b"x" * 60]}, 413),
        ({"body": [b"x", None]}, 408),
        ({"headers": {"content-type": "text/plain"}}, 415),
        ({"headers": {"content-type": ""}}, 415),
    ],
)
def test_bodies_are_bounded(options: dict[str, Any], status: int) -> None:
    got, headers, body = call(Guards(echo, LIMITS), **options)
    assert got == status and b'"error"' in body
    assert ("connection" in headers) == (status in (408, 413))


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        ("Bearer right", 200),
        ("bearer also", 200),
        ("Bearer wrong", 401),
        ("Bearer \xff", 401),
        ("right", 401),
        ("", 401),
        ("Bearer right also", 401),
    ],
)
def test_a_key_is_asked_for(authorization: str, status: int) -> None:
    guards = Guards(echo, LIMITS, keys=("right", "also"))
    assert call(guards, headers={"authorization": authorization})[0] == status


@pytest.mark.parametrize(
    ("path", "open_"),
    [
        *[("/", True), ("/health", True), ("/ready", True), ("/playground/main.js", True)],
        *[("/v1/models", False), ("/engine", False), ("/metrics", False), ("/health/", False)],
        ("/playgroundx", False),
    ],
)
def test_the_page_and_health_need_no_key(path: str, open_: bool) -> None:
    guards = Guards(echo, LIMITS, keys=("right",))
    assert call(guards, path=path, method="GET")[0] == (200 if open_ else 401)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *[("localhost", 200), ("LOCALHOST:8000", 200), ("127.0.0.1:1", 200), ("[::1]:80", 200)],
        *[("evil.example", 403), ("localhost.evil.example:8000", 403), ("", 403)],
        ("127.0.0.1.evil.example", 403),
    ],
)
def test_on_loopback_other_names_are_refused(host: str, status: int) -> None:
    guards = Guards(echo, LIMITS, hosts=("localhost", "127.0.0.1", "[::1]"))
    assert call(guards, headers={"host": host})[0] == status
