"""Server-sent events: keep-alives, slow readers, clients that leave, errors in a stream."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from openmythos.serve.errors import CLIENT_GONE, ApiError
from openmythos.serve.limits import ServerLimits

DONE = "[DONE]"
_KEEP_ALIVE = b": keep-alive\n\n"


class AbandonedError(Exception):
    """The client has gone, or takes nothing of its answer."""


class EventStream(Response):
    """Sends each text of an iterator as an event, and [DONE] at the end.

    If the iterator raises an ApiError, the error is sent as the last event and the connection is
    closed without the end of the answer, so that no client takes it for complete. `on_end` is
    called in every case, with the status to count.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[str],
        limits: ServerLimits,
        on_end: Callable[[int], None] = lambda _status: None,
    ) -> None:
        super().__init__()
        del self.headers["content-length"]
        self.headers["x-accel-buffering"] = "no"  # nginx must not collect events
        self._events, self._limits, self._on_end = events, limits, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        left = asyncio.create_task(disconnected(receive))
        status = CLIENT_GONE
        try:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            await self._send_all(left, send)
            status = 200
        except AbandonedError:
            return
        except ApiError as error:
            status = error.status
            # Without the end of the answer: the server closes the connection.
            with contextlib.suppress(AbandonedError):
                await self._send(_event(json.dumps(error.body())), send)
        finally:
            left.cancel()
            self._on_end(status)

    async def _send_all(self, left: "asyncio.Task[None]", send: Send) -> None:
        """Send all events and the end, with a sign of life where none comes for long."""
        coming: asyncio.Task[str] | None = None
        try:
            while True:
                coming = coming or asyncio.ensure_future(anext(self._events))
                seconds = self._limits.keep_alive_seconds
                done, _ = await asyncio.wait(
                    {coming, left}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
                )
                if left in done:
                    raise AbandonedError
                if not done:
                    await self._send(_KEEP_ALIVE, send)
                    continue
                try:
                    event = coming.result()
                except StopAsyncIteration:
                    break
                finally:
                    coming = None
                await self._send(_event(event), send)
            await self._send(_event(DONE), send)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            if coming is not None:
                coming.cancel()
                with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration, ApiError):
                    await coming

    async def _send(self, data: bytes, send: Send) -> None:
        """Send, unless the client takes nothing for too long."""
        try:
            async with asyncio.timeout(self._limits.write_seconds):
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except (TimeoutError, OSError):
            raise AbandonedError from None


def _event(text: str) -> bytes:
    return f"data: {text}\n\n".encode()


async def disconnected(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
