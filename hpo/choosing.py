"""Which point of a front is taken.

Owns: `Choose`, `choose`: best score, knee or weights, within limits. Pure. Must not know: stores, how a choice is certified.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field, ValidationError

from hpo.errors import InputError, Problem, nearest, rule_of
from hpo.objectives import Objective, losses
from hpo.pareto import front
from hpo.trial import Trial
from training.recipe import Frozen, Number

CONFIDENT = 1.645  # standard errors: one-sided 95 %


class Choose(Frozen):
    """How the winner is taken from the front."""

    by: Literal["best", "knee", "weights"] = Field(
        "best", description="best score and, of ties, the cheapest; knee: nearest to the best of every objective; or by weights"
    )
    weights: dict[str, Number] = Field(default_factory=dict, description="by objective; one that is left out has none")
    limits: dict[str, Number] = Field(
        default_factory=dict, description="by objective: what is to be small is at most that, what is to be large at least"
    )


def rule(by: str | None, weights: Mapping[str, float] | None, limits: Mapping[str, float] | None) -> Choose:
    """Returns the rule that someone asked for; weights mean by: weights, nothing means best.

    Raises:
        InputError: there is no such rule, or a value is no number.
    """
    try:
        return Choose.model_validate(
            {"by": by or ("weights" if weights else "best"), "weights": dict(weights or {}), "limits": dict(limits or {})}
        )
    except ValidationError as error:
        said = (Problem(".".join(map(str, ("choose", *e["loc"]))), f"{rule_of(e)}, got {e['input']!r}.", "")
                for e in error.errors(include_url=False))  # fmt: skip
        raise InputError(*said) from None


def problems(how: Choose, objectives: Sequence[str]) -> list[Problem]:
    """Returns what is wrong with a choice for a study with these objectives."""
    found = []
    for part in ("weights", "limits"):
        for name, value in getattr(how, part).items():
            where = f"choose.{part}.{name}"
            if name not in objectives:
                hint = nearest(name, objectives).strip() or f"Objectives: {', '.join(objectives)}."
                found.append(Problem(where, "is no objective of the study.", hint))
            elif part == "weights" and value < 0:
                found.append(Problem(where, f"must be at least 0, got {value:g}.", "Leave it out for no weight."))
    if how.by == "weights" and not any(value > 0 for value in how.weights.values()):
        found.append(Problem("choose.weights", "are needed with by: weights.", f"For example {{{objectives[0]}: 1}}."))
    if how.by != "weights" and how.weights:
        found.append(Problem("choose.weights", f"have no meaning with by: {how.by}.", "Set by: weights, or leave them out."))
    return found


def choose(trials: Sequence[Trial], objectives: Sequence[Objective], how: Choose | None = None) -> tuple[Trial, str] | None:
    """Returns a member of the front, and why it; None where there is no front.

    best: the best score (the first objective) and, among statistical ties with it, the cheapest. Two accuracies tie where
    the paired difference over the validation rows is within 1.645 standard errors (one-sided 95 %). The cheapest has the
    smallest product of the other objectives, of which those to be maximised divide.
    knee: the smallest Euclidean distance to the best of every objective, each scaled to 0 and 1 over the front (Zeleny 1973,
    compromise programming).
    weights: the smallest weighted mean of the objectives, scaled alike.
    limits: what breaks one is left out first; where every member does, the reason says so and all are looked at.
    """
    how, members = how or Choose(), front(trials, objectives)
    if not members:
        return None
    within = kept_by(how, members, objectives)
    shown = ", ".join(f"{o.name} {'at least' if o.goal == 'maximize' else 'at most'} {how.limits[o.name]:g}"
                      for o in objectives if o.name in how.limits)  # fmt: skip
    before = f"within {shown} " if shown else ""
    if shown and not within:
        before, within = f"no member of the front keeps {shown}, so this is chosen without: ", members
    trial, said = _best(within, objectives) if how.by == "best" else _nearest(within, members, objectives, how)
    return trial, f"{before}{said}"


def kept_by(how: Choose, members: Sequence[Trial], objectives: Sequence[Objective]) -> list[Trial]:
    """Returns those of the members that keep the limits."""
    limits = [(o, how.limits[o.name] * (-1 if o.goal == "maximize" else 1)) for o in objectives if o.name in how.limits]
    return [t for t in members if all(o.loss(t.outcome) <= limit for o, limit in limits)]


def _best(members: Sequence[Trial], objectives: Sequence[Objective]) -> tuple[Trial, str]:
    best, score, costs = members[0], objectives[0], objectives[1:]
    tied = [t for t in members if t is not best and ties(best, t)] if score.name == "accuracy" else []
    said = f"trial {best.number} has the best {score.name} ({_show(score, best)})"
    if not tied or not costs:
        return best, said

    def cost(trial: Trial) -> float:
        values = [(objective, abs(objective.of(trial.outcome))) for objective in costs]
        return sum(math.log(max(value, 1e-12)) * (-1 if objective.goal == "maximize" else 1) for objective, value in values)

    chosen = min([best, *tied], key=lambda t: (cost(t), t.number))
    names = ", ".join(str(t.number) for t in tied)
    said += f"; {'trial' if len(tied) == 1 else 'trials'} {names} {'ties' if len(tied) == 1 else 'tie'} with it (95 %)"
    if chosen is best:
        return best, f"{said}, but it is the cheapest of them"
    return chosen, f"{said}, and trial {chosen.number} ({_show(score, chosen)}) is the cheapest of them"


def _nearest(
    within: Sequence[Trial], members: Sequence[Trial], objectives: Sequence[Objective], how: Choose
) -> tuple[Trial, str]:
    # Scaled over the whole front, so that a limit does not move the point that is aimed at.
    vectors = {t.number: losses(t, objectives) for t in members}
    ends = [(min(column), max(column)) for column in zip(*vectors.values(), strict=True)]

    def distance(trial: Trial) -> float:
        scaled = [(v - low) / (high - low) if high > low else 0.0
                  for v, (low, high) in zip(vectors[trial.number], ends, strict=True)]  # fmt: skip
        if how.by == "knee":
            return math.hypot(*scaled)
        return sum(how.weights.get(o.name, 0) * value for o, value in zip(objectives, scaled, strict=True))

    chosen = min(within, key=lambda t: (distance(t), t.number))
    values = ", ".join(f"{o.name} {_show(o, chosen)}" for o in objectives)
    if how.by == "knee":
        return chosen, f"trial {chosen.number} is the knee: the nearest of the front to the best of every objective ({values})"
    weighed = ", ".join(f"{name} {value:g}" for name, value in how.weights.items())
    return chosen, f"trial {chosen.number} is the best by the weights {weighed} ({values})"


def ties(best: Trial, other: Trial) -> bool:
    """Says whether one trial's accuracy on the validation rows is within 1.645 standard errors of another's (paired)."""
    a, b = (t.outcome.conditions.get("right", "") for t in (best, other))
    if not a or len(a) != len(b):
        return False
    difference = [int(x) - int(y) for x, y in zip(a, b, strict=True)]
    mean = sum(difference) / len(difference)
    variance = sum((d - mean) ** 2 for d in difference) / max(len(difference) - 1, 1)
    return abs(mean) <= CONFIDENT * math.sqrt(variance / len(difference))


def _show(objective: Objective, trial: Trial) -> str:
    return f"{objective.of(trial.outcome):.4g}"
