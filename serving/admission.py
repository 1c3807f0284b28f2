"""Who may use the batch now, who waits, and who is sent away.

Owns: `Gate`. Must not know: HTTP, engines. All of it runs on one event loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Full(Exception):
    """As many wait already as may wait."""


class Gate:
    """Lets requests in, in the order they came, while there is room. One with several answers takes several places."""

    def __init__(self):
        self.running = 0
        self._line: deque[tuple[int, asyncio.Future, int]] = deque()

    @property
    def waiting(self) -> int:
        return len(self._line)

    @asynccontextmanager
    async def admitted(self, places: int, *, concurrent: int, queue: int) -> AsyncIterator[None]:
        """Waits for its turn and holds `places`, at most `concurrent` of them.

        Raises:
            Full: it would have to wait, and `queue` others do; at once.
        """
        places = min(places, concurrent)
        await self._enter(places, concurrent, queue)
        try:
            yield
        finally:
            self._leave(places)

    async def _enter(self, places: int, concurrent: int, queue: int) -> None:
        if not self._line and self.running + places <= concurrent:
            self.running += places
            return
        if len(self._line) >= queue:
            raise Full
        turn = asyncio.get_running_loop().create_future()
        entry = (places, turn, concurrent)
        self._line.append(entry)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave(places)  # let in and called off in the same moment
            else:
                self._line.remove(entry)
                self._let_in()
            raise

    def _leave(self, places: int) -> None:
        self.running -= places
        self._let_in()

    def _let_in(self) -> None:
        while self._line and self.running + self._line[0][0] <= self._line[0][2]:
            places, turn, _ = self._line.popleft()
            if not turn.done():
                self.running += places
                turn.set_result(None)
