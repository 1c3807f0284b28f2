"""When a trial has nothing left to win: rules that end it before its own length is done.

Owns: the rules (`none`, `front`, `asha`, `fixed`), their options, and which part of a history they look at.
Must not know: who runs trials, stores, search algorithms.

Every rule is a pure function of the history: `rule(history, trial, objectives, *, <options>) -> reason | None`. `history` holds
other trials with their curves, `trial` the running one with its curve up to now. Trials are compared at an equal share of
their own lengths, because the length may be searched too. A stopped trial teaches the search and never enters a front.
"""

from __future__ import annotations

import bisect
import functools
import inspect
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from hpo.errors import nearest
from hpo.objectives import BUILT_IN, Objective, named
from hpo.pareto import FULL, eligible
from hpo.pareto import front as front_of
from hpo.trial import CurvePoint, Trial
from training.recipe import Outcome

Rule = Callable[..., str | None]

LATEST = 32
"""Finished trials whose curves `front` looks at: enough to know how scores go on, few enough for a report to cost nothing."""
REACHED = 1000
"""Latest trials that `asha` and `fixed` compare with."""
MEASURED = frozenset({"seconds", "peak_bytes", "device_hours", "cost", "adapter_bytes", "tokens_per_second"})
"""Objectives that follow from a trial's rate or are fixed from its start; all others are scores, which may yet improve."""
SURE = 0.1
"""Share of the finished trials that may have ended further below their own projection than is assumed."""


def none(history: Sequence[Trial], trial: Trial, objectives: Sequence[Objective]) -> str | None:
    """Returns None: every trial is trained to its end."""
    return None


def front(
    history: Sequence[Trial],
    trial: Trial,
    objectives: Sequence[Objective],
    *,
    grace: Annotated[float, Field(ge=0, lt=1)] = 0.05,
    patience: Annotated[int, Field(ge=1, le=1000)] = 2,
    finished: Annotated[int, Field(ge=1, le=LATEST)] = 3,
    neighbours: Annotated[int, Field(ge=1, le=LATEST)] = 5,
    margin: Annotated[float, Field(ge=0, le=1)] = 0.01,
) -> str | None:
    """Returns the reason to end a trial whose optimistic end is dominated by the front, else None.

    What is known is extrapolated: seconds at the trial's own rate, bytes at their peak (corrected by how the finished
    trials' projections came out). What is not known is granted: a score gains as much as the luckiest of the finished
    trials that stood where this one stands. A trial whose bytes or the like are not known yet is granted the best seen.

    Args:
        grace: share of its own length that every trial is given.
        patience: scored reports in a row at which it must be beaten; one bad score is noise.
        finished: complete trials to have before anything is stopped.
        neighbours: finished trials, the nearest in score at the same share, whose gain is granted.
        margin: part of the range of the finished trials' scores by which it must be beaten on top.
    """
    known = [other for other in history if eligible(other)]
    points = [point for point in trial.curve if _scored(point, objectives)][-patience:]
    if len(known) < finished or len(points) < patience or points[0].share < grace or points[-1].share >= FULL:
        return None
    members = front_of(known, objectives)
    learned = sorted(known, key=lambda other: other.number)[-LATEST:]
    for point in reversed(points):
        best = _optimistic(point, learned, objectives, neighbours, margin)
        beaten = next((m for m in members if _no_worse(_losses(m.outcome, objectives), best)), None)
        if beaten is None:
            return None
    said = ", ".join(f"{o.name} {_shown(o, value):.4g}" for o, value in zip(objectives, best, strict=True))
    return f"behind the front at {points[-1].share:.0%} of its length: even {said} would not beat trial {beaten.number}"


def asha(
    history: Sequence[Trial],
    trial: Trial,
    objectives: Sequence[Objective],
    *,
    metric: str = "",
    grace: Annotated[float, Field(gt=0, lt=1)] = 1 / 9,
    eta: Annotated[float, Field(gt=1, le=100)] = 3.0,
) -> str | None:
    """Returns the reason to end a trial that is not among the best 1/eta at a rung, else None (Li et al. 2020, section 3).

    The stopping form of successive halving: rungs at grace x eta^k of a trial's length; at each a trial goes on if it is
    among the best 1/eta of those that came there so far. One metric decides, whatever the objectives are.

    Args:
        metric: which one; default the first objective.
        grace: share of its own length at the first rung.
        eta: of all that come to a rung, 1/eta goes on.
    """
    (objective,) = named([metric]) if metric else objectives[:1]
    points = [point for point in trial.curve if _scored(point, [objective])]
    rung = _rung_just_reached(points, grace, eta)
    if rung is None:
        return None
    mine = _losses(_projection(points[-1]), [objective])[0]
    reached = (_at(other, rung, [objective]) for other in history if other.number != trial.number)
    others = [values[0] for values in reached if values is not None]
    place = sum(value < mine for value in others) + 1
    allowed = max(1, int((len(others) + 1) / eta))
    if place <= allowed:
        return None
    return f"number {place} of {len(others) + 1} in {objective.name} at {rung:.0%} of its length, where {allowed} go on"


