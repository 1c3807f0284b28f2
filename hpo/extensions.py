"""What a user brings along, as a study names it: metrics, a task, methods, a train function.

Owns: whether each of them is there and is what it has to be; `goals` of the user's metrics; arguments as names. Must not know:
how they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from hpo.errors import InputError, Problem, nearest
from hpo.objectives import BUILT_IN
from training import adapters, metrics, own, tasks
from training.recipe import OwnMetric

if TYPE_CHECKING:
    from hpo.spec import Spec

RESERVED = ("accuracy", "loss", "train_loss", "nll", "tokens", "right", *BUILT_IN)


def goals(spec: Spec) -> dict[str, metrics.Goal]:
    """Returns for each of the user's own metrics whether more or less of it is wanted."""
    brought = [e for e in spec.evaluation.metrics if isinstance(e, OwnMetric) or own.is_own(e)]
    return {metrics.name_of(entry): metrics.goal_of(entry) for entry in brought}


def arguments(**kinds: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the arguments of `hpo.run` as one mapping, by the names under which a study knows them as `given:NAME`.

    Raises:
        InputError: a name is no identifier, or stands for two things.
    """
    found: dict[str, Any] = {}
    for kind, things in kinds.items():
        for name, thing in (things or {}).items():
            if not own.is_own(f"{own.GIVEN}:{name}") or name in found:
                rule = "stands for two things" if name in found else "is no identifier"
                raise InputError(Problem(f"{kind}[{name!r}]", f"{rule}.", "Give it another name."))
            found[name] = thing
    return found


def problems(spec: Spec) -> list[Problem]:
    """Returns what is wrong with what a study names: unknown metrics, what cannot be imported or is something else."""
    found = _metric_problems(spec)
    found += _unless("data.task", lambda: tasks.load(spec.data.task))
    named = [("recipe.adapter", spec.recipe.adapter)]
    if (dimension := spec.space.root.get("adapter")) is not None and dimension.type == "choice":
        named += [("space.adapter", value) for value in dimension.values if isinstance(value, str)]
    for where, name in dict.fromkeys(named):
        if own.is_own(name):
            found += [Problem(where, p.rule, p.remedy) for p in _unless(where, lambda name=name: adapters.method_of(name))]
    if own.is_own(spec.train):
        found += _unless("train", lambda: _function(spec.train, "train"))
    if spec.promote.retention is not None and spec.evaluation.retention is None:
        found.append(Problem("promote.retention", "is a limit for a text that is not there.",
                             "Name one, for example evaluation: {retention: general.jsonl}."))  # fmt: skip
    return found


def scores(spec: Spec) -> list[str]:
    """Returns the names of all scores that may be an objective: those built in, the user's metrics, the task's own ones."""
    return list(dict.fromkeys([*BUILT_IN, *goals(spec), *getattr(_quietly(spec.data.task), "SCORES", ())]))


def _metric_problems(spec: Spec) -> list[Problem]:
    found, seen = [], set()
    for i, entry in enumerate(spec.evaluation.metrics):
        where, name = f"evaluation.metrics[{i}]", metrics.name_of(entry)
        if entry not in metrics.METRICS:
            path = entry.function if isinstance(entry, OwnMetric) else entry
            if not own.is_own(path):
                known = ", ".join(metrics.METRICS)
                remedy = f"{nearest(path, metrics.METRICS)}Known: {known}; or module:function."
                found.append(Problem(where, f"unknown metric {path!r}.", remedy))
                continue
            if name in RESERVED:
                found.append(Problem(where, f"{name!r} is the name of another score.",
                                     f"Give it one of its own: {{name: my_{name}, function: {path!r}}}."))  # fmt: skip
            found += [Problem(where, p.rule, p.remedy) for p in _unless(where, lambda path=path, w=where: _function(path, w))]
        if name in seen:
            found.append(Problem(where, f"{name!r} is there twice.", "Remove one of them."))
        seen.add(name)
    return found


def _function(path: str, where: str) -> Callable:
    thing = own.load(path, where)
    if not callable(thing):
        raise InputError(Problem(where, f"{path} must be a function, got {type(thing).__name__}.", "Name a function."))
    return thing


def _unless(where: str, load: Callable[[], Any]) -> list[Problem]:
    try:
        load()
    except InputError as error:
        return list(error.problems)
    return []


def _quietly(task: str) -> Any:
    try:
        return tasks.load(task)
    except InputError:
        return None
