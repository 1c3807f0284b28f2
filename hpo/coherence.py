"""Whether the parts of a study fit together: what needs no model, no data and no cluster to be seen.

Owns: `incoherent`. Must not know: how a file is read.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from hpo import algorithms, choosing, extensions, stopping
from hpo.errors import Problem, nearest
from hpo.space import Params, problems
from training import data as training_data
from training.recipe import Recipe

if TYPE_CHECKING:
    from hpo.spec import Spec

GRID_LIMIT = 100_000


def incoherent(spec: Spec, broken: frozenset[str] = frozenset()) -> list[Problem]:
    """Returns what contradicts what in a study, leaving out what concerns the `broken` paths, of which there are stand-ins."""
    wrong = problems(spec.space, spec.recipe)
    if touches(broken, "space"):  # what a dimension refers to may be what was left out
        wrong = [(where, said) for where, said in wrong if not re.search(r"\.(when|times)\b", where)]
    found = [Problem(f"space.{where}", f"{_plainly(said)}.", _remedy(spec, where)) for where, said in wrong]
    if not len(spec.space):
        found.append(Problem("space", "has no dimension.", "Name at least one field of the recipe with its range."))
    own_problems = extensions.problems(spec)
    found += own_problems + ([] if touches(broken, "data.train") else _mix_problems(spec))
    if not any(problem.where == "data.task" for problem in own_problems):
        found += training_data.template_problems(spec.data)
    found += _objective_problems(spec)
    found += choosing.problems(spec.choose, spec.objectives) if not touches(broken, "choose", "objectives") else []
    found += _algorithm_problems(spec)
    said = stopping.check_options(spec.stopping.name, spec.stopping.options)
    found += [Problem(f"stopping.{option}", f"{rule}.", "") for option, rule in said]
    for i, point in enumerate(() if touches(broken, "space") else spec.start):
        found += _start_problems(spec, f"start[{i}]", point)
    workers = spec.resources.workers
    for value in () if touches(broken, "recipe.batch_size", "space.batch_size") else _values(spec, "batch_size"):
        if value % workers:
            found.append(
                Problem("resources.workers", f"must divide batch_size, got {workers} and {value}.", "Change one of them.")
            )
            break
    if workers > 1 and spec.resources.mode == "local" and spec.train == "loop":
        found.append(
            Problem("resources.workers", f"must be 1 with mode: local, which trains in one process, got {workers}.",
                    "Leave mode out, or workers.")
        )  # fmt: skip
    if spec.budget.order == "number" and spec.budget.parallel is None:
        rule = "is needed with order: number, and must stay the same from machine to machine."
        found.append(Problem("budget.parallel", rule, "Set it to the trials that are to run at a time."))
    for where, asked in (("limits.cost", spec.limits.cost is not None), ("budget.cost", spec.budget.cost is not None),
                         ("objectives", "cost" in spec.objectives)):  # fmt: skip
        if asked and spec.resources.price is None:
            rule = "cost is asked for, and nothing says what an hour costs."
            found.append(Problem(where, rule, "Set resources.price, in currency units per device hour."))
    return found


def _plainly(said: str) -> str:
    said = said.replace("input should be", "must be")
    return said.replace("a valid integer, got a number with a fractional part", "a whole number")


def _remedy(spec: Spec, where: str) -> str:
    """Returns the remedy for a dimension that does not fit, where it can be told from the place."""
    name, _, part = where.partition(".")
    if part == "times" and spec.space[name].times not in Recipe.model_fields:
        return nearest(spec.space[name].times, Recipe.model_fields).strip() or "For example times: rank."
    if part.startswith("when"):
        choices = [other for other, d in spec.space.items() if d.type == "choice" and not d.when and other != name]
        return f"Choices of this space: {', '.join(choices)}." if choices else "This space has no choice to depend on."
    if part == "type":
        return "Use type: int, or type: choice."
    return "See `hpo schema recipe`." if part else ""


def _start_problems(spec: Spec, where: str, point: Params) -> list[Problem]:
    found = []
    for name, value in point.items():
        if name not in spec.space.root:
            hint = nearest(name, spec.space).strip() or f"Dimensions: {', '.join(spec.space)}."
            found.append(Problem(f"{where}.{name}", "is no dimension of the space.", hint))
        elif not spec.space[name].contains(value):
            dimension = spec.space[name]
            known = f"one of {list(dimension.values)}" if dimension.type == "choice" else f"{dimension.low} to {dimension.high}"
            known += f", to be multiplied by {dimension.times}" if dimension.times else ""
            found.append(Problem(f"{where}.{name}", f"lies outside the space, got {value!r}.", f"Give {known}."))
    active = spec.space.active(point)
    if missing := [name for name in active if name not in point]:
        found.append(Problem(where, f"lacks {', '.join(missing)}.", "Give a value for every dimension."))
    if idle := [name for name in point if name in spec.space.root and name not in active]:
        found.append(Problem(where, f"has {', '.join(idle)}, which do not exist at this point.", "Leave them out."))
    return found


def _values(spec: Spec, field: str) -> list[Any]:
    """Returns the values that a field can take: those of its dimension (ends, for a range) and the default."""
    values = [getattr(spec.recipe, field)]
    if (dimension := spec.space.root.get(field)) is not None:
        # Of a range the second value too: the ends may share a divisor that the rest does not.
        ends = (dimension.low, dimension.low + _step(dimension), dimension.high) if dimension.type != "choice" else ()
        values += ends or dimension.values
    return [value for value in values if value is not None]


def _step(dimension: Any) -> int:
    return dimension.step if dimension.type == "int" else 0


def _objective_problems(spec: Spec) -> list[Problem]:
    found, known = [], extensions.scores(spec)
    for i, name in enumerate(spec.objectives):
        if name not in known:
            found.append(Problem(f"objectives[{i}]", f"unknown objective {name!r}.",
                                 f"{nearest(name, known)}Known: {', '.join(known)}."))  # fmt: skip
    if len(set(spec.objectives)) < len(spec.objectives):
        found.append(Problem("objectives", f"must differ, got {list(spec.objectives)}.", "Remove the repeated one."))
    return found


def _algorithm_problems(spec: Spec) -> list[Problem]:
    name, options = spec.algorithm.name, spec.algorithm.options
    if name not in algorithms.names():
        return [
            Problem(
                "algorithm",
                f"unknown algorithm {name!r}.",
                f"{nearest(name, algorithms.names())}Known: {', '.join(algorithms.names())}.",
            )
        ]
    found = [Problem(f"algorithm.{option}", f"{said}.", "") for option, said in algorithms.check_options(name, options)]
    if name == "nsga2" and len(spec.objectives) < 2:
        found.append(
            Problem("objectives", f"nsga2 needs at least two, got {list(spec.objectives)}.", "Add one, or use algorithm: bayes.")
        )
    if name == "grid" and not found:
        levels = options.get("levels", algorithms.defaults("grid")["levels"])
        # Counted no further than needed, however large the grid is.
        size = sum(1 for _ in itertools.islice(spec.space.walk(levels), GRID_LIMIT))
        if size > spec.budget.trials:
            more = "+" if size == GRID_LIMIT else ""
            found.append(Problem("budget.trials", f"the grid has {size}{more} points, over {spec.budget.trials} trials.",
                                 "Raise budget.trials, lower algorithm.levels, or use algorithm: bayes."))  # fmt: skip
    return found


def _mix_problems(spec: Spec) -> list[Problem]:
    """Returns which weights of a recipe or a space belong to no source of the data."""
    known = [name for name in spec.data.origins() if name]
    given = {f"recipe.mix.{name}": name for name in spec.recipe.mix or {}}
    given |= {f"space.{name}": name.removeprefix("mix.") for name in spec.space if name.startswith("mix.")}
    sources = f"Sources: {', '.join(known)}." if known else "Write data.train: {NAME: {file: ..., weight: ...}, ...}."
    return [Problem(where, f"{name!r} is no source of data.train.", f"{nearest(name, known)}{sources}")
            for where, name in given.items() if name not in known]  # fmt: skip


def touches(broken: Iterable[str], *paths: str) -> bool:
    """Says whether one of the paths lies in what is broken, or holds some of it."""
    parts = [re.split(r"[.\[]", path) for path in paths]
    return any(a[: len(b)] == b[: len(a)] for path in broken for a in [path.split(".")] for b in parts)
