"""The Gaussian process of Optuna (GPSampler), rebuilt from what was learned at each call: expected hypervolume improvement.

Owns: how lessons are told to the process. Must not know: when it is chosen.

Bytes of memory are a constraint of their own where both sides of the limit were seen: in doublings over it, measured or
predicted, so the wall is known before it is hit again. Whatever else cannot be trained is a second constraint, violated or not.
Running points are known to the acquisition (qLogEHVI). A dimension that does not exist at a point stands in the middle of
its range there, so that the space is flat.

The sums of floating-point numbers behind a suggestion depend on the order in which threads and processors take them, in the
last digits. So one thread computes, and ranges are named in GRAIN steps: the same history gives the same point on any machine
unless two points are equally good to those digits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hpo.algorithms._lesson import Lesson
from hpo.algorithms._optuna import code, decode, distribution, quiet
from hpo.space import Choice, Float, Int, Params, Space, Value

GRAIN = 1024
# Of Optuna's search for the best acquisition value, which takes 0.7 s as it comes (2,048 points drawn, 10 searches from the
# best, 128 samples of the posterior) and 0.15 s so, at 60 trials and two objectives. Hypervolumes did not tell them apart.
DRAWN, SEARCHES, SAMPLES = 256, 2, 32


def point(space: Space, objectives: int, learned: Sequence[Lesson], pending: Sequence[Params], *, seed: int) -> Params:
    """Returns the point with the largest expected improvement of the hypervolume, times the chance that it can be trained.

    Args:
        learned: at least one without violation.
    """
    import optuna
    from optuna.trial import TrialState, create_trial

    distributions = {name: distribution(dimension) for name, dimension in space.items()}
    limits = _constraints(learned)
    with quiet(), _one_thread():
        sampler = optuna.samplers.GPSampler(seed=seed, n_startup_trials=0, warn_independent_sampling=False)
        sampler._n_preliminary_samples, sampler._n_local_search = DRAWN, SEARCHES
        sampler._n_qmc_samples_ehvi = sampler._n_qmc_samples_qei = SAMPLES
        storage = optuna.storages.InMemoryStorage()
        study = optuna.create_study(storage=storage, sampler=sampler, directions=["minimize"] * objectives)
        for lesson, values, violated in zip(learned, _values(learned), limits, strict=True):
            known = {"constraints": violated} if violated else {}
            coded = _flat(space, lesson.params)
            study.add_trial(create_trial(params=coded, distributions=distributions, values=values, **known))
        for params in pending:
            coded = _flat(space, params)
            study.add_trial(create_trial(state=TrialState.RUNNING, params=coded, distributions=distributions))
        asked = study.ask(distributions).params
    return space.trim({name: _grain(dimension, decode(dimension, asked[name])) for name, dimension in space.items()})


def _flat(space: Space, params: Params) -> Params:
    middle = {name: dimension.decode(0.5) for name, dimension in space.items() if name not in params}
    return {name: code(dimension, (params | middle)[name]) for name, dimension in space.items()}


def _values(learned: Sequence[Lesson]) -> list[tuple[float, ...]]:
    """Returns the vectors; what has none gets the mean of each objective, which pulls the process nowhere."""
    good = [lesson.vector for lesson in learned if lesson.violation == 0]
    mean = tuple(math.fsum(column) / len(good) for column in zip(*good, strict=True))
    return [mean if lesson.violation else lesson.vector for lesson in learned]


def _constraints(learned: Sequence[Lesson]) -> list[dict[str, float]]:
    """Returns for each lesson how far it is beyond each limit (above 0: violated); nothing where no limit was met."""
    found: list[dict[str, float]] = [{} for _ in learned]
    if any(lesson.excess is not None and lesson.excess > 0 for lesson in learned):
        known = [lesson.excess for lesson in learned if lesson.excess is not None]
        middle = sorted(min(excess, 0.0) for excess in known)[len(known) // 2]
        for lesson, constraint in zip(learned, found, strict=True):
            constraint["bytes"] = lesson.excess if lesson.excess is not None else middle
    other = [lesson.violation > 0 and not (lesson.excess or 0) > 0 for lesson in learned]
    if any(other):
        for lesson, constraint, violated in zip(learned, found, other, strict=True):
            constraint["other"] = 2 * lesson.violation if violated else -1.0
    return found


def _grain(dimension: Float | Int | Choice, value: Value) -> Value:
    if not isinstance(dimension, Float):
        return value
    low, high = (math.log(end) if dimension.log else end for end in (dimension.low, dimension.high))
    unit = ((math.log(value) if dimension.log else value) - low) / (high - low)
    return dimension.decode(round(unit * GRAIN) / GRAIN)


@contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
