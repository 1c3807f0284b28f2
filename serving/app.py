"""An OpenAI-compatible endpoint over a pool of models.

Owns: routes, what errors look like, feedback, the OpenAPI document. Must not know: where models come from, how text is made,
what serves the app.
"""

from __future__ import annotations

import asyncio
import importlib
import time
from collections.abc import Callable

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from serving import protocol
from serving.admission import Gate
from serving.answer import Filter, Writer, no_model
from serving.endpoint import Table
from serving.gauges import Gauges
from serving.guard import Guard, Ticket, extra_headers, ticket_of
from serving.protocol import ChatRequest, CompletionRequest, Feedback, Refusal

SCORED = 10_000  # answers whose score is remembered, so that none is counted twice
PATHS = frozenset(
    {"/health", "/metrics", "/openapi.json", "/v1/models", "/v1/endpoint", "/v1/feedback", "/v1/completions"}
    | {"/v1/chat/completions"}
)  # fmt: skip
MEANINGS = {
    400: "not valid, or over a limit", 401: "no valid token", 403: "no token is set, and the host is not localhost",
    404: "no such model or path", 405: "not this method", 408: "the body took too long", 409: "scored already",
    413: "the body is too large", 415: "not JSON", 429: "the queue is full", 431: "the headers are too large",
    500: "a fault of ours", 503: "no model is ready", 504: "the answer took too long",
}  # fmt: skip
ANYWHERE = (400, 401, 403, 404, 405, 431, 500)


def create_app(pool, table_of: Callable[[], Table], *, filters: Filter | None = None) -> FastAPI:
    """Returns the app.

    Args:
        pool: the models: `pick`, `names`, `healthy`, `record`, `feedback`, `comparison`, `status` (see serving.pool.Pool)
        table_of: returns the endpoint's table as it is now
        filters: gets each text, of users and of models, and returns a reason where it must not pass; it may be slow. Default:
            what the table names. With a filter a stream's text comes all at once, after it was looked at.
    """
    filters = filters or _filter_named(table_of().filters)
    desk = _Desk(pool, table_of, filters)
    app = FastAPI(
        title="Paretune endpoint", version="1", docs_url=None, redoc_url=None, redirect_slashes=False,
        responses=_failures(*ANYWHERE),
    )  # fmt: skip
    app.add_middleware(Guard, table_of=table_of, paths=PATHS, ended=desk.ended)
    app.add_exception_handler(RequestValidationError, _not_valid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Refusal, _refused)
    _add_routes(app, desk)
    app.openapi = lambda: _document(app)
    return app


def _filter_named(name: str | None) -> Filter | None:
    if name is None:
        return None
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _failures(*codes: int) -> dict:
    return {code: {"model": protocol.Error, "description": MEANINGS[code]} for code in codes}


def _add_routes(app: FastAPI, desk: _Desk) -> None:
    json_only = [Depends(_json_only)]
    writing = _failures(408, 413, 415)
    asking = writing | _failures(429, 503, 504)
    event = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
    stream = {"description": "an answer; with stream: true its parts as server-sent events, the last of them [DONE]",
              "content": {"text/event-stream": {"schema": event}}}  # fmt: skip

    @app.get("/health", responses={503: {"description": "no model is ready"}})
    async def health() -> dict[str, str]:
        well = desk.pool.healthy()
        return JSONResponse({"status": "ok" if well else "unavailable"}, 200 if well else 503)

    @app.get("/v1/models", response_model=protocol.Models)
    async def models():
        return {"data": [desk.model(name) for name in desk.pool.names()]}

    @app.get("/v1/models/{model}", response_model=protocol.Model)
    async def one_model(model: str):
        if model not in desk.pool.names():
            raise no_model(desk.pool.names())
        return desk.model(model)

    @app.post("/v1/chat/completions", dependencies=json_only,
              responses=asking | {200: stream | {"model": protocol.ChatCompletion}})  # fmt: skip
    async def chat_completions(body: ChatRequest, request: Request):
        return await desk.writer.answer(body, request)

    @app.post("/v1/completions", dependencies=json_only,
              responses=asking | {200: stream | {"model": protocol.Completion}})  # fmt: skip
    async def completions(body: CompletionRequest, request: Request):
        return await desk.writer.answer(body, request)

    @app.post("/v1/feedback", dependencies=json_only,
              responses=writing | _failures(409))  # fmt: skip
    async def feedback(body: Feedback) -> dict[str, str | float]:
        return desk.feedback(body)

    @app.get("/v1/endpoint")
    async def endpoint() -> dict:
        return await asyncio.to_thread(desk.endpoint)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
    async def metrics():
        return Response(desk.gauges.text(), media_type="text/plain; version=0.0.4")


