"""Checks before any route: request id, host, API key, size and speed of bodies; page headers.

Plain ASGI: a middleware between a stream and its client must not hide that the client has gone.
"""

import asyncio
import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openmythos.serve.errors import ApiError
from openmythos.serve.limits import ServerLimits

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_ID = re.compile(r"[\w.:-]{1,128}")
# What needs no key: the page itself, which holds no data, and what a load balancer asks.
_OPEN = ("/health", "/ready", "/version")
_PAGE = "/playground/"
# The page loads nothing from elsewhere, runs no inline script and cannot be framed.
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": CONTENT_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


def is_open(path: str) -> bool:
    """Whether a path needs no API key."""
    return path == "/" or path in _OPEN or path.startswith(_PAGE)


class Guards:
    """Refuses what must not reach a route; gives every answer an id and strict headers."""

    def __init__(
        self,
        app: ASGIApp,
        limits: ServerLimits,
        *,
        keys: Iterable[str] = (),
        hosts: Iterable[str] | None = None,
    ) -> None:
        """`keys`: API keys, any of which is accepted; none: no key is needed. `hosts`: the names
        that a Host header may have, against pages that reach a local server by a name of their own.
        """
        self._app, self._limits = app, limits
        self._keys = tuple(_digest(key.encode()) for key in keys)
        self._hosts = None if hosts is None else frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        number = given if _ID.fullmatch(given) else secrets.token_hex(12)
        scope.setdefault("state", {})["request_id"] = number

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = MutableHeaders(scope=message)
                added["x-request-id"] = number
                for name, value in _HEADERS.items():
                    added.setdefault(name, value)
            await send(message)

        try:
            self._check_host(headers)
            self._check_key(scope["path"], headers)
            if scope["method"] == "POST":
                receive = await self._with_body(headers, receive)
        except ApiError as error:
            await answer(error, send_with_headers)
            return
        except _ClientGoneError:
            return
        await self._app(scope, receive, send_with_headers)

    def _check_host(self, headers: Headers) -> None:
        if self._hosts is None:
            return
        host = re.sub(r":\d+$", "", headers.get("host", "")).lower()
        if host not in self._hosts:
            text = f"Host {host[:100]!r} is not one of {', '.join(sorted(self._hosts))}"
            raise ApiError(403, text, code="forbidden_host")

    def _check_key(self, path: str, headers: Headers) -> None:
        if not self._keys or is_open(path):
            return
        kind, _, key = headers.get("authorization", "").partition(" ")
        # Digests have one length; every key is compared, whichever fits.
        found = _digest(key.strip().encode("utf-8", "surrogateescape"))
        fits = [hmac.compare_digest(found, known) for known in self._keys]
        if kind.lower() != "bearer" or not any(fits):
            text = "wrong or missing API key; send it as: Authorization: Bearer KEY"
            raise ApiError(401, text, code="invalid_api_key")

    async def _with_body(self, headers: Headers, receive: Receive) -> Receive:
        """Read the whole body, within the limits; returns what a route receives instead."""
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # A page of another site may send other types without asking first.
            raise ApiError(415, "content-type must be application/json")
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                body = await self._read(headers, receive)
        except TimeoutError:
            raise ApiError(408, "the body took too long to arrive") from None
        given: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Message:
            return given.pop() if given else await receive()

        return receive_again

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        most = self._limits.max_body_bytes
        too_large = ApiError(413, f"the body is larger than {most} bytes", code="body_too_large")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > most:
            raise too_large
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _ClientGoneError
            body += message.get("body", b"")
            if len(body) > most:
                raise too_large
            if not message.get("more_body", False):
                return bytes(body)


class _ClientGoneError(Exception):
    """The client closed the connection before its request was complete."""


async def answer(error: ApiError, send: Send) -> None:
    """Send an error as a whole answer."""
    body = json.dumps(error.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body))}
    if error.status in (408, 413):
        headers["connection"] = "close"  # the rest of the body is not read
    raw = [(k.encode(), v.encode()) for k, v in (headers | error.headers()).items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
