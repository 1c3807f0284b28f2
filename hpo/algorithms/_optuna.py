"""How a space and its points are told to Optuna, for the models of `bayes`.

Owns: distributions, codes, silence. Must not know: which sampler is asked.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hpo.space import Choice, Float, Int, Value

if TYPE_CHECKING:
    import optuna


def distribution(dimension: Float | Int | Choice) -> optuna.distributions.BaseDistribution:
    """Returns a dimension as Optuna's; a choice as the places of its values, because Optuna would take True for 1."""
    from optuna import distributions

    if isinstance(dimension, Choice):
        return distributions.CategoricalDistribution(range(len(dimension.values)))
    if isinstance(dimension, Int):
        return distributions.IntDistribution(dimension.low, dimension.high, step=dimension.step, log=dimension.log)
    return distributions.FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def code(dimension: Float | Int | Choice, value: Value) -> Value:
    """Returns a value as Optuna knows it."""
    if not isinstance(dimension, Choice):
        return value
    return next(i for i, v in enumerate(dimension.values) if v == value and isinstance(v, bool) == isinstance(value, bool))


def decode(dimension: Float | Int | Choice, coded: int | float) -> Value:
    """Returns a value of the dimension from what Optuna named."""
    if isinstance(dimension, Choice):
        return dimension.values[int(coded)]
    if isinstance(dimension, Int):
        return int(coded)
    return min(max(float(coded), dimension.low), dimension.high)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps Optuna from announcing a study that lives for one call; its own switch is for the whole process."""
    # The second says at its import that greenlet is absent; with it the same searches run interleaved.
    loggers = [logging.getLogger(name) for name in ("optuna.storages._in_memory", "optuna._gp.batched_lbfgsb", "optuna._gp.gp")]
    for logger in loggers:
        logger.addFilter(_refuse)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of experimental samplers, and of fits that Optuna replaces by its defaults
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(_refuse)


def _refuse(record: logging.LogRecord) -> bool:
    return False
