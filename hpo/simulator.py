"""Whole studies on a virtual clock: trials that take no time, many slots, the same Search and stopping rules.

Owns: `Course` (what a trial would do), `run_search` on virtual slots, `Ledger` (a record in memory), `simulate`.
Must not know: Ray, processes, models.

A course comes from a closed form, a recorded table, or any train function (`course_of`). A study of a hundred trials takes
milliseconds to seconds, so that a rule or an algorithm can be tried on thousands of studies.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpo.search import Judge, Search, job_of
from hpo.space import Params
from hpo.spec import Spec, load
from hpo.store import Record
from hpo.trial import FINAL, CurvePoint, Trial
from training.recipe import Job, Outcome, Progress, Recipe, Train


@dataclass(frozen=True)
class Course:
    """What a trial does if it is let: its reports, in order, and how it ends.

    `pause` is the part of its time in a slot that is not training (start-up, load, evaluation), in seconds before its first
    step. An outcome without reports takes `outcome.seconds`.
    """

    reports: Sequence[Progress]
    outcome: Outcome
    pause: float = 0.0


class Clock:
    """Virtual seconds: `clock()` is now."""

    def __init__(self, now: float = 0.0):
        self.now = now

    def __call__(self) -> float:
        return self.now


class Ledger:
    """The record of one study in memory, with the methods of a Store that a search uses. Nothing outlives the process."""

    def __init__(self, *, curves: bool = True):
        """Begins an empty record.

        Args:
            curves: False forgets the curves of trials that have ended, so that memory stays flat.
        """
        self._kept: dict[int, Trial] = {}
        self._points: dict[int, list[CurvePoint]] = {}
        self._curves = curves
        self.spent = 0.0
        self.log: list[dict[str, Any]] = []
        self.order: list[dict[str, Any]] = []

    def trials(self, study: int, *, curves: bool = False) -> list[Trial]:
        """As `Store.trials`."""
        kept = [self._kept[number] for number in sorted(self._kept)]
        return [t.model_copy(update={"curve": tuple(self._points.get(t.number, ()))}) for t in kept] if curves else kept

    def start_trial(self, study: int, trial: Trial) -> None:
        """As `Store.start_trial`."""
        self.note(study, "launch" if trial.number in self._kept else "suggest", number=trial.number, attempt=trial.attempts)
        self._kept[trial.number] = trial
        self._points.pop(trial.number, None)

    def finish_trial(self, study: int, trial: Trial) -> bool:
        """As `Store.finish_trial`."""
        if self._kept[trial.number].state in FINAL:
            return False
        self._kept[trial.number] = trial
        if not self._curves:
            self._points.pop(trial.number, None)
        self.note(study, "finish", number=trial.number, attempt=trial.attempts)
        return True

    def add_point(self, study: int, number: int, attempt: int, point: CurvePoint, said: str | None = None) -> None:
        """As `Store.add_point`."""
        self._points.setdefault(number, []).append(point)
        self.note(study, "report", number=number, attempt=attempt, step=point.step, said=said)

    def points(self, study: int) -> dict[tuple[int, int, int], CurvePoint]:
        """As `Store.points`; there is one attempt."""
        return {(number, 1, point.step): point for number, points in self._points.items() for point in points}

    def add_event(self, study: int, kind: str, **data: Any) -> int:
        """As `Store.add_event`."""
        self.log.append({"id": len(self.log) + 1, "at": 0.0, "kind": kind, **data})
        return len(self.log)

    def events(self, study: int, *, kinds: Sequence[str] = (), after: int = 0) -> list[dict[str, Any]]:
        """As `Store.events`."""
        return [event for event in self.log[after:] if not kinds or event["kind"] in kinds]

    def add_spent(self, study: int, seconds: float) -> None:
        """As `Store.add_spent`."""
        self.spent += seconds

    def note(self, study: int, kind: str, **known: Any) -> None:
        """As `Store.note`."""
        if self._curves:
            self.order.append({"kind": kind, "number": None, "attempt": None, "step": None, "said": None} | known)

    def journal(self, study: int) -> list[dict[str, Any]]:
        """As `Store.journal`."""
        return list(self.order)


@dataclass(frozen=True)
class _Holder:
    """Nobody else can take a record in memory over."""

    def beat(self) -> None:
        """Nothing to say."""


@dataclass
class Simulation:
    """A study that was simulated: its search, and the seconds that passed on the virtual clock."""

    search: Search
    seconds: float
    busy: float  # slot-seconds in which something was trained
    trials: list[Trial] = field(default_factory=list)

    @property
    def cost(self) -> float:
        """Training seconds of all trials together, stopped ones included."""
        return sum(trial.outcome.seconds or 0.0 for trial in self.trials if trial.outcome)


def simulate(
    spec: Spec | Mapping[str, Any], course: Callable[[Trial], Course], *, slots: int = 1, judge: Judge | None = None,
    resolve: Callable[[Params], Recipe] | None = None, curves: bool = True, on_change: Callable[[Search], None] | None = None,
) -> Simulation:  # fmt: skip
    """Runs a whole study in memory and returns it.

    Args:
        spec: the study.
        course: what a trial would do.
        slots: trials at a time.
        judge: what is launched, in place of the gate.
        resolve: the recipe of a point, where the space's dimensions are no fields of a recipe; then there are no defaults
            to begin with.
        curves: False forgets the curves of ended trials and the order of reports.
        on_change: is called after every result.
    """
    spec = spec if isinstance(spec, Spec) else load(spec).spec
    ledger, clock = Ledger(curves=curves), Clock()
    record = Record(1, spec.name, {}, spec, "", 0.0, 0.0, None)
    search = Search(ledger, record, _Holder(), judge=judge, resolve=resolve, clock=clock)
    busy = run_search(search, course, slots=slots, clock=clock, on_change=on_change or (lambda search: None))
    search.close()
    return Simulation(search, clock.now, busy, search.trials)


def run_search(
    search: Search, course: Callable[[Trial], Course], *, slots: int, clock: Clock,
    on_change: Callable[[Search], None] = lambda search: None,
) -> float:  # fmt: skip
    """Runs a search to its end on virtual slots; returns the slot-seconds that were trained in.

    What happens at the same moment happens in the order in which it was begun, so a run depends on nothing but its input.
    """
    queue: list[tuple[float, int, Trial, Course, int]] = []
    began: dict[int, float] = {}
    count, busy = 0, 0.0

    def push(at: float, trial: Trial, doing: Course, step: int) -> None:
        nonlocal count
        count += 1
        heapq.heappush(queue, (at, count, trial, doing, step))

    def fill() -> None:
        while len(began) < slots and (trial := search.ask()) is not None:
            doing = course(trial)
            began[trial.number] = clock.now
            first = doing.reports[0].seconds if doing.reports else doing.outcome.seconds or 0.0
            push(clock.now + doing.pause + first, trial, doing, 0)

    fill()
    while queue:
        at, _, trial, doing, step = heapq.heappop(queue)
        clock.now = max(clock.now, at)
        ended = doing.outcome
        if step < len(doing.reports):
            progress = doing.reports[step]
            reason = search.report(trial.number, progress)
            last = step + 1 == len(doing.reports)
            if reason and not (last and progress.share >= 1):
                ended = _cut(doing.outcome, progress, reason)
            elif not last:
                push(began[trial.number] + doing.pause + doing.reports[step + 1].seconds, trial, doing, step + 1)
                continue
        busy += clock.now - began.pop(trial.number)
        search.tell(trial.number, ended)
        on_change(search)
        fill()
    return busy


def _cut(outcome: Outcome, progress: Progress, reason: str) -> Outcome:
    """Returns the outcome of a trial that was ended at a report."""
    scores = {name: value for name, value in progress.metrics.items() if name not in ("loss", "train_loss")}
    known = {"ended": "stopped", "reason": reason, "share": progress.share, "scores": scores, "seconds": progress.seconds,
             "loss": progress.metrics.get("loss"), "tokens": progress.tokens,
             "peak_bytes": progress.peak_bytes or outcome.peak_bytes}  # fmt: skip
    return outcome.model_copy(update=known)


def course_of(train: Train, job: Job) -> Course:
    """Returns what a train function does with a job when nobody ends it."""
    reports: list[Progress] = []
    outcome = train(job, lambda progress: reports.append(progress))
    return Course(reports, outcome)


def closed_form(spec: Spec, train: Train) -> Callable[[Trial], Course]:
    """Returns the courses of a study whose trials are computed, such as by `training.simulate.train`."""
    return lambda trial: course_of(train, job_of(trial, spec, spec.data))


def table(rows: Mapping[tuple, Course], key: Callable[[Params], tuple]) -> Callable[[Trial], Course]:
    """Returns the courses of a recorded table, by the key of a point."""
    return lambda trial: rows[key(trial.params)]
