"""/v1/completions and /v1/chat/completions: from requests to flows, from pieces to answers."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from openmythos.serve.errors import CLIENT_GONE, ApiError
from openmythos.serve.flow import Asked, Flow
from openmythos.serve.protocol import ChatRequest, CompletionRequest, Generation
from openmythos.serve.service import Service
from openmythos.serve.sse import EventStream, disconnected
from openmythos.serve.texts import Piece, chat_logprobs, completion_logprobs

_DEFAULT_NEW_TOKENS = 16  # of completions, as OpenAI has it
_FIRST_EVENT = 0.5  # seconds to wait for an error that can still become a status
_Result = TypeVar("_Result")


class CompletionFormat:
    """Answers as /v1/completions writes them."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, service: Service, asked: CompletionRequest) -> None:
        self._tokenizer, self._top = service.tokenizer, asked.logprobs
        self._offsets: dict[int, int] = {}

    def choice(self, index: int, piece: Piece, *, streamed: bool) -> dict[str, Any]:
        """The text of a piece, and its log-probabilities if they were asked for."""
        found = None
        if self._top is not None:
            at = self._offsets.get(index, 0)
            made = completion_logprobs(self._tokenizer, piece, self._top, at)
            self._offsets[index] = at + sum(map(len, made.tokens))
            found = made.model_dump()
        return {"text": piece.text, "logprobs": found}


class ChatFormat:
    """Answers as /v1/chat/completions writes them."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, service: Service, asked: ChatRequest) -> None:
        self._tokenizer, self._has_logprobs = service.tokenizer, bool(asked.logprobs)
        self._begun: set[int] = set()

    def choice(self, index: int, piece: Piece, *, streamed: bool) -> dict[str, Any]:
        """The message of a piece, or what is new of it; the first chunk has the role."""
        found = chat_logprobs(self._tokenizer, piece).model_dump() if self._has_logprobs else None
        message: dict[str, Any] = {"content": piece.text}
        if index not in self._begun:
            message = {"role": "assistant", **message, "refusal": None}
        self._begun.add(index)
        return {"delta" if streamed else "message": message, "logprobs": found}


@dataclass
class TextAnswer:
    """The answer to a request for text: a whole one or a stream."""

    service: Service
    asked: Generation
    format: CompletionFormat | ChatFormat
    flow: Flow
    http: HttpRequest

    def __post_init__(self) -> None:
        self._created, self._begun = int(time.time()), time.monotonic()

    async def respond(self) -> Response:
        """Compute the answer, or begin to; a client that leaves ends the work."""
        try:
            self.flow.start()
            if self.asked.stream:
                await self.flow.begun(_FIRST_EVENT)
                return EventStream(self._events(), self.service.limits, self._ended)
            return await self._whole()
        except BaseException as error:
            self._ended(error.status if isinstance(error, ApiError) else CLIENT_GONE)
            raise

    async def _whole(self) -> Response:
        pieces = await unless_left(self._collect(), self.http)
        choices = [self._choice(index, pieces[index], streamed=False) for index in sorted(pieces)]
        answer = self._body(choices, self.format.whole)
        self._ended(200)
        return JSONResponse(answer | {"usage": self.flow.usage.model_dump()})

    async def _collect(self) -> dict[int, Piece]:
        """All pieces, joined by choice."""
        found: dict[int, Piece] = {}
        async for pieces in self.flow.pieces():
            for index, piece in pieces:
                found.setdefault(index, Piece()).join(piece)
        return found

    async def _events(self) -> AsyncIterator[str]:
        options = self.asked.stream_options
        has_usage = options is not None and options.include_usage
        usage = {"usage": None} if has_usage else {}
        async for pieces in self.flow.pieces():
            for index, piece in pieces:
                body = self._body([self._choice(index, piece, streamed=True)], self.format.chunk)
                yield json.dumps(body | usage)
        if has_usage:
            body = self._body([], self.format.chunk)
            yield json.dumps(body | {"usage": self.flow.usage.model_dump()})

    def _choice(self, index: int, piece: Piece, *, streamed: bool) -> dict[str, Any]:
        found: dict[str, Any] = {"index": index, "finish_reason": piece.finish}
        if self.asked.return_loops:
            found |= {"loops": piece.loops, "token_ids": piece.tokens}
        return found | self.format.choice(index, piece, streamed=streamed)

    def _body(self, choices: list[dict[str, Any]], kind: str) -> dict[str, Any]:
        return {
            "id": f"{self.format.prefix}-{self.http.state.request_id}",
            "object": kind,
            "created": self._created,
            "model": self.service.name,
            "choices": choices,
        }

    def _ended(self, status: int) -> None:
        self.flow.cancel()
        seconds, usage = time.monotonic() - self._begun, self.flow.usage
        self.service.metrics.request(self.http.url.path, status, seconds)
        self.service.metrics.usage(usage.prompt_tokens, usage.token_loops)


async def completions(service: Service, asked: CompletionRequest, http: HttpRequest) -> Response:
    """Answer POST /v1/completions."""
    service.require_model(asked.model)
    asked.refuse_unsupported()
    given = asked.prompts()
    most = service.limits.max_requests * len(service.replicas.all)
    if len(given) > most:
        text = f"prompt: has {len(given)} prompts, more than the {most} that fit"
        raise ApiError(400, text, param="prompt", code="invalid_value")
    new = _DEFAULT_NEW_TOKENS if asked.max_tokens is None else asked.max_tokens
    echo = bool(asked.echo)
    requests, texts = [], []
    for prompt in given:
        ids = service.prompt_ids(prompt)
        requests.append(service.request(asked, ids, new, asked.logprobs, echo=echo))
        texts.append(service.tokenizer.decode(ids))
    work = Asked(requests=requests, texts=texts, echo=echo, **_common(service, asked))
    answer = TextAnswer(
        service, asked, CompletionFormat(service, asked), _flow(service, work), http
    )
    return await answer.respond()


async def chat(service: Service, asked: ChatRequest, http: HttpRequest) -> Response:
    """Answer POST /v1/chat/completions."""
    service.require_model(asked.model)
    asked.refuse_unsupported()
    if service.chat is None:
        text = "messages: this model has no chat template; use /v1/completions, or start the "
        text += "server with --chat-template"
        raise ApiError(400, text, param="messages", code="no_chat_template")
    ids = service.prompt_ids(service.chat.prompt(asked.messages))
    new = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    top = (asked.top_logprobs or 0) if asked.logprobs else None
    request = service.request(asked, ids, new, top)
    work = Asked(requests=[request], texts=[""], echo=False, **_common(service, asked))
    return await TextAnswer(
        service, asked, ChatFormat(service, asked), _flow(service, work), http
    ).respond()


def _common(service: Service, asked: Generation) -> dict[str, Any]:
    return {"stops": asked.stops(), "seconds": service.limits.request_seconds}


def _flow(service: Service, work: Asked) -> Flow:
    return Flow(work, service.tokenizer, service.replicas, service.metrics)


async def unless_left(
    work: Coroutine[Any, Any, _Result], http: HttpRequest, seconds: float | None = None
) -> _Result:
    """The result of the work; an ApiError if the client leaves first, or after so many seconds."""
    task = asyncio.ensure_future(work)
    left = asyncio.ensure_future(disconnected(http.receive))
    try:
        await asyncio.wait({task, left}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if left.done():
            raise ApiError(CLIENT_GONE, "the client has gone")
        raise ApiError(504, f"the request took longer than {seconds:g} s", code="timeout")
    finally:
        task.cancel()
        left.cancel()
        with contextlib.suppress(asyncio.CancelledError, ApiError):
            await task
