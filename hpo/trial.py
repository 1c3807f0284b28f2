"""One point that was tried, and everything known about it.

Owns: `Trial`, its states, `Point` of a curve. Must not know: who runs it or keeps it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hpo.space import Params, Space, key
from training.recipe import Frozen, Outcome, Recipe

State = Literal["running", "complete", "stopped", "infeasible", "diverged", "failed", "cancelled"]
# Stored on disk: values are only ever added, never removed or renamed.
FINAL: tuple[State, ...] = ("complete", "stopped", "infeasible", "diverged", "failed", "cancelled")
# Infeasible and diverged trials are results: algorithms learn from them. Failed and cancelled ones say nothing of the point.
RESULTS: tuple[State, ...] = ("complete", "stopped", "infeasible", "diverged")


class CurvePoint(Frozen):
    """What a trial reported on its way: `share` of its own length, tokens, seconds, peak bytes so far, metrics.

    `since` is the step that its launch went on from.
    """

    share: float
    step: int
    tokens: int
    seconds: float
    peak_bytes: int | None = None
    since: int = 0
    metrics: dict[str, float]


class Trial(Frozen):
    """A numbered point of a study with its state and what came of it. Times are seconds since the epoch."""

    number: int
    params: Params
    recipe: Recipe
    state: State = "running"
    outcome: Outcome | None = None
    curve: tuple[CurvePoint, ...] = ()
    error: str | None = None
    attempts: int = Field(1, description="how often it was launched")
    origin: str = Field("search", description="defaults, start, or the algorithm's name")
    started: float | None = None
    finished: float | None = None

    @property
    def final(self) -> bool:
        return self.state in FINAL

    @property
    def billed(self) -> float:
        """Seconds of a worker group that its last launch took, scores and all; its share where several were trained at once."""
        share = self.outcome.conditions.get("billed_seconds") if self.outcome else None
        return share if share is not None else (self.finished or 0.0) - (self.started or 0.0) if self.finished else 0.0

    @property
    def key(self) -> tuple:
        """The identity of its point, see `hpo.space.key`."""
        # Asked for again and again, of every trial of a history. A copy with other params does not take it over.
        memo = self.__dict__.get("_key")
        if memo is None or memo[0] is not self.params:
            memo = self.__dict__["_key"] = (self.params, key(self.params))
        return memo[1]

    def inside(self, space: Space) -> bool:
        """Says whether its point lies in a space."""
        memo = self.__dict__.get("_inside")
        if memo is None or memo[0] is not self.params or memo[1] is not space:
            memo = self.__dict__["_inside"] = (self.params, space, space.contains(self.params))
        return memo[2]
