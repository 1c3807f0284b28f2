"""Which hyperparameter mattered, as far as the trials can say.

Owns: `Importance`, how it is estimated, and `position`, the place of a value in its dimension.
Must not know: stores, algorithms, how it is drawn.

Trials are fitted by a random forest and one dimension at a time is shuffled among trials that the forest did not see
(Breiman 2001, "Random Forests", section 10). For independent dimensions the rise in squared error is twice the variance
that the dimension explains, its interactions included (Gregorutti et al. 2017, "Correlation and variable importance in
random forests", proposition 1), so half the rise over the variance of the objective is a share: the total effect index
of Jansen (1999). Shares do not add up to 1: noise leaves them below, interactions lift them above. A forest on few
trials explains less than is there, so shares err towards 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hpo.objectives import Objective
from hpo.pareto import eligible
from hpo.space import Choice, Float, Int, Space, Value
from hpo.trial import Trial

MINIMUM = 8  # complete trials; fewer leave about two outside each resample
RESAMPLES = 40
TREES = 16  # per resample
SHUFFLES = 8  # per resample and dimension


@dataclass(frozen=True)
class Importance:
    """The share of an objective's variance that a dimension explains, with the 95 % range over resampled trials."""

    name: str
    share: float
    low: float
    high: float


def position(dimension: Float | Int | Choice, value: Value) -> float:
    """Returns where a value stands in its dimension, 0 at the low end and 1 at the high one; log ranges in logs."""
    if isinstance(dimension, Choice):
        return _order(dimension).index(value) / max(len(dimension.values) - 1, 1)
    low, high = float(dimension.low), float(dimension.high)
    if dimension.log:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return (value - low) / (high - low)


def reason(space: Space, trials: Sequence[Trial], objective: Objective) -> str | None:
    """Returns why `importance` has nothing to say, or None where it has."""
    rows, values = _rows(space, trials, objective)
    if len(rows) < MINIMUM:
        return f"Too few trials: {len(rows)} complete ones with a value, and {MINIMUM} are needed."
    if max(values) - min(values) <= 1e-12 * max(map(abs, values)):
        return f"All {len(rows)} complete trials have the same value."
    if not _varied(space, rows):
        return f"No hyperparameter took two values among the {len(rows)} complete trials."
    return None


def importance(space: Space, trials: Sequence[Trial], objective: Objective, *, seed: int = 0) -> list[Importance]:
    """Returns the dimensions by falling share; [] where `reason` says why.

    A dimension that took one value in all complete trials is left out: nothing is known of it. One that exists only
    under a condition is shuffled among the trials that have it, and counts for as much as they make up.
    """
    if reason(space, trials, objective):
        return []
    import numpy as np
    from sklearn.ensemble import RandomForestRegressor

    rows, values = _rows(space, trials, objective)
    names = _varied(space, rows)
    y = np.array(values)
    y = (y - y.mean()) / y.std()
    count = len(y)
    rng = np.random.default_rng(seed)
    rises: list[list[float]] = []
    while len(rises) < RESAMPLES:
        inside = rng.integers(count, size=count)
        outside = np.setdiff1d(np.arange(count), inside)
        if len(outside) < 2 or np.ptp(y[inside]) == 0:
            continue
        blocks = [_encode(space[name], [row.get(name) for row in rows], rng) for name in names]
        # Two thirds of the columns at each split: decorrelated trees that still see a strong dimension in most splits.
        state = int(rng.integers(2**31))
        forest = RandomForestRegressor(TREES, max_features=2 / 3, min_samples_leaf=2, random_state=state)
        forest.fit(np.hstack(blocks)[inside], y[inside])
        tests = [np.hstack(blocks)[outside]]
        for j, name in enumerate(names):
            having = np.array([i for i in outside if name in rows[i]], dtype=int)
            for _ in range(SHUFFLES):
                block = blocks[j].copy()
                block[having] = block[rng.permutation(having)]
                tests.append(np.hstack([*blocks[:j], block, *blocks[j + 1 :]])[outside])
        # One call for all shuffles: most of the time of a prediction is overhead.
        guesses = forest.predict(np.vstack(tests)).reshape(len(tests), len(outside))
        errors = ((guesses - y[outside]) ** 2).mean(axis=1)
        rises.append((errors[1:].reshape(len(names), SHUFFLES).mean(axis=1) - errors[0]) / 2)
    table = np.maximum(np.array(rises), -1.0)
    shares, (lows, highs) = table.mean(axis=0), np.quantile(table, (0.025, 0.975), axis=0)
    # A share is not negative; a mean below 0 is the noise around none.
    found = [
        Importance(name, *(float(min(max(value, 0.0), 1.0)) for value in (share, low, max(high, share))))
        for name, share, low, high in zip(names, shares, lows, highs, strict=True)
    ]
    return sorted(found, key=lambda item: -item.share)


def _rows(space: Space, trials: Sequence[Trial], objective: Objective) -> tuple[list[dict[str, Value]], list[float]]:
    # Started points may lie outside the space (the defaults are allowed to); they have no place on its axes.
    pairs = [(t.params, objective.loss(t.outcome)) for t in trials if eligible(t) and space.contains(t.params)]
    kept = [(params, value) for params, value in pairs if value is not None]
    return [params for params, _ in kept], [value for _, value in kept]


def _varied(space: Space, rows: Sequence[dict[str, Value]]) -> list[str]:
    return [name for name in space if len({row[name] for row in rows if name in row}) > 1]


def _order(dimension: Choice) -> list[Value]:
    return sorted(dimension.values) if _numeric(dimension) else list(dimension.values)


def _numeric(dimension: Choice) -> bool:
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in dimension.values)


def _encode(dimension: Float | Int | Choice, values: Sequence[Value | None], rng):
    # Returns (trials, columns). Numbers keep their order, which is all a tree sees; other choices get a column each.
    # Where the dimension does not exist, a value drawn from the others stands: any fixed one would tell the forest the
    # condition, and hide the importance of the choice that controls it.
    import numpy as np

    known = [value for value in values if value is not None]
    full = [known[rng.integers(len(known))] if value is None else value for value in values]
    if isinstance(dimension, Choice) and not _numeric(dimension):
        return np.array([[float(value == level) for level in dimension.values] for value in full])
    return np.array([[position(dimension, value)] for value in full])
