"""The application: routes, errors, page."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response
from starlette.types import ASGIApp

from openmythos import __version__
from openmythos.config import ConfigError
from openmythos.serve import answers, errors, text_routes
from openmythos.serve.errors import ApiError
from openmythos.serve.flow import error_of
from openmythos.serve.guards import Guards
from openmythos.serve.jobs import LoopTable, Refused
from openmythos.serve.metrics import CONTENT_TYPE
from openmythos.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    LoopsRequest,
    TokenizeRequest,
    field_names,
)
from openmythos.serve.replicas import Inbox, Ticket
from openmythos.serve.service import Service
from openmythos.serve.sse import EventStream
from openmythos.serve.texts import token_text

PAGE = Path(__file__).parent / "playground"
_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
_BOS, _EOS = "<|bos|>", "<|eos|>"
_ENGINE_EVERY = 0.1  # seconds between two events of /engine
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": answers.ErrorAnswer}
    for status in (400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)
}


def create(
    service: Service, *, keys: Iterable[str] = (), hosts: Iterable[str] | None = None
) -> ASGIApp:
    """The whole application with its guards; see `guards.Guards` for `keys` and `hosts`."""

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        service.replicas.start()
        try:
            yield
        finally:
            await service.replicas.close()

    app = FastAPI(
        title="OpenMythos",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        responses=_ERRORS,
    )
    _add_text_routes(app, service)
    _add_token_routes(app, service)
    _add_loop_routes(app, service)
    _add_health_routes(app, service)
    _add_page(app)
    _add_errors(app)
    return Guards(app, service.limits, keys=keys, hosts=hosts)


def _add_text_routes(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> answers.Models:
        return answers.Models(data=[service.model])

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> answers.Model:
        service.require_model(name)
        return service.model

    # An answer may also be a stream of chunks: server-sent events.
    events: Any = {"text/event-stream": {"schema": {"type": "string"}}}

    @app.post("/v1/completions", responses={200: {"model": answers.Completion, "content": events}})
    async def completions(asked: CompletionRequest, http: Request) -> Response:
        return await text_routes.completions(service, asked, http)

    @app.post("/v1/chat/completions", responses={200: {"model": answers.Chat, "content": events}})
    async def chat(asked: ChatRequest, http: Request) -> Response:
        return await text_routes.chat(service, asked, http)


def _add_token_routes(app: FastAPI, service: Service) -> None:
    tokenizer = service.tokenizer
    # Names of the tokens that start and end texts, which no text encodes to.
    special = dict(zip((_EOS,), tokenizer.stop_ids, strict=False))
    special |= {_BOS: tokenizer.bos_id} if tokenizer.bos_id >= 0 else {}

    @app.post("/tokenize")
    async def tokenize(asked: TokenizeRequest) -> answers.Tokens:
        service.require_model(asked.model)
        try:
            if asked.prompt in special:
                ids = [special[asked.prompt]]
            elif asked.add_special_tokens and asked.prompt:
                ids = tokenizer.prompt_ids(asked.prompt)
            else:
                ids = tokenizer.encode(asked.prompt)
        except ConfigError as error:
            raise ApiError(400, str(error), param="prompt", code="invalid_value") from error
        texts = [token_text(tokenizer, token) for token in ids]
        context = service.config.context
        return answers.Tokens(count=len(ids), max_model_len=context, tokens=ids, texts=texts)

    @app.post("/detokenize")
    async def detokenize(asked: DetokenizeRequest) -> answers.Text:
        service.require_model(asked.model)
        try:
            return answers.Text(prompt=tokenizer.decode(asked.tokens))
        except ValueError as error:
            raise ApiError(400, f"tokens: {error}", param="tokens", code="invalid_value") from error

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> answers.TokenizerInfo:
        template = None if service.chat is None else service.chat.source
        bos, eos = (name if name in special else None for name in (_BOS, _EOS))
        return answers.TokenizerInfo(bos_token=bos, eos_token=eos, chat_template=template)


def _add_loop_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/loops")
    async def loops(asked: LoopsRequest, http: Request) -> answers.Loops:
        service.require_model(asked.model)
        ids, count = service.prompt_ids(asked.prompt), service.loops(asked)
        service.require_room_for_loops(ids, count, last_only=asked.last_only)
        inbox = Inbox()
        try:
            rule = asked.rule()
        except ConfigError as error:
            raise errors.of_config(error) from error
        ticket = service.replicas.look(
            tuple(ids), count, rule, inbox, top=asked.top, last_only=asked.last_only
        )
        table = await _table(inbox, ticket, http, service.limits.request_seconds)
        first = len(ids) - len(table.positions)
        positions = [
            answers.LoopPosition(
                position=place,
                id=ids[place],
                token=token_text(service.tokenizer, ids[place]),
                loops_used=used,
                loops=[_view(service, loop, row) for loop, row in enumerate(rows, 1)],
            )
            for place, used, rows in zip(
                range(first, len(ids)), table.loops_used, table.positions, strict=True
            )
        ]
        return answers.Loops(model=service.name, num_loops=count, positions=positions)

    @app.get(
        "/engine", responses={200: {"content": {"text/event-stream": {}}}}, response_model=None
    )
    async def engine(stream: bool = False) -> answers.EngineView | Response:
        if not stream:
            return _engine_view(service)

        async def views() -> AsyncIterator[str]:
            before = ""
            # An open stream would hold up the end of the server.
            while service.replicas.busy or not service.replicas.draining:
                text = _engine_view(service).model_dump_json()
                if text != before:
                    yield text
                before = text
                await asyncio.sleep(_ENGINE_EVERY)

        return EventStream(views(), service.limits)


async def _table(inbox: Inbox, ticket: Ticket, http: Request, seconds: float) -> LoopTable:
    """The answer of a replica; the work is given up if the client leaves."""
    try:
        ((_, found),) = await text_routes.unless_left(inbox.take(), http, seconds)
    finally:
        ticket.cancel()
    if isinstance(found, Refused):
        raise error_of(found)
    assert isinstance(found, LoopTable)
    return found


def _view(service: Service, loop: int, row: Any) -> answers.LoopView:
    top = [
        answers.LoopTop(id=token, token=token_text(service.tokenizer, token), prob=prob)
        for token, prob in row.top
    ]
    return answers.LoopView(
        loop=loop,
        top=top,
        entropy=row.entropy,
        change=row.change,
        kl=row.kl,
        kl_last=row.kl_last,
    )


def _engine_view(service: Service) -> answers.EngineView:
    stats = [replica.stats for replica in service.replicas.all]
    rows = [
        answers.Row(
            replica=replica,
            request=str(ticket),
            sample=row.sample,
            phase=row.phase,
            loop=row.loop,
            num_loops=row.num_loops,
            prompt_tokens=row.prompt_tokens,
            new_tokens=row.new_tokens,
        )
        for replica, ticket, row in service.replicas.rows()
    ]
    names = ("rows_running", "rows_waiting", "pages_used", "pages_total")
    sums = {name: sum(getattr(x, name) for x in stats) for name in names}
    return answers.EngineView(rows=rows, **sums)


def _add_health_routes(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health(response: Response) -> answers.Health:
        found = _health(service)
        response.status_code = 503 if found.status == "unhealthy" else 200
        return found

    @app.get("/ready")
    async def ready(response: Response) -> answers.Health:
        found = _health(service)
        response.status_code = 200 if service.replicas.ready else 503
        return found

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/version")
    async def version() -> answers.Version:
        return answers.Version(version=__version__)


def _health(service: Service) -> answers.Health:
    replicas, seconds = service.replicas, service.limits.hang_seconds
    each = [
        answers.ReplicaHealth(
            replica=replica.index,
            state="hangs" if replica.hangs(seconds) else replica.state,
            restarts=max(replica.restarts, 0),
        )
        for replica in replicas.all
    ]
    states = {replica.state for replica in each}
    status = "ok" if states == {"ready"} else "degraded"
    if "ready" not in states:
        status = "unhealthy" if "starting" not in states else "starting"
    if "hangs" in states:
        status = "unhealthy"
    if replicas.draining:
        status = "draining"
    return answers.Health.model_validate({"status": status, "replicas": each})


def _add_page(app: FastAPI) -> None:
    files = {path.name: path for path in PAGE.iterdir() if path.suffix in _TYPES}

    def file(name: str) -> Response:
        if name not in files:
            raise ApiError(404, f"there is no {name[:100]!r}")
        return FileResponse(files[name], media_type=_TYPES[files[name].suffix])

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return file("index.html")

    @app.get("/playground/{name}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        return file(name)


def _add_errors(app: FastAPI) -> None:
    """All errors in OpenAI's form."""
    names: dict[str, type[BaseModel]] = {
        "/v1/completions": CompletionRequest,
        "/v1/chat/completions": ChatRequest,
        "/v1/loops": LoopsRequest,
        "/tokenize": TokenizeRequest,
        "/detokenize": DetokenizeRequest,
    }

    def answer(error: ApiError) -> Response:
        # As ASCII: a message may quote half of a character, which UTF-8 does not have.
        body = json.dumps(error.body())
        headers = error.headers()
        return Response(body, error.status, headers, media_type="application/json")

    @app.exception_handler(ApiError)
    async def api_error(_http: Request, error: ApiError) -> Response:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(http: Request, error: RequestValidationError) -> Response:
        request = names.get(http.url.path)
        known = {"": []} if request is None else field_names(request)
        return answer(errors.of_validation(list(error.errors()), known))

    @app.exception_handler(HTTPException)
    async def refused(http: Request, error: HTTPException) -> Response:
        text = f"{http.method} {http.url.path[:200]}: {error.detail}"
        found = answer(ApiError(error.status_code, text))
        found.headers.update(error.headers or {})
        return found

    @app.exception_handler(Exception)
    async def broken(_http: Request, error: Exception) -> Response:
        return answer(ApiError(500, f"{type(error).__name__}; the server's log says more"))
