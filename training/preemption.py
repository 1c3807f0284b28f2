"""Whether this process was told that it will soon be gone.

Owns: `notice`, `noticed`, `heeding`, and `pause`, which is for the run of the moment alone. A notice is a flag of the whole
process: a signal comes to no function in particular, and an exception raised from its handler can be lost, where a flag cannot.
Must not know: what is done about it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_told, _pause = threading.Event(), threading.Event()


def notice(*_) -> None:
    """Gives notice; takes what a signal handler is handed."""
    _told.set()


def noticed() -> bool:
    """Says whether notice was given: at its next step a run leaves a checkpoint and ends as `paused`."""
    return _told.is_set() or _pause.is_set()


def forget() -> None:
    """Takes the notice back."""
    _told.clear()
    _pause.clear()


def pause() -> None:
    """Gives notice to the run of the moment; the process stays for others."""
    _pause.set()


def go_on() -> None:
    """Says that the run which was to pause is over."""
    _pause.clear()


@contextmanager
def heeding(number: int = signal.SIGTERM) -> Iterator[None]:
    """Takes a signal for a notice while the block runs. Only for the main thread."""
    before = signal.signal(number, notice)
    try:
        yield
    finally:
        signal.signal(number, before)
        forget()
