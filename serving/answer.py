"""One request's way to its answer.

Owns: `Writer` (admission, time, streams, content filters, what is recorded). Must not know: routes, where models come from.

A request waits for its turn, takes a model, and writes its answer in a task of its own: a client that reads slowly holds up
nobody and no place in the batch; one that leaves, or runs out of time, takes its request out of the batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from serving import protocol
from serving.admission import Full, Gate
from serving.endpoint import Limits, Table
from serving.gauges import Gauges
from serving.generate import EngineError, Piece
from serving.guard import GONE, Ticket, ticket_of
from serving.lease import Unavailable
from serving.protocol import Asked, ChatRequest, Refusal
from training.errors import InputError

LONG = 10_000  # characters; longer texts are tokenized beside the event loop
SESSION = "x-session-id"
Filter = Callable[[str], str | None]


@dataclass
class _Work:
    """One request being answered."""

    asked: Asked
    ticket: Ticket
    lease: object
    limits: Limits
    id: str = ""
    news: asyncio.Queue = field(default_factory=asyncio.Queue)  # (choice, piece); None: all ended; an exception: none will come
    first: float | None = None  # when the first token came
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


class Writer:
    """Answers requests for text.

    Args:
        pool: the models
        table_of: returns the endpoint's table as it is now
        filters: a content filter, or None
        gate: who may use the batch
        gauges: what is measured
    """

    def __init__(self, pool, table_of: Callable[[], Table], filters: Filter | None, gate: Gate, gauges: Gauges):
        self.pool, self.table_of, self.filters, self.gate, self.gauges = pool, table_of, filters, gate, gauges

    async def answer(self, asked: Asked, request: Request) -> Response:
        """Returns the answer, or the stream of it.

        Raises:
            Refusal: over a limit, no such model, no room, no time.
        """
        ticket, limits = ticket_of(request.scope), self.table_of().limits
        protocol.within(asked, limits)
        session = request.headers.get(SESSION, "")[:256]
        try:
            lease = self.pool.pick(asked.model, asked.user or session or ticket.id)
        except KeyError:
            raise no_model(self.pool.names()) from None
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
                if work.news.empty():
                    async with _until(work.ticket.deadline):
                        found = await work.news.get()
                elif time.monotonic() > work.ticket.deadline:
                    raise TimeoutError
                else:
                    found = work.news.get_nowait()
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
        if work.asked.stream and self.filters is None:
            await self._write_pieces(work, index, engine.generate(ids, sampling))
            return
        piece = await engine.answer(ids, sampling)
        work.first = min(work.first or piece.first, piece.first)
        work.tokens += piece.completion_tokens
        if self.filters is not None and await self._look_at(piece.text) is not None:
            piece = replace(piece, text="", finish="content_filter")
        work.news.put_nowait((index, piece))

    async def _write_pieces(self, work: _Work, index: int, generated: AsyncIterator[Piece]) -> None:
        before = 0
        async with aclosing(generated) as pieces:
            async for piece in pieces:
                work.first = work.first or piece.first
                work.tokens, before = work.tokens + piece.completion_tokens - before, piece.completion_tokens
                work.news.put_nowait((index, piece))

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
        first = None if work.first is None else work.first - work.ticket.began
        self.gauges.answer(work.ticket.model, first, work.prompt_tokens, work.tokens)
        self.pool.record(work.lease.version, seconds=work.ticket.seconds, first_token=first,
                         prompt_tokens=work.prompt_tokens, tokens=work.tokens, error=error)  # fmt: skip


class _Stream(Response):
    """Server-sent events of an answer. It begins with the first piece, so what goes wrong before that has a status of its own."""

    def __init__(self, writer: Writer, work: _Work, writing: asyncio.Task):
        super().__init__(media_type="text/event-stream")
        del self.headers["content-length"]
        self._work, self._news = work, writer._news(work, writing)
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
        ready = b""
        async for event in self._events():
            ready += b"data: " + event + b"\n\n"
            if self._work.news.empty():  # what comes together is sent together
                await send({"type": "http.response.body", "body": ready, "more_body": True})
                ready = b""
        await send({"type": "http.response.body", "body": ready + b"data: [DONE]\n\n", "more_body": False})

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


def no_model(names: list[str]) -> Refusal:
    """Returns the 404 that lists those there are."""
    listed = ", ".join(names[:20]) + (" and more" if len(names) > 20 else "")
    return Refusal(404, f"there is no such model; there are: {listed}", code="model_not_found", param="model")
