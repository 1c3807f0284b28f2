"""Bayesian search: a model of what was learned names the next point; a Gaussian process or the Parzen estimator of Optuna.

Owns: which of the two is asked, and what happens when it names a known point. Must not know: other algorithms.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Annotated, Literal

from pydantic import Field

from hpo.algorithms import _gp, _tpe, require
from hpo.algorithms._lesson import Lesson, fewer, lessons
from hpo.algorithms.random import draw
from hpo.objectives import Objective
from hpo.space import Choice, Float, Int, Params, Space, Value, key
from hpo.trial import Trial

ASKS = 5
"""Known points that TPE may name before one is drawn."""
STEPS = 50
"""Neighbours of a known point that the process named which are looked at for a new one."""
GP_LESSONS = 150
"""A process costs the third power of its lessons; beyond, the estimator is asked, which has learned what it can by then."""
GP_DIMENSIONS = 20
TPE_LESSONS = 200
"""The estimator costs in proportion; 200 of them keep a suggestion under 100 ms however long the study is."""

Model = Literal["auto", "gp", "tpe"]


def suggest(
    space: Space,
    objectives: Sequence[Objective],
    history: Sequence[Trial],
    rng: Random,
    *,
    startup: Annotated[int, Field(ge=1, le=10_000)] = 10,
    model: Model = "auto",
) -> Params | None:
    """Returns the point that the model names, or None if none is left.

    In a finite space the model may name known points only; then a new one beside them is taken, or drawn.

    Args:
        startup: results to have before the model is asked; up to then points are drawn at random. Default 10: Optuna's
            `n_startup_trials`.
        model: gp, a Gaussian process for each objective; tpe, Parzen estimators; auto, see `choose`.

    Raises:
        ValueError: an option is out of range, or there is no objective.
    """
    require("bayes", startup=startup, model=model)
    if not objectives:
        raise ValueError("bayes needs at least 1 objective, got 0")
    learned = lessons(space, objectives, history)
    if not space or len(learned) < startup:
        return draw(space, history, rng)
    pending = [trial.params for trial in history if trial.state == "running" and space.contains(trial.params)]
    tried = {trial.key for trial in history}
    seed = rng.getrandbits(32)
    if choose(space, learned, model, len(history)) == "gp":
        named = _gp.point(space, len(objectives), fewer(learned, GP_LESSONS, rng), pending, seed=seed)
        found = named if key(named) not in tried else _beside(space, named, tried, rng)
    else:
        told = fewer(learned, TPE_LESSONS, rng)
        asked = _tpe.points(space, len(objectives), told, pending, seed=seed, count=ASKS)
        found = next((named for named in asked if key(named) not in tried), None)
    return found or draw(space, history, rng)


def choose(space: Space, learned: Sequence[Lesson], model: Model, turn: int) -> Literal["gp", "tpe"]:
    """Returns the model for what was learned so far.

    The process, as long as it is affordable (at most GP_LESSONS results and GP_DIMENSIONS dimensions), where the space is flat.
    Where dimensions exist at some points only it wastes its evidence and the estimator is ahead, but the two by turns are ahead
    of both (benchmarks/search, xgboost). Without two results to interpolate between there is nothing to fit.

    Args:
        turn: a number that grows with the study.
    """
    if sum(lesson.violation == 0 for lesson in learned) < 2:
        return "tpe"
    if model != "auto":
        return model
    its_turn = turn % 2 == 1 or not any(dimension.when for _, dimension in space.items())
    return "gp" if its_turn and len(space) <= GP_DIMENSIONS and len(learned) <= GP_LESSONS else "tpe"


def _beside(space: Space, named: Params, tried: set, rng: Random) -> Params | None:
    """Returns an untried neighbour of a known point: one or two dimensions moved by the least step, or further each time."""
    for step in range(STEPS):
        point = dict(named)
        for name in rng.sample(list(named), min(len(named), 1 + step % 2)):
            point[name] = _moved(space[name], point[name], rng, 1 + step // 10)
        if space.contains(point) and key(point) not in tried:
            return point
    return None


def _moved(dimension: Float | Int | Choice, value: Value, rng: Random, steps: int) -> Value:
    if isinstance(dimension, Choice):
        return dimension.sample(rng)
    way = rng.choice((-1, 1)) * steps
    if isinstance(dimension, Int):
        return value + way * dimension.step
    return value * (dimension.high / dimension.low) ** (way / _gp.GRAIN) if dimension.log else (
        value + way * (dimension.high - dimension.low) / _gp.GRAIN
    )  # fmt: skip
