"""The door: what is turned away before anything reads it.

Owns: request ids, the bearer token, limits of headers, body and its time, errors that nobody caught, one log line per request.
Must not know: routes' meaning, engines.

Pure ASGI, so it sees a body before anything has read it all. Nothing that a request says is logged.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import secrets
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

from serving.endpoint import Table
from serving.protocol import Refusal

OPEN = "/health"
GONE = 499  # what is counted where the client left or the answer broke off; nobody sees it
ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_METHODS = {name: name for name in ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")}
log = logging.getLogger("serving")


@dataclass
class Ticket:
    """One request: its id, when it began, when it must be answered (`time.monotonic`), and the model that answers it."""

    id: str
    deadline: float
    began: float = field(default_factory=time.monotonic)
    model: str | None = None
    status: int = 0
    whole: bool = False  # whether all of the answer was handed to the server

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


def ticket_of(scope) -> Ticket:
    """Returns the ticket that the guard gave to this request."""
    return scope["serving.ticket"]


class Guard:
    """Wraps an ASGI app.

    Args:
        app: what is guarded
        table_of: returns the endpoint's table as it is now
        paths: of the app; others are logged as one
        ended: called with each ticket when its request is over
    """

    def __init__(self, app, table_of: Callable[[], Table], paths: frozenset[str], ended: Callable[[Ticket], None]):
        self._app, self._table_of, self._paths, self._ended = app, table_of, paths, ended

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        table = self._table_of()
        headers = [(name.lower(), value) for name, value in scope["headers"]]
        ticket = Ticket(_id(headers), deadline=time.monotonic() + table.limits.seconds)
        scope["serving.ticket"] = ticket
        answer, path = _Answer(ticket, send), _path(scope)
        try:
            _check_headers(scope, headers, table.limits.header_bytes)
            _check_token(path, headers, table.tokens)
            if scope["method"] in ("POST", "PUT", "PATCH"):
                receive = await _whole_body(headers, receive, ticket.deadline, table.limits.body_bytes)
            await self._app(scope, receive, answer)
        except Refusal as refusal:
            await answer.refuse(refusal)
        except _Gone:
            pass
        except Exception as error:  # the last line of defence: no trace leaves, and the message may hold what was asked
            place = traceback.extract_tb(error.__traceback__)[-1]
            log.error("%s: %s in %s:%s", ticket.id, type(error).__name__, place.name, place.lineno)
            await answer.refuse(Refusal(500, "this should not have happened", code="internal_error"))
        finally:
            if not ticket.whole:
                ticket.status = GONE
            self._ended(ticket)
            path = path if path in self._paths else "(other)"
            log.info("%s %s %s %d %.3f s %s", ticket.id, _METHODS.get(scope["method"], "(other)"), path, ticket.status,
                     ticket.seconds, ticket.model or "-")  # fmt: skip


class _Gone(Exception):
    pass


class _Answer:
    """Sends, adding what every answer carries."""

    def __init__(self, ticket: Ticket, send):
        self._ticket, self._send = ticket, send

    async def __call__(self, message) -> None:
        ticket = self._ticket
        if message["type"] == "http.response.start":
            ticket.status = message["status"]
            own = [
                (b"x-request-id", ticket.id.encode()),
                (b"cache-control", b"no-store"),
                (b"x-content-type-options", b"nosniff"),
            ]
            own += [(b"x-model-version", ticket.model.encode())] if ticket.model else []
            message = {**message, "headers": [*message["headers"], *own]}
        elif message["type"] == "http.response.body":
            ticket.whole = not message.get("more_body", False)
        await self._send(message)

    async def refuse(self, refusal: Refusal) -> None:
        if self._ticket.status:
            return  # the answer has begun: only breaking off is left
        body = json.dumps(refusal.body(self._ticket.id)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *extra_headers(refusal)]
        if refusal.status in (408, 413, 431):  # what is left of the request is not read
            headers.append((b"connection", b"close"))
        await self({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await self({"type": "http.response.body", "body": body})


def extra_headers(refusal: Refusal) -> list[tuple[bytes, bytes]]:
    """Returns the headers that go with a refusal."""
    found = [] if refusal.retry is None else [(b"retry-after", str(refusal.retry).encode())]
    return [*found, (b"www-authenticate", b"Bearer")] if refusal.status == 401 else found


def _path(scope) -> str:
    """Returns the app's own path, wherever it is mounted."""
    root, path = scope.get("root_path", ""), scope["path"]
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def _id(headers) -> str:
    given = next((value.decode("latin-1") for name, value in headers if name == b"x-request-id"), "")
    return given if ID.fullmatch(given) else secrets.token_hex(12)


def _check_headers(scope, headers, most: int) -> None:
    size = sum(len(name) + len(value) + 4 for name, value in headers)
    size += len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"")
    if size > most:
        raise Refusal(431, f"headers and path are limited to {most} bytes", code="headers_too_large")


def _check_token(path: str, headers, accepted: tuple[str, ...]) -> None:
    if path == OPEN:
        return
    if not accepted:
        return _check_host(headers)
    given = [value for name, value in headers if name == b"authorization"]
    kind, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
    digest = hashlib.sha256(token.strip()).hexdigest()
    # All are compared, each in constant time: how long it takes tells nothing.
    right = sum(hmac.compare_digest(digest, one) for one in accepted)
    if kind.lower() != b"bearer" or not right:
        raise Refusal(401, "a valid token is needed: Authorization: Bearer TOKEN", code="invalid_api_key")


def _check_host(headers) -> None:
    # Without a token only this machine is served; a page of elsewhere whose name was pointed here is not this machine.
    host = next((value.decode("latin-1") for name, value in headers if name == b"host"), "")
    if re.sub(r":\d*$", "", host).lower() not in ("localhost", "127.0.0.1", "[::1]"):
        raise Refusal(403, "without a token only requests to localhost are answered", code="host_not_allowed")


async def _whole_body(headers, receive, deadline: float, most: int):
    """Reads the body, no more of it than allowed, and returns a receive that hands it on."""
    too_large = Refusal(413, f"a body is limited to {most} bytes", code="body_too_large")
    said = [value for name, value in headers if name == b"content-length"]
    if any(not value.isdigit() or len(value) > 18 or int(value) > most for value in said):
        raise too_large
    body = bytearray()  # many small parts are put together in linear time
    try:
        async with asyncio.timeout_at(asyncio.get_running_loop().time() + deadline - time.monotonic()):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise _Gone
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > most:
                    raise too_large
    except TimeoutError:
        raise Refusal(408, "the body took too long", code="timeout") from None
    waiting = [{"type": "http.request", "body": bytes(body), "more_body": False}]

    async def hand_on():
        return waiting.pop() if waiting else await receive()

    return hand_on
