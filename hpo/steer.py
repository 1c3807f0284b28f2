"""Steering a study from outside: what was ordered, what became of it, and the study that follows from it.

Owns: `Order`, `Steer` (gives orders), `Inbox` (how a running search follows them), `steered`. Must not know: algorithms, runners.

An order is an event of the study's log, and so is what became of it: refused and why, or the number of the first trial that it
held for. Both are only ever appended, so the study at any earlier trial can be worked out again (`steered`), which is what
a replay needs. A search looks for orders whenever it is asked for a trial or told of progress; those given while nobody
runs the study are followed by its next run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from hpo.coherence import incoherent
from hpo.errors import InputError, NotFound, Problem, nearest, rule_of
from hpo.space import Choice, Params, Space, Value, key
from hpo.spec import Budget, Spec
from hpo.store import Record, Store
from hpo.trial import Trial

GIVEN, FOLLOWED = "steer", "steered"  # kinds of events
EXTENDED = ("trials", "hours", "cost")  # fields of a budget that an order may raise
ORIGIN = "steered"  # of trials that were ordered
STOPPED = "stopped by the user"


@dataclass(frozen=True)
class Order:
    """One order: what to do, since when, and what became of it.

    Attributes:
        do: add, clone, stop, range or budget.
        data: the point (`params`), the trial's `number`, the dimension (`name`, `dimension`), or the budget's fields.
        trial: number of the first trial that it held for (of an added one: its own); None while it waits, or if refused.
        refused: why, or "".
    """

    id: int
    at: float
    do: str
    data: dict[str, Any]
    trial: int | None = None
    refused: str = ""

    @property
    def waits(self) -> bool:
        return self.trial is None and not self.refused

    def __str__(self) -> str:
        data = self.data
        if self.do == "range":
            dimension = data["dimension"]
            ends = dimension.get("values") or (dimension["low"], dimension["high"])
            return f"range {data['name']} {' '.join(map(str, ends))}"
        named = "".join(f" {name}={value}" for name, value in (data if self.do == "budget" else data.get("params", {})).items())
        return f"{self.do} {data['number']}{named}" if "number" in data else f"{self.do}{named}"


def orders(store: Store, study: int, *, after: int = 0) -> list[Order]:
    """Returns the orders to a study, oldest first, each with what became of it.

    Args:
        after: only those with a greater id, and what became of others since.
    """
    found: dict[int, Order] = {}
    for event in store.events(study, kinds=(GIVEN, FOLLOWED), after=after):
        if event["kind"] == GIVEN:
            data = {name: value for name, value in event.items() if name not in ("id", "at", "kind", "do")}
            found[event["id"]] = Order(event["id"], event["at"], event["do"], data)
        elif (order := found.get(event["order"])) is not None:
            found[order.id] = Order(order.id, order.at, order.do, order.data, event.get("trial"), event.get("refused", ""))
    return list(found.values())


def steered(spec: Spec, given: Sequence[Order], number: int | None = None) -> Spec:
    """Returns the study as orders left it: its ranges and its budget.

    Args:
        given: all orders; those that were refused or wait count for nothing.
        number: as it was when this trial was proposed; default: now.
    """
    for order in given:
        if order.trial is not None and (number is None or order.trial <= number):
            spec = _after(spec, order)
    return spec


def _after(spec: Spec, order: Order) -> Spec:
    if order.do == "range":
        space = Space.model_validate(spec.space.model_dump() | {order.data["name"]: order.data["dimension"]})
        return spec.model_copy(update={"space": space})
    if order.do == "budget":
        # A study file that asks for more than was ordered gets it: orders only ever extend.
        raised = {n: value for n, value in order.data.items() if (now := getattr(spec.budget, n)) is not None and value > now}
        return spec.model_copy(update={"budget": spec.budget.model_copy(update=raised)})
    return spec


def hull(spec: Spec, given: Sequence[Order]) -> Space:
    """Returns the space with every range as wide as it ever was, in which every trial of the study has a place."""
    found = spec.space.model_dump()
    for order in given:
        if order.do == "range" and order.trial is not None:
            old, new = found[order.data["name"]], order.data["dimension"]
            if "values" in old:
                wide = {"values": [*old["values"], *(v for v in new["values"] if v not in old["values"])]}
            else:
                wide = {"low": min(old["low"], new["low"]), "high": max(old["high"], new["high"])}
            found[order.data["name"]] = old | wide
    return Space.model_validate(found)


class Steer:
    """Gives orders to one study, which may be running elsewhere. Each is checked, kept, and returned at once."""

    def __init__(self, store: Store, record: Record):
        self._store, self._record = store, record

    def orders(self) -> list[Order]:
        """Returns all orders so far, each with what became of it."""
        return orders(self._store, self._record.id)

    def add(self, **params: Value) -> Order:
        """Orders a trial at a point: the defaults with these values of the varied fields (a multiple as its factor).

        A value may lie outside its range, if a recipe can have it; the search then does not learn from the trial.

        Raises:
            InputError: not a varied field, a value that no recipe can have, or a point that was tried.
        """
        spec = self._spec()
        return self._give("add", params=self._point(spec, spec.space.project(spec.recipe) or {}, params))

    def clone(self, number: int, **params: Value) -> Order:
        """Orders a trial like another one but for these values.

        Raises:
            InputError: as `add`.
            NotFound: there is no such trial.
        """
        trial = self._trial(number)
        if not params:
            raise InputError(Problem("clone", f"of trial {number} needs what is to differ.", "For example rank=32."))
        return self._give("clone", number=number, params=self._point(self._spec(), trial.params, params))

    def stop(self, number: int) -> Order:
        """Orders a running trial to end at its next report, as cancelled: it teaches the search nothing.

        Raises:
            InputError: it has ended.
            NotFound: there is no such trial.
        """
        if (trial := self._trial(number)).final:
            raise InputError(Problem("stop", f"trial {number} is {trial.state} already.", "Only a running trial can be stopped."))
        return self._give("stop", number=number)

    def range(self, name: str, *ends: Value) -> Order:
        """Orders another range: its low and high end, or the values of a choice. Trials outside it stay on the record.

        Raises:
            InputError: not a varied field, or values that no recipe can have.
        """
        spec, where = self._spec(), f"range {name}"
        if name not in spec.space.root:
            hint = nearest(name, spec.space).strip() or f"Varied: {', '.join(spec.space)}."
            raise InputError(Problem(where, "is no dimension of the space.", hint))
        dimension = spec.space[name]
        if isinstance(dimension, Choice):
            changed: dict[str, Any] = {"values": list(ends)}
        elif len(ends) == 2:
            changed = {"low": ends[0], "high": ends[1]}
        else:
            raise InputError(Problem(where, f"needs a low and a high end, got {len(ends)}.", f"For example {name} 1 2."))
        if getattr(dimension, "step", 1) > 1 and isinstance(ends[0], int) and (ends[0] - dimension.low) % dimension.step:
            rule = f"must stay on the grid of {dimension.low} and steps of {dimension.step}, got {ends[0]}."
            raise InputError(Problem(where, rule, "Move the low end by whole steps."))
        try:
            space = Space.model_validate(spec.space.model_dump() | {name: dimension.model_dump() | changed})
        except ValidationError as error:
            said = dict.fromkeys(rule_of(e) for e in error.errors(include_url=False))
            raise InputError(*(Problem(where, f"{rule}.", "Give other ends.") for rule in said)) from None
        if wrong := incoherent(spec.model_copy(update={"space": space})):
            raise InputError(*wrong)
        return self._give("range", name=name, dimension=space.model_dump()[name])

    def budget(self, **more: float) -> Order:
        """Orders a larger budget: trials, hours or cost in all, not in addition.

        Raises:
            InputError: not such a field, or no more than there is.
        """
        budget, known = self._spec().budget, [n for n in EXTENDED if n in Budget.model_fields]
        found = [] if more else [Problem("budget", "needs what to extend.", f"For example {known[0]}=40.")]
        for name, value in more.items():
            now = getattr(budget, name) if name in known else None
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if name not in known:
                found.append(Problem(f"budget {name}", "cannot be extended while a study runs.", f"Known: {', '.join(known)}."))
            elif now is None:
                found.append(Problem(f"budget {name}", "has no limit in this study.", "There is nothing to extend."))
            elif not number or value <= now or (name == "trials" and not isinstance(value, int)):
                found.append(Problem(f"budget {name}", f"must be a number above {now:g}, which it is now, got {value!r}.",
                                     "Orders only extend; a study file may say less."))  # fmt: skip
        if found:
            raise InputError(*found)
        return self._give("budget", **more)

    def _give(self, do: str, **data: Any) -> Order:
        number = self._store.add_event(self._record.id, GIVEN, do=do, **data)
        return next(order for order in self.orders() if order.id == number)

    def _spec(self) -> Spec:
        # With what waits as if it had been followed, so that one order can build on another.
        spec = self._record.spec
        for order in self.orders():
            spec = spec if order.refused else _after(spec, order)
        return spec

    def _trial(self, number: int) -> Trial:
        trials = self._store.trials(self._record.id)
        if not any(trial.number == number for trial in trials):
            raise NotFound(f"Study {self._record.name} has no trial {number}. It has {len(trials)}, the first is 0.")
        return next(trial for trial in trials if trial.number == number)

    def _point(self, spec: Spec, base: Params, edits: Mapping[str, Value]) -> Params:
        if unknown := [name for name in edits if name not in spec.space.root]:
            known = f"Varied: {', '.join(spec.space)}."
            raise InputError(*(Problem(name, "is not varied by this study.", nearest(name, spec.space).strip() or known)
                               for name in unknown))  # fmt: skip
        point = {**base, **edits}
        active = spec.space.active(point)
        if missing := [name for name in active if name not in point]:
            raise InputError(Problem("point", f"lacks {', '.join(missing)}, which the recipe's defaults do not give.",
                                     "Give a value for each."))  # fmt: skip
        if idle := [name for name in edits if name not in active]:
            raise InputError(Problem("point", f"has {', '.join(idle)}, which do not exist there.", "Leave them out."))
        point = {name: point[name] for name in active}
        try:
            spec.space.resolve(point, spec.recipe)
        except ValidationError as error:
            raise InputError(*(Problem(".".join(map(str, e["loc"])) or "point", f"{rule_of(e)}, got {point}.", "")
                               for e in error.errors(include_url=False))) from None  # fmt: skip
        known = {key(trial.params): trial.number for trial in self._store.trials(self._record.id) if trial.params}
        if (number := known.get(key(point))) is not None:
            raise InputError(Problem("point", f"is that of trial {number}.", "Change a value."))
        return point


@dataclass
class Inbox:
    """The orders to a study as its running search follows them.

    Attributes:
        points: ordered points that no trial was launched with yet, in their order.
        stops: running trials that were ordered to end, and the reason to give them.
    """

    store: Store
    study: int
    points: list[Order] = field(default_factory=list)
    stops: dict[int, str] = field(default_factory=dict)
    _last: int = 0

    def open(self, spec: Spec) -> Spec:
        """Returns the study as the orders that were followed left it; those that wait are met by `follow`."""
        given = orders(self.store, self.study)
        followed = [order.id for order in given if not order.waits]
        waiting = [order.id for order in given if order.waits]
        self._last = min(waiting) - 1 if waiting else max(followed, default=0)
        self.stops |= {order.data["number"]: STOPPED for order in given if order.do == "stop" and order.trial is not None}
        return steered(spec, given)

    def follow(self, spec: Spec, trials: Mapping[int, Trial]) -> Spec:
        """Follows what was ordered since the last look, and returns the study as it is from the next trial on.

        Args:
            trials: all of the study, by number.
        """
        for order in orders(self.store, self.study, after=self._last):
            self._last = order.id
            if not order.waits:
                continue
            if order.do in ("add", "clone"):
                self._take(order, trials)
            elif order.do == "stop":
                trial = trials.get(order.data["number"])
                ended = "there is no such trial" if trial is None else f"it was {trial.state} by then" if trial.final else ""
                if not ended:
                    self.stops[trial.number] = STOPPED
                self._note(order, trials, ended)
            else:
                spec = _after(spec, order)
                self._note(order, trials)
        return spec

    def _take(self, order: Order, trials: Mapping[int, Trial]) -> None:
        tried = {key(trial.params): trial.number for trial in trials.values() if trial.params}
        waiting = {key(other.data["params"]) for other in self.points}
        point = key(order.data["params"])
        if point in tried:
            self._note(order, trials, f"trial {tried[point]} has this point")
        elif point in waiting:
            self._note(order, trials, "it was ordered before")
        else:
            self.points.append(order)

    def launched(self, order: Order, number: int) -> None:
        """Keeps that a trial was made of an ordered point."""
        self.points.remove(order)
        self.store.add_event(self.study, FOLLOWED, order=order.id, trial=number)

    def _note(self, order: Order, trials: Mapping[int, Trial], refused: str = "") -> None:
        said = {"refused": refused} if refused else {"trial": max(trials, default=-1) + 1}
        self.store.add_event(self.study, FOLLOWED, order=order.id, **said)