def fixed(
    history: Sequence[Trial],
    trial: Trial,
    objectives: Sequence[Objective],
    *,
    share: Annotated[float, Field(gt=0, lt=1)] = 0.25,
) -> str | None:
    """Returns the reason to end a trial at a fixed share, unless nothing that came there so far beats it there.

    The control that any cleverer rule has to beat: everybody stops at one fidelity and the best of it are trained on
    (Egele et al. 2023, "Is one epoch all you need"). Extrapolates nothing and has no patience.

    Args:
        share: of its own length at which a trial is judged.
    """
    points = [point for point in trial.curve if _scored(point, objectives)]
    if _rung_just_reached(points, share, float("inf")) is None or points[-1].share >= FULL:
        return None
    mine = _losses(_projection(points[-1]), objectives)
    for other in history:
        there = _at(other, share, objectives) if other.number != trial.number else None
        if there is not None and there != mine and _no_worse(there, mine):
            return f"beaten by trial {other.number} at {points[-1].share:.0%} of its length"
    return None


RULES: dict[str, Rule] = {"none": none, "front": front, "asha": asha, "fixed": fixed}


def remember(name: str, trials: Sequence[Trial], objectives: Sequence[Objective]) -> list[Trial]:
    """Returns the trials that a rule looks at, by number: the rest of a long history need not be kept with its curves.

    Remembering what was remembered and one more trial is remembering all of them, so it can be done one by one.
    """
    if name == "none":
        return []
    ordered = sorted(trials, key=lambda trial: trial.number)
    if name != "front":
        return ordered[-REACHED:]
    known = [trial for trial in ordered if eligible(trial)]
    members = {trial.number for trial in front_of(known, objectives)}
    return [trial for trial in known[:-LATEST] if trial.number in members] + known[-LATEST:]


class Watch:
    """The running trials as a stopping rule sees them: their curves, what it remembers of others, whom it ended.

    With a `lag`, a trial is judged by the trials at least that many numbers before it and by no others, whatever happens
    first: then decisions do not depend on the order in which things happen.
    """

    def __init__(self, name: str, options: Mapping[str, Any], objectives: Sequence[Objective], lag: int | None = None):
        self.name, self.options, self.objectives, self.lag = name, options, objectives, lag
        self.behind: dict[int, str] = {}  # the trials that were ended, with the reason
        self._curves: dict[int, tuple[CurvePoint, ...]] = {}  # of the running trials
        self._running: dict[int, Trial] = {}
        self._remembered: list[Trial] = []

    def recall(self, trials: Sequence[Trial]) -> None:
        """Takes a history up where a record leaves it; the trials come with their curves."""
        if self.name != "none":
            self._curves = {trial.number: trial.curve for trial in trials if not trial.final}
            self._running = {trial.number: trial for trial in trials if not trial.final}
            self._remembered = self._kept([trial for trial in trials if trial.final])

    def report(self, trial: Trial, point: CurvePoint) -> str | None:
        """Returns the rule's reason to end a trial, given its new report."""
        if self.name == "none" or trial.number in self.behind:
            return None
        # A trial that was launched again goes on from an earlier step, or from its beginning.
        curve = (*(p for p in self._curves.get(trial.number, ()) if p.step < point.step), point)
        self._curves[trial.number], self._running[trial.number] = curve, trial
        said = RULES[self.name](self._seen(trial), trial.model_copy(update={"curve": curve}), self.objectives, **self.options)
        if said:
            self.behind[trial.number] = said
        return said

    def launched(self, number: int) -> None:
        """A trial is launched again, so that what was decided about its last launch counts no more."""
        self.behind.pop(number, None)

    def ended(self, trial: Trial) -> None:
        """A trial came to its end, in whatever state."""
        if self.name != "none":
            self._running.pop(trial.number, None)
            curve = self._curves.pop(trial.number, ())
            self._remembered = self._kept([*self._remembered, trial.model_copy(update={"curve": curve})])

    def _seen(self, trial: Trial) -> list[Trial]:
        if self.lag is not None:
            early = [other for other in self._remembered if other.number <= trial.number - self.lag]
            return remember(self.name, early, self.objectives)
        if self.name == "front":  # complete trials alone decide
            return self._remembered
        others = (self._running[n].model_copy(update={"curve": c}) for n, c in self._curves.items() if n != trial.number)
        return [*self._remembered, *others]

    def _kept(self, trials: list[Trial]) -> list[Trial]:
        if self.lag is None:
            return remember(self.name, trials, self.objectives)
        # Who comes later must not push out what an earlier trial is still judged by.
        ordered = sorted(trials, key=lambda trial: trial.number)
        return [*remember(self.name, ordered[:-REACHED], self.objectives), *ordered[-REACHED:]]


