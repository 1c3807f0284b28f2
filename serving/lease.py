"""A request's hold on the model that answers it.

Owns: `Lease`, `Held` (a model in memory or on its way into it), `Unknown`, `Unavailable`. Must not know: tables, how a model is
loaded or chosen.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from serving.endpoint import Adapter, Version


class Unknown(KeyError):
    """No model of that name; `names` are those that can be asked for."""

    def __init__(self, asked: str, names: list[str]):
        super().__init__(asked)
        self.names = names

    def __str__(self) -> str:
        return f"there is no model {self.args[0]!r}; there are {', '.join(self.names) or 'none'}"


class Unavailable(Exception):
    """The model is known but cannot answer now. `busy`: it can when others have finished, so asking again soon is worthwhile."""

    def __init__(self, said: str, *, busy: bool = False):
        super().__init__(said)
        self.busy = busy


@dataclass(eq=False)
class Held:
    """A model in memory, or on its way into it. It stays while `active` requests hold it."""

    what: Version | Adapter
    loading: Future
    active: int = 0
    used: float = field(default_factory=time.monotonic)

    @property
    def engine(self):
        return self.loading.result(0)

    @property
    def ready(self) -> bool:
        return self.loading.done() and self.loading.exception() is None

    @property
    def ended(self) -> bool:
        """Whether nobody holds it and nothing is on its way any more."""
        return self.loading.done() and not self.active


class Lease:
    """A request's hold on the model that answers it; `with` or `async with` takes it and lets go.

    Inside: `engine`; `label`, such as "quickstart@v3"; `version`, such as "v3" or, for an adapter, "fast". An adapter that is not
    in memory is loaded first: `with` waits for it, `async with` leaves the loop free.
    """

    def __init__(self, endpoint: str, hold: Callable[[], Held], let_go: Callable[[Held], None]):
        self._endpoint, self._hold, self._let_go = endpoint, hold, let_go
        self._held: Held | None = None
        self._taken = False

    def __enter__(self) -> Lease:
        self._take()
        try:
            self._held.loading.exception()  # waits
            return self._checked()
        except BaseException:
            self.release()
            raise

    async def __aenter__(self) -> Lease:
        self._take()
        try:
            if not self._held.loading.done():
                await asyncio.wrap_future(_end_of(self._held.loading))
            return self._checked()
        except BaseException:
            self.release()
            raise

    def _take(self) -> None:
        self._held, self._taken = self._hold(), True

    def _checked(self) -> Lease:
        if not self._held.ready:
            raise Unavailable(f"{self.label} cannot be loaded")
        return self

    def __exit__(self, *_) -> None:
        self.release()

    async def __aexit__(self, *_) -> None:
        self.release()

    def release(self) -> None:
        """Lets go; a second time does nothing."""
        if self._taken:
            self._taken = False
            self._let_go(self._held)

    @property
    def engine(self):
        """The engine; only while the lease is held."""
        return self._held.engine

    @property
    def version(self) -> str:
        """What statistics are kept under."""
        return name_of(self._held.what)

    @property
    def label(self) -> str:
        """The model's full name."""
        return f"{self._endpoint}@{self.version}"


def _end_of(loading: Future) -> Future:
    # Of its own for everybody who waits: who leaves while the model is loading cancels only that, and errors are looked at later.
    ended: Future = Future()
    loading.add_done_callback(lambda _: ended.set_running_or_notify_cancel() and ended.set_result(None))
    return ended


GONE: Future = Future()  # of a model that was closed
GONE.set_exception(Unavailable("closed"))


def name_of(what: Version | Adapter) -> str:
    """Returns what follows the @: v3, or the adapter's name."""
    return what.name if isinstance(what, Adapter) else f"v{what.version}"
