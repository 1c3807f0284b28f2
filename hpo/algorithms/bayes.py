"""Bayesian search: the tree-structured Parzen estimator of Optuna, rebuilt from the history at each call.

Owns: how trials are told to Optuna. Must not know: other algorithms; nothing of Optuna leaves this file.

Complete trials become complete ones; infeasible, diverged and stopped ones complete ones with a violated constraint,
which puts them among the points that a good one should not look like; running ones stay running and count as bad ones
until they end (constant liar). Never FAIL, which Optuna ignores.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from hpo.algorithms import require
from hpo.algorithms._lesson import Lesson, lessons
from hpo.algorithms.random import suggest as draw
from hpo.objectives import Objective
from hpo.space import Choice, Float, Int, Params, Space, Value, key
from hpo.trial import Trial

if TYPE_CHECKING:
    import optuna

ASKS = 5
"""Known points that TPE may name before one is drawn; each is kept as a running one, so the next lies elsewhere."""


def suggest(
    space: Space,
    objectives: Sequence[Objective],
    history: Sequence[Trial],
    rng: Random,
    *,
    startup: Annotated[int, Field(ge=1, le=10_000)] = 10,
) -> Params | None:
    """Returns the point that TPE names, or None if none is left.

    With several objectives it is MOTPE (Ozaki et al. 2022), which models each dimension alone; with one it is the
    multivariate TPE (Falkner et al. 2018), where conditional dimensions are modelled in groups that occur together. In
    a finite space TPE may name known points only; then a new one is drawn.

    Args:
        startup: results to have before the model is asked; up to then points are drawn at random. Default 10: Optuna's
            `n_startup_trials`.

    Raises:
        ValueError: `startup` is out of range, or there is no objective.
    """
    require("bayes", startup=startup)
    if not objectives:
        raise ValueError("bayes needs at least 1 objective, got 0")
    learned = lessons(space, objectives, history)
    if not space or len(learned) < startup:
        return draw(space, objectives, history, rng)
    pending = [trial.params for trial in history if trial.state == "running" and space.contains(trial.params)]
    study = _study(space, len(objectives), learned, pending, seed=rng.getrandbits(32))
    tried = {key(trial.params) for trial in history}
    for _ in range(ASKS):
        point = _ask(study, space)
        if key(point) not in tried:
            return point
    return draw(space, objectives, history, rng)


def _study(space: Space, objectives: int, learned: Sequence[Lesson], pending: Sequence[Params], *, seed: int) -> optuna.Study:
    import optuna
    from optuna.trial import TrialState, create_trial

    storage = optuna.storages.InMemoryStorage()
    with _Quiet(logging.getLogger("optuna.storages._in_memory")), warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # Several objectives: each dimension is modelled alone, which is Optuna's default. Jointly the search narrows
        # too early (12 seeds, 3 objectives, 100 trials: median hypervolume 0.238 alone, 0.230 jointly, 0.223 random).
        alone = objectives > 1
        conditional = any(dimension.when for _, dimension in space.items())
        sampler = optuna.samplers.TPESampler(
            multivariate=not alone,
            group=conditional and not alone,
            constant_liar=True,
            n_startup_trials=0,  # counted in `suggest`, over all results; here it would be complete ones alone
            seed=seed,
        )
        study = optuna.create_study(storage=storage, sampler=sampler, directions=["minimize"] * objectives)
    distributions = {name: _distribution(dimension) for name, dimension in space.items()}

    def add(params: Params, state: TrialState, **known: Any) -> None:
        coded = {name: _code(space[name], value) for name, value in params.items()}
        study.add_trial(create_trial(state=state, params=coded, distributions={n: distributions[n] for n in coded}, **known))

    # TPE calls the best tenth good, and fills it up with violated ones when too few are not: the bad would be its
    # example. Then they are told as pending ones, which are never good.
    feasible = sum(lesson.violation == 0 for lesson in learned)
    enough = math.ceil(0.1 * len(learned)) <= feasible
    for lesson in learned:
        if lesson.violation > 0 and not enough:
            add(lesson.params, TrialState.RUNNING)
        else:
            violated = {"violation": lesson.violation}
            add(lesson.params, TrialState.COMPLETE, values=lesson.vector, constraints=violated)
    for params in pending:
        add(params, TrialState.RUNNING)
    return study


def _ask(study: optuna.Study, space: Space) -> Params:
    trial = study.ask()
    point: Params = {}
    # What others depend on comes first: whether a dimension exists is known only then.
    for name, dimension in sorted(space.items(), key=lambda item: bool(item[1].when)):
        if name not in space.active(point):
            continue
        if isinstance(dimension, Choice):
            point[name] = dimension.values[trial.suggest_categorical(name, range(len(dimension.values)))]
        elif isinstance(dimension, Int):
            point[name] = trial.suggest_int(name, dimension.low, dimension.high, step=dimension.step, log=dimension.log)
        else:
            value = trial.suggest_float(name, dimension.low, dimension.high, log=dimension.log)
            point[name] = min(max(float(value), dimension.low), dimension.high)
    return space.trim(point)


def _distribution(dimension: Float | Int | Choice) -> optuna.distributions.BaseDistribution:
    import optuna

    if isinstance(dimension, Choice):
        # Places instead of values: Optuna would take True for 1.
        return optuna.distributions.CategoricalDistribution(range(len(dimension.values)))
    if isinstance(dimension, Int):
        return optuna.distributions.IntDistribution(dimension.low, dimension.high, step=dimension.step, log=dimension.log)
    return optuna.distributions.FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def _code(dimension: Float | Int | Choice, value: Value) -> Value:
    if not isinstance(dimension, Choice):
        return value
    return next(i for i, v in enumerate(dimension.values) if v == value and isinstance(v, bool) == isinstance(value, bool))


class _Quiet:
    # Optuna announces each study in its log; ours lives for one call. Its own switch is for the whole process.
    def __init__(self, logger: logging.Logger):
        self.logger = logger

    def __enter__(self):
        self.logger.addFilter(self._refuse)

    def __exit__(self, *_):
        self.logger.removeFilter(self._refuse)

    @staticmethod
    def _refuse(record: logging.LogRecord) -> bool:
        return False
