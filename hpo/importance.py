"""Which hyperparameter mattered, as far as the trials can say.

Owns: `Importance` and `Effect`, how they are estimated, and `position`, the place of a value in its dimension.
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


LEVELS = 7  # of a range, at which the mean prediction is taken
AVERAGED = 40  # trials over which it is taken, at most


@dataclass(frozen=True)
class Importance:
    """The share of an objective's variance that a dimension explains, with the 95 % range over resampled trials."""

    name: str
    share: float
    low: float
    high: float


@dataclass(frozen=True)
class Effect:
    """The mean prediction of an objective at some values of one dimension (partial dependence, Friedman 2001, section 8.2).

    Attributes:
        values: of the dimension, in its order, within what was tried.
        losses: for each resample the loss at each value; smaller is better.
    """

    name: str
    values: tuple[Value, ...]
    losses: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Explained:
    """What the trials say of one objective: the dimensions by falling share, and the effect of each."""

    importances: tuple[Importance, ...] = ()
    effects: tuple[Effect, ...] = ()


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
    return list(explain(space, trials, objective, seed=seed).importances)


def explain(space: Space, trials: Sequence[Trial], objective: Objective, *, seed: int = 0) -> Explained:
    """Returns importances and effects from the same forests; nothing where `reason` says why."""
    if reason(space, trials, objective):
        return Explained()
    import numpy as np
    from sklearn.ensemble import RandomForestRegressor

    rows, values = _rows(space, trials, objective)
    names = _varied(space, rows)
    y = np.array(values)
    center, spread = y.mean(), y.std()
    y = (y - center) / spread
    count = len(y)
    rng = np.random.default_rng(seed)
    rises: list[list[float]] = []
    levels = {name: _levels(space[name], [row[name] for row in rows if name in row]) for name in names}
    curves: dict[str, list[list[float]]] = {name: [] for name in names}
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
        at = {name: _at(space[name], blocks, j, levels[name], rng.permutation([i for i in range(count) if name in rows[i]]))
              for j, name in enumerate(names)}  # fmt: skip
        # One call for all shuffles and levels: most of the time of a prediction is overhead.
        stacked = [*tests, *(block for given in at.values() for block in given)]
        predicted = forest.predict(np.vstack(stacked))
        shuffled = len(tests) * len(outside)
        guesses = predicted[:shuffled].reshape(len(tests), len(outside))
        for name, given in at.items():
            size = len(given[0])
            means = predicted[shuffled : shuffled + size * len(given)].reshape(len(given), size).mean(axis=1)
            curves[name].append((means * spread + center).tolist())
            shuffled += size * len(given)
        errors = ((guesses - y[outside]) ** 2).mean(axis=1)
        rises.append((errors[1:].reshape(len(names), SHUFFLES).mean(axis=1) - errors[0]) / 2)
    table = np.maximum(np.array(rises), -1.0)
    shares, (lows, highs) = table.mean(axis=0), np.quantile(table, (0.025, 0.975), axis=0)
    # A share is not negative; a mean below 0 is the noise around none.
    found = [
        Importance(name, *(float(min(max(value, 0.0), 1.0)) for value in (share, low, max(high, share))))
        for name, share, low, high in zip(names, shares, lows, highs, strict=True)
    ]
    effects = (Effect(name, tuple(levels[name]), tuple(map(tuple, curves[name]))) for name in names)
    return Explained(tuple(sorted(found, key=lambda item: -item.share)), tuple(effects))


def _rows(space: Space, trials: Sequence[Trial], objective: Objective) -> tuple[list[dict[str, Value]], list[float]]:
    # Started points may lie outside the space (the defaults are allowed to); they have no place on its axes.
    pairs = [(t.params, objective.loss(t.outcome)) for t in trials if eligible(t) and space.contains(t.params)]
    kept = [(params, value) for params, value in pairs if value is not None]
    return [params for params, _ in kept], [value for _, value in kept]


def _varied(space: Space, rows: Sequence[dict[str, Value]]) -> list[str]:
    return [name for name in space if len({row[name] for row in rows if name in row}) > 1]


def _order(dimension: Choice) -> list[Value]:
    return sorted(dimension.values) if _numeric(dimension) else list(dimension.values)


def _levels(dimension: Float | Int | Choice, tried: Sequence[Value]) -> list[Value]:
    """Returns the values at which an effect is looked at: those tried of a choice, else levels within what was tried."""
    if isinstance(dimension, Choice):
        return [value for value in _order(dimension) if any(value == t and type(value) is type(t) for t in tried)]
    low, high = min(tried), max(tried)
    within = [level for level in dimension.levels(LEVELS) if low < level < high]
    return [low, *within, high]


def _at(dimension: Float | Int | Choice, blocks: Sequence, j: int, levels: Sequence[Value], chosen) -> list:
    """Returns for each level the encoded trials that have the dimension, with the level in its place."""
    import numpy as np

    chosen = chosen[:AVERAGED]
    stand_in = np.random.default_rng(0)  # nothing is missing, so nothing is drawn
    made = []
    for level in levels:
        block = np.repeat(_encode(dimension, [level], stand_in), len(chosen), axis=0)
        made.append(np.hstack([*(b[chosen] for b in blocks[:j]), block, *(b[chosen] for b in blocks[j + 1 :])]))
    return made


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