def check_options(name: str, options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns (option, what is wrong) for options that a rule does not have, of a wrong type or out of range."""
    allowed, found = _options(name), []
    for option, value in options.items():
        if option not in allowed:
            known = f"Its options are {', '.join(allowed)}" if allowed else "It has none"
            found.append((option, f"is not an option of {name}. {nearest(option, allowed)}{known}"))
            continue
        try:
            allowed[option].validate_python(value, strict=True)
        except ValidationError as error:
            said = error.errors()[0]["msg"].replace("Input should be", "must be").replace("a valid integer", "an integer")
            found.append((option, f"{said}, got {value!r}"))
    if name == "asha" and not found and options.get("metric") and options["metric"] not in BUILT_IN:
        found.append(("metric", f"unknown metric {options['metric']!r}. {nearest(options['metric'], BUILT_IN)}"
                      f"Known: {', '.join(BUILT_IN)}"))  # fmt: skip
    return found


@functools.cache
def _options(name: str) -> dict[str, TypeAdapter]:
    hints = typing.get_type_hints(RULES[name], include_extras=True)
    parameters = inspect.signature(RULES[name]).parameters.values()
    return {p.name: TypeAdapter(hints[p.name]) for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


# Where a trial stands, and where it may end


def _scored(point: CurvePoint, objectives: Sequence[Objective]) -> bool:
    """Says whether a report tells how good the trial is: between two scored points only its seconds are new."""
    wanted = [objective.name for objective in objectives if objective.name not in MEASURED]
    return not wanted or any(name in point.metrics for name in wanted)


_NOTHING = Outcome()  # a copy of it is made in a tenth of the time of a new one


def _projection(point: CurvePoint) -> Outcome:
    """Returns the end of a trial if it went on as it did: more seconds and tokens at its rate, the same score and bytes."""
    scores = {name: value for name, value in point.metrics.items() if name not in ("loss", "train_loss")}
    known = {"scores": scores, "loss": point.metrics.get("loss"), "seconds": point.seconds / point.share,
             "peak_bytes": point.peak_bytes, "tokens": point.tokens / point.share}  # fmt: skip
    return _NOTHING.model_copy(update=known)


def _losses(outcome: Outcome | None, objectives: Sequence[Objective]) -> list[float | None]:
    return [objective.loss(outcome) if outcome is not None else None for objective in objectives]


def _no_worse(a: Sequence[float | None], b: Sequence[float | None]) -> bool:
    """Says whether a is nowhere worse than b; what is unknown cannot be compared."""
    return all(x is not None and y is not None and x <= y for x, y in zip(a, b, strict=True))


def _at(trial: Trial, share: float, objectives: Sequence[Objective]) -> list[float | None] | None:
    """Returns the losses that a trial was projected to at a share of its length, read between its reports; None before it."""
    first = bisect.bisect_left(trial.curve, share - 1e-9, key=lambda point: point.share)
    after = next((point for point in trial.curve[first:] if _scored(point, objectives)), None)
    if after is None:
        return None
    before = next((point for point in reversed(trial.curve[:first]) if _scored(point, objectives)), after)
    ends = _losses(_projection(before), objectives), _losses(_projection(after), objectives)
    weight = (share - before.share) / (after.share - before.share) if after.share > before.share else 1.0
    weight = min(max(weight, 0.0), 1.0)
    return [None if a is None or b is None else a + weight * (b - a) for a, b in zip(*ends, strict=True)]


def _optimistic(
    point: CurvePoint, learned: Sequence[Trial], objectives: Sequence[Objective], neighbours: int, margin: float
) -> list[float]:
    """Returns the losses that a trial would have at its end if all went well from this report on."""
    mine = _losses(_projection(point), objectives)
    then = [_at(other, point.share, objectives) or [None] * len(objectives) for other in learned]
    ends = [_losses(other.outcome, objectives) for other in learned]
    best = []
    for i, objective in enumerate(objectives):
        final = [end[i] for end in ends]
        pairs = [(there[i], end[i]) for there, end in zip(then, ends, strict=True) if there[i] is not None]
        if mine[i] is None or not pairs:
            best.append(min(final))
        elif objective.name in MEASURED:
            hopes = sorted(mine[i] * end / there if there else mine[i] + end - there for there, end in pairs)
            best.append(hopes[math.floor(SURE * (len(hopes) - 1))])
        else:
            near = sorted(pairs, key=lambda pair: abs(pair[0] - mine[i]))[:neighbours]
            gain = min(0.0, min(end - there for there, end in near))
            best.append(mine[i] + gain - margin * (max(final) - min(final)))
    return best


def _rung_just_reached(points: Sequence[CurvePoint], grace: float, eta: float) -> float | None:
    """Returns the highest rung below 1 that the last point reached and the one before had not."""
    if not points:
        return None
    before, now, rung, found = (points[-2].share if len(points) > 1 else 0.0), points[-1].share, grace, None
    while rung < FULL and rung <= now + 1e-9:
        found = rung if before < rung - 1e-9 else found
        rung *= eta
    return found


def _shown(objective: Objective, loss: float) -> float:
    return -loss if objective.goal == "maximize" else loss
