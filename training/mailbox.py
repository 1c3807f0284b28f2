"""Between runs and those who drive them, on Ray: work that waits for a warm group, reports, the reason to end, results.

Owns: the `Mailbox` actor. Must not know: training, Tune, what is in a piece of work or a result.

It is asynchronous: whoever asks for something that is not there yet waits inside, so an answer takes milliseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util import remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

GRACE = 60.0  # seconds between asking a run to end and killing its group
LOOK = 1.0  # seconds that a wait lasts before whoever waits looks around


@dataclass
class _Run:
    work: dict | None = None  # of a run that a warm group is to do
    by: str | None = None  # the warm group that does it
    group: Any = None
    reports: list[str] = field(default_factory=list)
    reason: str | None = None
    asked: float | None = None
    result: dict | None = None


@ray.remote(num_cpus=0)
class Mailbox:
    """Reports, reasons to end, placement groups and results by run; runs that wait for a warm group, first come, first served."""

    def __init__(self):
        self._runs: dict[str, _Run] = {}
        self._waiting: list[str] = []
        self._served: set[str] = set()  # warm groups that have taken work
        self._closed = False
        self._changed: asyncio.Event = asyncio.Event()

    def _run(self, run: str) -> _Run:
        return self._runs.setdefault(run, _Run())

    def _tell(self) -> None:
        """Wakes all who wait; each looks for itself whether it was meant."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def _until(self, ready, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not ready() and (left := end - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)

    # Called by a main worker

    def started(self, run: str, group: Any) -> str | None:
        """Keeps the placement group of a run, so that it can be freed; returns the reason to end before it begins, if any."""
        self._run(run).group = group
        return self._run(run).reason

    def heard(self, run: str) -> str | None:
        """Returns the reason to end, if any."""
        return self._runs[run].reason if run in self._runs else None

    def report(self, run: str, progress: str) -> str | None:
        """Keeps a report for the driver; returns the reason to end, if any."""
        self._run(run).reports.append(progress)
        self._tell()
        return self._run(run).reason

    # Called by a warm group

    async def take(self, by: str, group: Any, wait: float, beside: str | None = None) -> dict | None:
        """Returns the next piece of work with its `run`, after waiting for one up to `wait` seconds; None without one.

        Args:
            by: name of the warm group.
            group: its placement group.
            beside: what the group does already: only work with this `pack` can be done beside it.
        """

        def first() -> str | None:
            return next((r for r in self._waiting if beside is None or self._runs[r].work.get("pack") == beside), None)

        await self._until(lambda: self._closed or first() is not None, wait)
        if self._closed or (run := first()) is None:
            return None
        self._waiting.remove(run)
        kept = self._run(run)
        kept.by, kept.group = by, group
        self._served.add(by)
        return {"run": run, **kept.work}

    def answer(self, run: str, result: dict) -> None:
        """Keeps what came of a piece of work."""
        kept = self._runs.get(run)
        if kept is not None and kept.result is None:
            kept.result, kept.by = result, None
            self._tell()

    def closed(self) -> bool:
        """Says whether there will be no more work."""
        return self._closed

    # Called by those who drive runs

    def submit(self, run: str, work: dict) -> None:
        """Queues work for a warm group."""
        self._run(run).work = work
        self._waiting.append(run)
        self._tell()

    def stop(self, run: str, reason: str) -> None:
        """Asks a run to end; the first reason counts. Work that no group has begun ends at once."""
        kept = self._run(run)
        if kept.reason is None:
            kept.reason, kept.asked = reason, time.monotonic()
            if run in self._waiting:
                self._waiting.remove(run)
                kept.result = {"stopped": reason}
            self._tell()

    async def poll(self, run: str, wait: float = 0.0) -> tuple[list[str], str | None, float, dict | None]:
        """Returns the reports since the last call, the reason to end, the seconds since it was given (0 without one), the result.

        Waits up to `wait` seconds for a report or a result.
        """
        kept = self._run(run)
        await self._until(lambda: kept.reports or kept.result is not None, wait)
        reports, kept.reports = kept.reports, []
        return reports, kept.reason, time.monotonic() - kept.asked if kept.asked is not None else 0.0, kept.result

    def free(self, run: str) -> None:
        """Ends the worker group of a run by removing its placement group; work that waits is forgotten."""
        if run in self._waiting:
            self._waiting.remove(run)
        elif (kept := self._run(run)).group is not None and kept.result is None:
            remove_placement_group(kept.group)

    def forget(self, run: str) -> None:
        """Drops what is kept of a run that has ended."""
        self._runs.pop(run, None)

    def names(self) -> list[str]:
        """Returns the runs that something is kept of."""
        return list(self._runs)

    # Called by a pool of warm groups

    async def demand(self, known: int, wait: float) -> int:
        """Returns how many runs wait or are being done by warm groups, after waiting until they are not `known` any more."""
        await self._until(lambda: self._demand() != known, wait)
        return self._demand()

    def _demand(self) -> int:
        return len(self._waiting) + sum(1 for kept in self._runs.values() if kept.by is not None)

    def lost(self, by: str, result: dict) -> None:
        """Keeps a result for the run that a group was doing when it died; for the next in line where it never began anything."""
        runs = [run for run, kept in self._runs.items() if kept.by == by]
        if by not in self._served and self._waiting:
            runs = [self._waiting.pop(0)]
        for run in runs:
            self.answer(run, result)

    def close(self) -> None:
        """Sends all warm groups home."""
        self._closed = True
        self._tell()


@contextlib.contextmanager
def mailbox_of(name: str) -> Iterator[Any]:
    """Yields a new Mailbox that ends with the block. It sits with its creator: a worker's node may be taken away."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    unique = f"paretune-{name}-{os.getpid()}-{time.monotonic_ns()}"
    mailbox = Mailbox.options(name=unique, scheduling_strategy=here).remote()
    try:
        yield mailbox
    finally:
        ray.kill(mailbox)
