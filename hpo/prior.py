"""What is known before the first trial: points that earlier studies found good, and what is known of LoRA.

Owns: which points a study begins with because of that, and how many. Pure. Must not know: stores, algorithms.

A prior is some points to try first, after the defaults and the user's own. They are at most a tenth of the trials (SHARE), so a
prior that is wrong costs no more than that tenth; and it fades by itself: what they came to is learned like all else, each new
result counts as much as theirs, and nothing else of the prior is kept. The points are written into the log when a study begins,
so a replay does not depend on studies that change or go.
"""

from __future__ import annotations

from collections.abc import Sequence

from hpo.objectives import Objective, losses
from hpo.pareto import front
from hpo.space import Choice, Float, Params, Space, Value, key
from hpo.trial import Trial
from training.recipe import Recipe

SHARE = 0.1
"""Of the trials, that a prior may name."""
LORA = "lora"
"""In place of a study's name: what is known of LoRA."""
FULL_RATE, TIMES, HIDDEN, POWER = 5e-5, 10.0, 2000, 0.78
"""The best rate of LoRA is about ten times that of full fine-tuning and nearly independent of the rank; that of full fine-tuning
falls with the width of the model, about 5e-5 at a hidden size of 2,000 and a power of 0.78 for Llama (Schulman et al. 2025, LoRA
Without Regret). Alpha is twice the rank (Hu et al. 2021 keep it fixed; PEFT's and Axolotl's
examples double the rank)."""
SPREAD = (1.0, 3.0, 1 / 3)
"""Rates that are tried around the known one, nearest first."""


def count(trials: int) -> int:
    """Returns how many points a prior may name in a study of so many trials: a tenth of them, at least one."""
    return max(1, int(SHARE * trials))


def points(
    space: Space,
    objectives: Sequence[Objective],
    recipe: Recipe,
    earlier: Sequence[Sequence[Trial]],
    *,
    limit: int,
    lora: bool = False,
    hidden: int | None = None,
) -> list[Params]:
    """Returns at most `limit` points of the space to begin with, best known first, without duplicates.

    Earlier studies take turns, each with the point of its front that is furthest from what is chosen already, beginning with the
    best in the first objective; points outside the space are left out. What is known of LoRA fills the rest.

    Args:
        recipe: the study's defaults.
        earlier: trials of each earlier study.
        lora: whether to use what is known of LoRA.
        hidden: width of the base model, where known.
    """
    found: list[Params] = []
    queues = [_spread(front(trials, objectives), objectives) for trials in earlier]
    while any(queues):
        for queue in queues:
            if queue and (point := _within(space, queue.pop(0))) is not None:
                found.append(point)
    if lora:
        found += _of_lora(space, recipe, hidden)
    default = space.project(recipe)
    known: dict[tuple, Params] = {}
    for point in found:
        if point != default:  # which is tried before
            known.setdefault(key(point), point)
    return list(known.values())[:limit]


def _within(space: Space, trial: Trial) -> Params | None:
    return dict(trial.params) if space.contains(trial.params) else space.project(trial.recipe)


def _spread(members: Sequence[Trial], objectives: Sequence[Objective]) -> list[Trial]:
    """Returns the members of a front so that each is the furthest from those before it, in the ranges of the front."""
    rows = [(trial, losses(trial, objectives)) for trial in members]
    if not rows:
        return []
    ends = [(min(column), max(column)) for column in zip(*(row for _, row in rows), strict=True)]
    places = [
        [(v - low) / (high - low) if high > low else 0.0 for v, (low, high) in zip(row, ends, strict=True)] for _, row in rows
    ]
    order = [0]  # a front begins with the best in the first objective
    while len(order) < len(rows):
        rest = [i for i in range(len(rows)) if i not in order]
        order.append(
            max(rest, key=lambda i: min(sum((a - b) ** 2 for a, b in zip(places[i], places[j], strict=True)) for j in order))
        )
    return [rows[i][0] for i in order]


def _of_lora(space: Space, recipe: Recipe, hidden: int | None) -> list[Params]:
    """Returns the defaults with what is known of rates and alpha, at ranks from the middle of their range outwards."""
    if recipe.adapter == "full" and "adapter" not in space.root:
        return []
    rate = TIMES * FULL_RATE * (HIDDEN / (hidden or HIDDEN)) ** POWER
    found = []
    for spread in SPREAD:
        for rank in (
            sorted(space["rank"].levels(3), key=lambda rank: abs(rank - recipe.rank)) if "rank" in space.root else [recipe.rank]
        ):
            wanted = {"learning_rate": rate * spread, "rank": rank}
            # The point holds the factor where alpha is a multiple of the rank.
            wanted["alpha"] = 2.0 if "alpha" in space.root and space["alpha"].times == "rank" else 2.0 * rank
            default = space.project(recipe) or {}
            full = {
                name: _nearest(dimension, wanted[name]) if name in wanted else default.get(name, dimension.decode(0.5))
                for name, dimension in space.items()
            }
            point = space.trim(full)
            if space.contains(point):
                found.append(point)
    return found


def _nearest(dimension, value: Value) -> Value:
    if isinstance(dimension, Choice):
        numbers = [known for known in dimension.values if isinstance(known, (int, float)) and not isinstance(known, bool)]
        return min(numbers, key=lambda known: abs(known - value)) if numbers else dimension.values[0]
    if isinstance(dimension, Float):
        return min(max(float(value), dimension.low), dimension.high)
    steps = round((min(max(value, dimension.low), dimension.high) - dimension.low) / dimension.step)
    return dimension.low + steps * dimension.step
