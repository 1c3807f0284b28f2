"""What a study may claim about its winner, as a record.

Owns: `Certificate` and its parts. Must not know: how it is made (certify) or shown (report).
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from training.recipe import Frozen


class Interval(Frozen):
    """An estimate with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


class Measured(Frozen):
    """One member of the front timed alone on an otherwise idle worker.

    `seconds` is that of its whole training, from `repeats` short timings scaled to its number of steps; `low` and `high`
    are the extreme timings, scaled alike. `in_study` is what was measured while other trials ran.
    """

    seconds: float
    low: float
    high: float
    repeats: int
    peak_bytes: int
    in_study: float


class Scored(Frozen):
    """One model on rows that no trial saw. `number` is its trial, None for the untuned model."""

    who: str = Field(description="untuned, defaults or winner")
    number: int | None
    rows: int
    accuracy: Interval
    loss: float


class SideBySide(Frozen):
    """One held-out row and what each model answered."""

    prompt: str
    expected: str
    untuned: str
    defaults: str | None
    winner: str


class Certificate(Frozen):
    """The winner of a study, why it was chosen, and how it does on untouched rows."""

    winner: int
    reason: str
    measured: dict[int, Measured] = Field(default_factory=dict, description="by trial number")
    scores: tuple[Scored, ...] = ()
    gain: Interval | None = Field(None, description="accuracy of winner minus defaults, paired bootstrap over rows")
    rows: tuple[SideBySide, ...] = ()
    machine: dict[str, Any] = Field(default_factory=dict, description="device, cores, versions, slow-down during the search")
    made: float = Field(description="seconds since the epoch")
