"""How the hypervolume of a study grew, and what more trials would probably add.

Owns: a reference point that does not move, the hypervolume after each trial, `stalled`, `forecast`. Pure.
Must not know: stores, runners.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpo.objectives import Objective, losses
from hpo.pareto import eligible, hypervolume, nondominated
from hpo.trial import Trial

FIRST = 8
"""Complete trials from which the reference is taken where no limit gives it."""
BEYOND = 0.1
"""Part of their range that it lies beyond the worst of them, so that the worst of them counts for something too."""
RESAMPLES = 500


@dataclass(frozen=True)
class Forecast:
    """What `more` trials would probably add: relative gain of hypervolume, with the ends of an 80 % interval."""

    more: int
    gain: float
    low: float
    high: float


def finished_in_order(trials: Sequence[Trial]) -> list[Trial]:
    """Returns the launched trials that came to an end by themselves, in the order in which they did."""
    ended = (t for t in trials if t.attempts and t.final and t.state != "cancelled")
    return sorted(ended, key=lambda t: (t.finished or 0.0, t.number))


def reference(
    trials: Sequence[Trial], objectives: Sequence[Objective], limits: Mapping[str, float | None]
) -> list[float] | None:
    """Returns the losses beyond which nothing counts, or None before `FIRST` trials are complete.

    A limit on an objective is its reference. Of the others it is the worst of the first complete trials and a tenth of their
    range beyond. It must be kept: taken anew from more trials it would move, and volumes would not be comparable.
    """
    complete = [t for t in finished_in_order(trials) if eligible(t) and losses(t, objectives) is not None][:FIRST]
    if len(complete) < FIRST:
        return None
    point = []
    for i, objective in enumerate(objectives):
        column = [losses(t, objectives)[i] for t in complete]
        limit = limits.get(objective.name)
        spread = max(column) - min(column)
        point.append(limit if limit is not None else max(column) + BEYOND * (spread or abs(max(column)) or 1.0))
    return point


def volumes(trials: Sequence[Trial], objectives: Sequence[Objective], point: Sequence[float]) -> list[float]:
    """Returns the hypervolume after each trial that ended, in the order in which they did."""
    best: list[list[float]] = []
    found, now = [], 0.0
    for trial in finished_in_order(trials):
        vector = losses(trial, objectives) if eligible(trial) else None
        if vector is not None:
            joined = [*best, vector]
            kept = nondominated(joined)
            if len(joined) - 1 in kept:
                best = [joined[i] for i in kept]
                now = hypervolume(best, point)
        found.append(now)
    return found


def stalled(grown: Sequence[float], *, trials: int, gain: float) -> bool:
    """Says whether the last `trials` trials together grew the hypervolume by less than `gain`, relatively."""
    if len(grown) < trials + FIRST or grown[-1 - trials] <= 0:
        return False
    return grown[-1] < grown[-1 - trials] * (1 + gain)


def forecast(grown: Sequence[float], *, more: int = 10) -> Forecast | None:
    """Returns what more trials would probably add, or None where too few are finished to say.

    The n-th trial of a search without luck or skill improves on all before it with a chance that falls like 1/n (records of
    exchangeable draws; Arnold et al. 1998, section 2.4), so each doubling of the trials adds about the same. What the last
    doubling added is carried on; the interval resamples its trials (80 %). A search that learns does better than that at
    first and worse once it is done, which the interval does not know.
    """
    half = len(grown) // 2
    if len(grown) < 2 * FIRST or grown[-1] <= 0:
        return None
    steps = [b - a for a, b in zip(grown[half - 1 :], grown[half:], strict=False)]
    scale = math.log((len(grown) + more) / len(grown)) / math.log(len(grown) / half) / grown[-1]
    chance = random.Random(len(grown))
    # Of what a doubling adds, ten trials draw a few steps: so many are drawn, not all.
    share = max(1, round(len(steps) * math.log((len(grown) + more) / len(grown)) / math.log(len(grown) / half)))
    drawn = sorted(sum(chance.choices(steps, k=share)) / grown[-1] for _ in range(RESAMPLES))
    low, high = drawn[RESAMPLES // 10], drawn[-1 - RESAMPLES // 10]
    expected = sum(steps) * scale
    return Forecast(more, expected, min(low, expected), max(high, expected))