class _Desk:
    """What the routes share."""

    def __init__(self, pool, table_of: Callable[[], Table], filters: Filter | None):
        self.pool, self.table_of, self.gate = pool, table_of, Gate()
        self.gauges = Gauges(self.gate)
        self.writer = Writer(pool, table_of, filters, self.gate, self.gauges)
        self.began = int(time.time())
        self._scored: dict[str, None] = {}

    def model(self, name: str) -> dict:
        return {"id": name, "object": "model", "created": self.began, "owned_by": "paretune"}

    def ended(self, ticket: Ticket) -> None:
        self.gauges.request(ticket.model, ticket.status, ticket.seconds)

    def feedback(self, body: Feedback) -> dict:
        version = protocol.version_of(body.id)
        if version is None or f"{self.table_of().name}@{version}" not in self.pool.names():
            raise Refusal(404, "there is no such answer", code="answer_not_found", param="id")
        if body.id in self._scored:
            raise Refusal(409, "this answer has a score already", code="scored_already", param="id")
        self._scored[body.id] = None
        if len(self._scored) > SCORED:
            del self._scored[next(iter(self._scored))]
        self.pool.feedback(version, body.score)
        return {"id": body.id, "score": body.score, "version": version}

    def endpoint(self) -> dict:
        """What is served and how the versions compare. Reasons and folders stay with the operator."""
        table, status = self.table_of(), self.pool.status()
        shown = ("state", "share", "running")
        parts = {
            part: {name: {key: one[key] for key in shown if key in one} for name, one in status.get(part, {}).items()}
            for part in ("versions", "adapters")
        }
        return {
            "name": table.name, "generation": table.generation, "healthy": self.pool.healthy(), "models": self.pool.names(),
            **parts, "running": self.gate.running, "waiting": self.gate.waiting, "comparison": self.pool.comparison(),
        }  # fmt: skip


async def _json_only(request: Request) -> None:  # a plain function would be called in a thread of its own
    kind, *rest = [part.strip().lower() for part in request.headers.get("content-type", "").split(";")]
    charsets = [part.partition("=")[2].strip('"') for part in rest if part.startswith("charset")]
    if kind != "application/json" or any(charset not in ("utf-8", "utf8") for charset in charsets):
        raise Refusal(415, "the body must be application/json in UTF-8", code="unsupported_media_type")


def _respond(request: Request, refusal: Refusal) -> Response:
    extra = {name.decode(): value.decode() for name, value in extra_headers(refusal)}
    return JSONResponse(refusal.body(ticket_of(request.scope).id), refusal.status, extra)


def _refused(request: Request, refusal: Refusal) -> Response:
    return _respond(request, refusal)


def _not_valid(request: Request, error: RequestValidationError) -> Response:
    return _respond(request, protocol.refusal_of(error.errors()))


def _http(request: Request, error: HTTPException) -> Response:
    codes = {400: ("invalid_json", "the body is not JSON"), 404: ("not_found", "there is no such path"),
             405: ("method_not_allowed", "this path does not know this method")}  # fmt: skip
    code, message = codes.get(error.status_code, ("error", "the request failed"))
    response = _respond(request, Refusal(error.status_code, message, code=code))
    response.headers.update({name: value for name, value in (error.headers or {}).items() if name.lower() == "allow"})
    return response


def _document(app: FastAPI) -> dict:
    """Returns the OpenAPI document: without FastAPI's own 422, which is 400 here, and with the token."""
    if app.openapi_schema is None:
        found = FastAPI.openapi(app)
        found["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for name in ("HTTPValidationError", "ValidationError"):
            found["components"]["schemas"].pop(name, None)
        for path, methods in found["paths"].items():
            for operation in methods.values():
                operation["responses"].pop("422", None)
                operation["security"] = [] if path == "/health" else [{"token": []}]
        app.openapi_schema = found
    return app.openapi_schema
