"""Whether a study is what its record says: every suggestion and every decision to stop, derived again from what was known then.

Owns: `replay`. Must not know: runners, how trials are trained; outcomes are taken from the record, nothing is trained.

The record keeps the order in which things became known (`Store.journal`). Walking it, each trial is proposed anew from the
trials as they were at that moment, and each report judged anew by the stopping rule. Points that the user ordered are as given.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from hpo.search import next_point, versions, visible, watch_of
from hpo.space import Params, key
from hpo.spec import Algorithm, Spec, Stopping
from hpo.steer import ORIGIN, orders, steered
from hpo.store import Record, Store, joined
from hpo.trial import CurvePoint, Trial


@dataclass(frozen=True)
class Difference:
    """Where the record and what was derived part: the trial, at which step of it (None: its point), and both."""

    trial: int
    step: int | None
    recorded: Any
    derived: Any


@dataclass(frozen=True)
class Replay:
    """What a replay came to.

    Attributes:
        suggestions: derived again.
        decisions: of the stopping rule, derived again.
        ordered: trials that the user ordered, which cannot be derived.
        unknown: trials from before the record kept its order.
        difference: the first, or None.
        versions: libraries whose version differs from the recorded one, as (recorded, here).
    """

    suggestions: int = 0
    decisions: int = 0
    ordered: int = 0
    unknown: int = 0
    difference: Difference | None = None
    versions: tuple[tuple[str, str, str], ...] = ()


def replay(store: Store, record: Record) -> Replay:
    """Returns what deriving a study again came to; it ends at the first difference."""
    walk = _Walk(store, record)
    for row in store.journal(record.id):
        getattr(walk, row["kind"], walk.other)(row)
        if walk.difference is not None:
            break
    return Replay(walk.suggestions, walk.decisions, walk.ordered, walk.unknown, walk.difference, tuple(walk.versions))


class _Walk:
    """The study as it was known at one place of its journal. A method for each kind of row."""

    def __init__(self, store: Store, record: Record):
        self.recorded = {trial.number: trial for trial in store.trials(record.id)}
        self.points = store.points(record.id)
        self.orders = orders(store, record.id)
        rows = store.journal(record.id)
        begun = {row["number"] for row in rows if row["kind"] == "suggest"}
        # A trial that was put back reports the same steps again, and the record keeps the later ones.
        self.times = Counter(_place(row) for row in rows if row["kind"] == "report")
        self.curves: dict[int, list[tuple[int, CurvePoint]]] = {}  # with the attempt of each point
        # What was tried before the record kept its order is taken as it is.
        self.known: dict[int, Trial] = {n: trial for n, trial in self.recorded.items() if n not in begun}
        self.unknown, self.suggestions, self.decisions, self.ordered = len(self.known), 0, 0, 0
        self.spec: Spec = record.spec
        self.watch = watch_of(self.spec)
        self.versions: list[tuple[str, str, str]] = []
        self.difference: Difference | None = None

    def begin(self, row: dict[str, Any]) -> None:
        """A session began: these parts of a study may differ from those of the last one."""
        said = json.loads(row["said"])
        changed = {"algorithm": Algorithm(**said["algorithm"]), "stopping": Stopping(**said["stopping"]),
                   "budget": self.spec.budget.model_copy(update=said["budget"])}  # fmt: skip
        self.spec = self.spec.model_copy(update=changed)
        here = versions()
        self.versions = [(name, was, here.get(name, "absent")) for name, was in said["versions"].items() if here.get(name) != was]
        self.watch = watch_of(self.spec)
        self.watch.recall([t.model_copy(update={"curve": self._curve(t)}) for t in self.known.values()])

    def suggest(self, row: dict[str, Any]) -> None:
        """A trial was proposed."""
        number = row["number"]
        trial, spec = self.recorded[number], steered(self.spec, self.orders, number)
        if trial.origin == ORIGIN:
            self.ordered += 1
        else:
            params, _, origin = next_point(spec, visible(spec, [self.known[n] for n in sorted(self.known)], number), number)
            self.suggestions += 1
            if params is None or key(params) != key(trial.params) or origin != trial.origin:
                self.difference = Difference(number, None, _said(trial.params, trial.origin), _said(params, origin))
        launched = trial.model_copy(update={"state": "running", "outcome": None, "error": None, "finished": None})
        refused = row["attempt"] == 0
        self.known[number] = trial if refused else launched.model_copy(update={"attempts": row["attempt"]})

    def launch(self, row: dict[str, Any]) -> None:
        """A trial was launched again, or put back to be."""
        self.known[row["number"]] = self.known[row["number"]].model_copy(update={"attempts": row["attempt"]})
        self.watch.launched(row["number"])

    def report(self, row: dict[str, Any]) -> None:
        """A trial reported, and the stopping rule decided."""
        number, place = row["number"], _place(row)
        point = self.points[place]
        self.curves.setdefault(number, []).append((row["attempt"], point))
        said = self.watch.report(self.known[number], point)
        self.times[place] -= 1
        if self.times[place]:
            return  # what was reported then is not on the record
        self.decisions += 1
        if (said is None) != (row["said"] is None):
            self.difference = Difference(number, row["step"], row["said"] or "go on", said or "go on")

    def finish(self, row: dict[str, Any]) -> None:
        """A trial came to its end."""
        self.known[row["number"]] = self.recorded[row["number"]]
        self.watch.ended(self.recorded[row["number"]])

    def _curve(self, trial: Trial) -> tuple[CurvePoint, ...]:
        attempts: dict[int, dict[int, CurvePoint]] = {}
        for attempt, point in self.curves.get(trial.number, ()):
            attempts.setdefault(attempt, {})[point.step] = point
        return joined({a: [own[step] for step in sorted(own)] for a, own in attempts.items()}, trial.attempts)

    def other(self, row: dict[str, Any]) -> None:
        """Written by a newer version: nothing that decides a trial."""


def _place(row: dict[str, Any]) -> tuple[int, int, int]:
    return row["number"], row["attempt"], row["step"]


def _said(params: Params | None, origin: str) -> dict[str, Any]:
    return {"params": params, "origin": origin}
