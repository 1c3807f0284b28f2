"""An OpenAI-compatible endpoint over a pool of models.

Owns: routes, admission, time limits, streams, content filters, the OpenAPI document. Must not know: where models come from,
what serves the app.

A request waits for its turn, takes a model, and writes its answer in a task of its own: a client that reads slowly holds up
nobody and no place in the batch; one that leaves, or runs out of time, takes its request out of the batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from serving import protocol
from serving.admission import Full, Gate
from serving.endpoint import Limits, Table
from serving.gauges import Gauges
from serving.generate import EngineError, Piece
from serving.guard import GONE, Guard, Ticket, extra_headers, ticket_of
from serving.pool import Unavailable
from serving.protocol import Asked, ChatRequest, CompletionRequest, Feedback, Refusal
from training.errors import InputError

LONG = 10_000  # characters; longer texts are tokenized beside the event loop
SCORED = 10_000  # answers whose score is remembered, so that none is counted twice
SESSION = "x-session-id"
PATHS = frozenset(
    {"/health", "/metrics", "/openapi.json", "/v1/models", "/v1/endpoint", "/v1/feedback", "/v1/completions"}
    | {"/v1/chat/completions"}
)  # fmt: skip
MEANINGS = {
    400: "not valid, or over a limit", 401: "no valid token", 404: "no such model or path", 405: "not this method",
    408: "the body took too long", 409: "scored already", 413: "the body is too large", 415: "not JSON",
    429: "the queue is full", 431: "the headers are too large", 500: "a fault of ours", 503: "no model is ready",
    504: "the answer took too long",
}  # fmt: skip
Filter = Callable[[str], str | None]


def create_app(pool, table_of: Callable[[], Table], *, filters: Filter | None = None) -> FastAPI:
    """Returns the app.

    Args:
        pool: the models: `pick`, `names`, `healthy`, `record`, `feedback`, `comparison`, `status` (see serving.pool.Pool)
        table_of: returns the endpoint's table as it is now
        filters: gets each text, of users and of models, and returns a reason where it must not pass; it may be slow. Default:
            what the table names. With a filter a stream's text comes all at once, after it was looked at.
    """
    filters = filters or _filter_named(table_of().filters)
    gate = Gate()
    desk = _Desk(pool, table_of, filters, gate, Gauges(gate))
    app = FastAPI(
        title="Paretune endpoint", version="1", docs_url=None, redoc_url=None, redirect_slashes=False,
        responses={code: {"model": protocol.Error, "description": MEANINGS[code]} for code in (400, 401, 404, 405, 431, 500)},
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


def _add_routes(app: FastAPI, desk: _Desk) -> None:
    json_only = [Depends(_json_only)]
    writing = {code: {"model": protocol.Error, "description": MEANINGS[code]} for code in (408, 413, 415)}
    asking = writing | {code: {"model": protocol.Error, "description": MEANINGS[code]} for code in (429, 503, 504)}
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
            raise _no_model(desk.pool.names())
        return desk.model(model)

    @app.post("/v1/chat/completions", dependencies=json_only,
              responses=asking | {200: stream | {"model": protocol.ChatCompletion}})  # fmt: skip
    async def chat_completions(body: ChatRequest, request: Request):
        return await desk.answer(body, request)

    @app.post("/v1/completions", dependencies=json_only,
              responses=asking | {200: stream | {"model": protocol.Completion}})  # fmt: skip
    async def completions(body: CompletionRequest, request: Request):
        return await desk.answer(body, request)

    @app.post("/v1/feedback", dependencies=json_only,
              responses=writing | {409: {"model": protocol.Error, "description": MEANINGS[409]}})  # fmt: skip
    async def feedback(body: Feedback) -> dict[str, str | float]:
        return desk.feedback(body)

    @app.get("/v1/endpoint")
    async def endpoint() -> dict:
        return await asyncio.to_thread(desk.endpoint)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
    async def metrics():
        return Response(desk.gauges.text(), media_type="text/plain; version=0.0.4")


@dataclass
class _Work:
    """One request being answered."""

    asked: Asked
    ticket: Ticket
    lease: object
    limits: Limits
    id: str = ""
    news: asyncio.Queue = field(default_factory=asyncio.Queue)  # (choice, piece); None: all ended; an exception: none will come
    first: float | None = None
    prompt_tokens: int = 0
    tokens: int = 0

    @property
    def chat(self) -> bool:
        return isinstance(self.asked, ChatRequest)

    def frame(self, kind: str) -> dict:
        return {
            "id": self.id, "object": kind, "created": int(time.time()), "model": self.asked.model,
            "system_fingerprint": self.ticket.model,
        }  # fmt: skip


class _Desk:
    """What the routes share."""

    def __init__(self, pool, table_of, filters: Filter | None, gate: Gate, gauges: Gauges):
        self.pool, self.table_of, self.filters, self.gate, self.gauges = pool, table_of, filters, gate, gauges
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

    async def answer(self, asked: Asked, request: Request) -> Response:
        ticket, limits = ticket_of(request.scope), self.table_of().limits
        protocol.within(asked, limits)
        session = request.headers.get(SESSION, "")[:256]
        try:
            lease = self.pool.pick(asked.model, asked.user or session or ticket.id)
        except KeyError:
            raise _no_model(self.pool.names()) from None
        work = _Work(asked, ticket, lease, limits)
        writing = asyncio.create_task(self._write(work))
        response = None
        try:
            answering = _Stream(self, work, writing).begin() if asked.stream else self._whole(work, writing)
            response = await _unless_gone(answering, request.receive)
            return response
        finally:
            if not isinstance(response, _Stream):
                writing.cancel()

    async def _whole(self, work: _Work, writing: asyncio.Task) -> Response:
        texts: dict[int, list[str]] = {index: [] for index in range(work.asked.choices * work.asked.prompts)}
        finish: dict[int, str] = {}
        async with aclosing(self._news(work, writing)) as news:
            async for index, piece in news:
                texts[index].append(piece.text)
                finish[index] = piece.finish
        frame = work.frame("chat.completion" if work.chat else "text_completion")
        choices = [protocol.choice(work.chat, index, "".join(parts), finish[index]) for index, parts in texts.items()]
        return JSONResponse(frame | {"choices": choices, "usage": protocol.usage(work.prompt_tokens, work.tokens)})

    async def _news(self, work: _Work, writing: asyncio.Task) -> AsyncIterator[tuple[int, Piece]]:
        """Yields what is written, until the time is over; whoever stops listening stops the writing."""
        try:
            while True:
                async with _until(work.ticket.deadline):
                    found = await work.news.get()
                if found is None:
                    return
                if isinstance(found, Exception):
                    raise found
                yield found
        except TimeoutError:
            self._record(work, error=True)
            raise Refusal(504, f"the answer took over {work.limits.seconds:g} s", code="timeout", retry=1) from None
        finally:
            writing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await writing

    async def _write(self, work: _Work) -> None:
        """Writes all answers to a request into its news. Its place in the batch is held exactly as long."""
        limits, places = work.limits, work.asked.choices * work.asked.prompts
        try:
            await self._look_at_all(work.asked.texts)
            async with self.gate.admitted(places, concurrent=limits.concurrent, queue=limits.queue), work.lease as lease:
                work.ticket.model = lease.label
                work.id = protocol.new_id("chatcmpl" if work.chat else "cmpl", str(lease.version))
                self.gauges.engine(lease.label, lease.engine)
                prompts = await _encoded(lease.engine, work.asked)
                samplings = [_sampling(work.asked, ids, lease.engine.context, limits) for ids in prompts]
                work.prompt_tokens = sum(map(len, prompts))
                async with asyncio.TaskGroup() as group:
                    for index in range(places):
                        number, again = divmod(index, work.asked.choices)
                        sampling = samplings[number]
                        if again and sampling.seed is not None:  # several answers from one seed are not one answer
                            sampling = replace(sampling, seed=sampling.seed + again * 2**64)
                        group.create_task(self._write_one(work, index, lease.engine, prompts[number], sampling))
            self._record(work, error=False)
            work.news.put_nowait(None)
        except Exception as found:
            error = _first_of(found)
            if isinstance(error, EngineError):
                self._record(work, error=True)
            work.news.put_nowait(_as_refusal(error))

    async def _write_one(self, work: _Work, index: int, engine, ids: list[int], sampling) -> None:
        held, before = [], 0
        async with aclosing(engine.generate(ids, sampling)) as pieces:
            async for piece in pieces:
                work.first = work.ticket.seconds if work.first is None else work.first
                work.tokens, before = work.tokens + piece.completion_tokens - before, piece.completion_tokens
                if self.filters is None:
                    work.news.put_nowait((index, piece))
                    continue
                held.append(piece.text)
                if piece.finish:
                    text = "".join(held)
                    blocked = await self._look_at(text) is not None
                    text, finish = ("", "content_filter") if blocked else (text, piece.finish)
                    work.news.put_nowait((index, replace(piece, text=text, finish=finish)))

    async def _look_at_all(self, texts: list[str]) -> None:
        for text in texts if self.filters else ():
            if await self._look_at(text) is not None:
                raise Refusal(400, "the content filter does not let this pass", code="content_filter")

    async def _look_at(self, text: str) -> str | None:
        try:
            return await asyncio.to_thread(self.filters, text)
        except Exception:  # a filter is the operator's own code; where it fails nothing passes
            raise Refusal(503, "the content filter does not answer", code="filter_failed", retry=5) from None

    def _record(self, work: _Work, *, error: bool) -> None:
        if work.ticket.model is None:
            return
        self.gauges.answer(work.ticket.model, work.first, work.prompt_tokens, work.tokens)
        self.pool.record(work.lease.version, seconds=work.ticket.seconds, first_token=work.first,
                         prompt_tokens=work.prompt_tokens, tokens=work.tokens, error=error)  # fmt: skip


class _Stream(Response):
    """Server-sent events of an answer. It begins with the first piece, so what goes wrong before that has a status of its own."""

    def __init__(self, desk: _Desk, work: _Work, writing: asyncio.Task):
        super().__init__(media_type="text/event-stream")
        del self.headers["content-length"]
        self._work, self._news = work, desk._news(work, writing)
        self._begun: set[int] = set()
        self._next: tuple[int, Piece] | None = None

    async def begin(self) -> _Stream:
        try:
            self._next = await anext(self._news)
        except BaseException:
            await self.stop()
            raise
        return self

    async def stop(self) -> None:
        await self._news.aclose()

    async def __call__(self, scope, receive, send) -> None:
        sending = asyncio.create_task(self._send(send))
        leaving = asyncio.create_task(_left(receive))
        ended = self._work.ticket.deadline + 1  # a second to say that it is over, for those who still read
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED, timeout=ended - time.monotonic())
            if sending.done():
                sending.result()
        finally:
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
            await self.stop()

    async def _send(self, send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events():
            await send({"type": "http.response.body", "body": b"data: " + event + b"\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        work = self._work
        frame = work.frame("chat.completion.chunk" if work.chat else "text_completion")
        counted = bool(work.asked.stream_options and work.asked.stream_options.include_usage)
        frame |= {"usage": None} if counted else {}
        try:
            found = self._next
            while found is not None:
                yield _packed(frame | {"choices": [self._delta(*found)]})
                found = await anext(self._news, None)
            if counted:
                yield _packed(frame | {"choices": [], "usage": protocol.usage(work.prompt_tokens, work.tokens)})
        except Refusal as refusal:  # 200 is long sent
            yield _packed(refusal.body(work.ticket.id))

    def _delta(self, index: int, piece: Piece) -> dict:
        first = index not in self._begun
        self._begun.add(index)
        return protocol.delta(self._work.chat, index, piece.text, piece.finish, first)


def _packed(event: dict) -> bytes:
    return json.dumps(event, separators=(",", ":")).encode()


def _until(deadline: float):
    return asyncio.timeout_at(asyncio.get_running_loop().time() + deadline - time.monotonic())


async def _left(receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _unless_gone(answering, receive) -> Response:
    """Returns the answer; where the client leaves before, its work is called off."""
    task, leaving = asyncio.create_task(answering), asyncio.create_task(_left(receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else Response(status_code=GONE)
    finally:
        for one in (task, leaving):
            one.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _encoded(engine, asked: Asked) -> list[list[int]]:
    def encode() -> list[list[int]]:
        if isinstance(asked, ChatRequest):
            return [engine.encode_chat(asked.conversation)]
        return [engine.encode(text) for text in asked.texts]

    return await asyncio.to_thread(encode) if sum(map(len, asked.texts)) > LONG else encode()


def _sampling(asked: Asked, ids: list[int], context: int, limits: Limits):
    most = limits.prompt_tokens
    if most is not None and len(ids) > most:
        raise Refusal(400, f"a prompt has at most {most} tokens here, got {len(ids)}", code="context_length_exceeded",
                      param="messages" if isinstance(asked, ChatRequest) else "prompt")  # fmt: skip
    if not ids:
        raise Refusal(400, "the prompt has no tokens", code="invalid_value")
    return asked.sampling(context - len(ids), limits)


def _first_of(error: Exception) -> Exception:
    return _first_of(error.exceptions[0]) if isinstance(error, ExceptionGroup) else error


def _as_refusal(error: Exception) -> Exception:
    if isinstance(error, Full):
        return Refusal(429, "too many requests are waiting", code="queue_full", retry=1)
    if isinstance(error, InputError):
        problem = error.problems[0]
        return Refusal(
            400, f"{problem.where}: {problem.rule} {problem.remedy}".strip(), code="invalid_value", param=problem.where
        )
    if isinstance(error, Unavailable):
        return Refusal(503, "the model is not ready", code="model_not_ready", retry=1 if error.busy else 5)
    if isinstance(error, EngineError):
        return Refusal(503, "the model stopped answering", code="engine_failed", retry=5)
    return error


def _no_model(names: list[str]) -> Refusal:
    listed = ", ".join(names[:20]) + (" and more" if len(names) > 20 else "")
    return Refusal(404, f"there is no such model; there are: {listed}", code="model_not_found", param="model")


def _json_only(request: Request) -> None:
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
