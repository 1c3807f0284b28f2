"""An endpoint in this process: one pool, one server, no cluster.

Owns: `serve` (until it is told to end), `serving` (as long as a block lasts). Must not know: Ray, routes, models.
"""

from __future__ import annotations

import contextlib
import ipaddress
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from serving.endpoint import Table, read_table
from serving.pool import Pool
from training.errors import InputError, Problem, wrong

BACKLOG = 128  # connections that the system holds until they are looked at
IDLE = 30  # seconds that a connection may stay open between two requests


def serve(folder: str | Path, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serves an endpoint until SIGINT or SIGTERM; requests that run may then end.

    Raises:
        InputError: an address beyond this machine without a token, an address in use, no version that can answer.
    """
    listening = _listen(read_table(folder), host, port)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the pool is closed
    try:
        with listening, _pool(folder) as pool, contextlib.suppress(KeyboardInterrupt):
            _server(pool).run(sockets=[listening])
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def serving(folder: str | Path, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serves an endpoint beside the block, in a thread, and yields its address; port 0 is any free one.

    Raises:
        InputError: as `serve`.
    """
    listening = _listen(read_table(folder), host, port)
    with listening, _pool(folder) as pool:
        server = _server(pool)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="serve", daemon=True)
        thread.start()
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the server ended while it was starting")
            time.sleep(0.01)
        name = f"[{host}]" if ":" in host else host
        try:
            yield f"http://{name}:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def _pool(folder: str | Path) -> Iterator[Pool]:
    pool = Pool(folder)
    try:
        pool.start()
        require_ready(pool)
        yield pool
    finally:
        pool.close()


def require_ready(pool: Pool) -> None:
    """Raises InputError with what is wrong if nothing can answer."""
    if not pool.healthy():
        said = pool.problems() or ["it has no version"]
        raise InputError(*(Problem(pool.table.name, f"cannot be served: {one}") for one in said))


def is_loopback(host: str) -> bool:
    """Says whether an address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def require_token(table: Table, host: str) -> None:
    """Raises InputError where anybody could ask."""
    if not table.tokens and not is_loopback(host):
        raise wrong(
            "host", f"{host} can be reached by others, and the endpoint asks for no token.", "Use 127.0.0.1, or set a token."
        )


def _listen(table: Table, host: str, port: int) -> socket.socket:
    require_token(table, host)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise wrong("port", f"{host}:{port} cannot be listened on ({error.strerror or error}).", "Use another port.") from None


def _server(pool: Pool):
    import uvicorn

    from serving.app import create_app

    limits = pool.table.limits
    return uvicorn.Server(uvicorn.Config(
        create_app(pool, lambda: pool.table), http="h11", ws="none", log_level="warning", access_log=False, server_header=False,
        h11_max_incomplete_event_size=limits.header_bytes, timeout_keep_alive=IDLE,
        timeout_graceful_shutdown=int(limits.seconds) + 1,
    ))  # fmt: skip
