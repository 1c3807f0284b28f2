"""Seconds of a run, predicted from what its recipe has to compute and how fast runs before it did so.

Owns: `count` (operations of a run), `fit` and `Pace` (seconds from operations, with the error), `probes` (which short runs tell
the most). Pure: it times nothing itself. Must not know: studies.

A run's seconds are taken to be a sum of parts, each a count times a rate that is not negative: floating-point operations of
forward and backward, those on quantized weights once more, calls of layers (which cost the same however few rows they see), and
elements that the optimizer changes. The rates are fitted to runs that are known, so that squared relative errors are least; each
of those, predicted from the others, tells the error.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from training.adapters import start_rank
from training.model import Shape, match
from training.recipe import Recipe

RECENT = 60  # runs that a fit looks at: the last ones
WIDE = 0.5  # relative error that is stated while a single run is known
LEAST = 0.02  # a clock on a shared machine repeats no better
TWICE = 2.0  # root mean squares of the error on each side of a band: nine of ten runs and more lie within (the tests count)
RESPONSE = 0.35  # share of a row's tokens that has logits, where it is not known


@dataclass(frozen=True)
class Rows:
    """What a run trains on: how many rows, and their tokens together."""

    rows: int
    tokens: int

    @property
    def mean(self) -> float:
        return self.tokens / max(1, self.rows)


@dataclass(frozen=True)
class Counts:
    """What a run computes on one worker: operations, those with quantized weights, calls of layers, optimizer elements."""

    operations: float
    quantized: float
    calls: float
    updates: float

    def times(self, share: float) -> Counts:
        """Returns the counts of a part of the run."""
        return Counts(*(share * value for value in self.values))

    @property
    def values(self) -> tuple[float, float, float, float]:
        return self.operations, self.quantized, self.calls, self.updates


@dataclass(frozen=True)
class Estimate:
    """Predicted seconds, and the band in which the truth lies nine times in ten or more."""

    seconds: float
    low: float
    high: float

    @property
    def error(self) -> float:
        """Half the band's width, relative."""
        return (self.high - self.low) / 2 / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Pace:
    """How fast a machine works: seconds per unit of each count, and the relative error of what it predicts.

    `seen` says which counts the known runs had at all.
    """

    rates: tuple[float, ...]
    error: float
    runs: int
    seen: tuple[bool, ...]

    def predict(self, counts: Counts) -> Estimate:
        """Returns the seconds of a run with these counts; of what no known run had (quantized weights) nothing is known."""
        seconds = float(np.dot(self.rates, counts.values))
        known = all(seen or not value for seen, value in zip(self.seen, counts.values, strict=True))
        error = self.error if known else max(self.error, WIDE)
        return Estimate(seconds, seconds * max(0.0, 1 - error), seconds * (1 + error))


def steps_of(recipe: Recipe, rows: Rows) -> float:
    """Returns the optimizer steps of a run, as `training.schedule.plan` has them."""
    if recipe.steps:
        return recipe.steps
    if recipe.tokens:
        return math.ceil(recipe.tokens / (recipe.batch_size * rows.mean))
    return max(1, round((recipe.epochs or 1) * rows.rows / recipe.batch_size))


def count(recipe: Recipe, shape: Shape | None, rows: Rows, *, workers: int = 1, response: float = RESPONSE) -> Counts:
    """Returns what a whole run computes on one worker.

    Per token a forward takes two operations for each weight of a linear layer and 4 x layers x width for each token attended to
    (half of them before it); the gradient of activations as many again, that of weights as many again for those that are trained;
    checkpointing repeats the forward (Kaplan et al. 2020, section 2.1; Chen et al. 2016).

    Args:
        shape: of the base; None for a simulated study, where a token counts as one operation.
        rows: what the run trains on.
        workers: data-parallel processes, which share the batch.
        response: share of the tokens whose logits are computed.
    """
    steps, share = steps_of(recipe, rows), recipe.batch_size / workers
    forwards = steps * math.ceil(share / min(recipe.micro_batch or share, share))
    tokens, passes = steps * share * rows.mean, 2 + recipe.gradient_checkpointing
    if shape is None:
        operations, trained, weights, layers = tokens * passes, 0.0, 1.0, 1
    else:
        attention = 2 * shape.layers * shape.hidden * rows.mean
        head = 2 * shape.vocabulary * shape.hidden * response
        trained = _trained(recipe, shape)
        base = 2 * shape.linear_parameters + attention + head
        operations = tokens * (passes * base + (1 if recipe.adapter == "full" else passes + 1) * 2 * trained)
        weights, layers = shape.linear_parameters, shape.layers
    # A quantized weight is turned into numbers again in every call, however few rows there are; LLM.int8 does so by the row.
    quantized = (operations + forwards * passes * weights * 10) * (recipe.bits < 16)
    return Counts(operations, quantized, forwards * passes * layers, steps * trained)


def _trained(recipe: Recipe, shape: Shape) -> float:
    if recipe.adapter == "full":
        return shape.parameters
    return float(start_rank(recipe) * sum(a + b for a, b in match(recipe.targets, shape).values()))


def fit(runs: Sequence[tuple[Counts, float]]) -> Pace | None:
    """Returns the pace that runs with known seconds tell; None without any.

    The error is `TWICE` the root mean square of the relative errors with which each run is predicted from all the others.
    """
    known = [(counts.values, seconds) for counts, seconds in runs if seconds > 0 and counts.operations > 0][-RECENT:]
    if not known:
        return None
    counts, seconds = np.array([c for c, _ in known]), np.array([s for _, s in known])
    rates = tuple(float(rate) for rate in _rates(counts, seconds))
    seen = tuple(bool(column.any()) for column in counts.T)
    if len(known) == 1:
        return Pace(rates, WIDE, 1, seen)
    others = [np.delete(np.arange(len(known)), i) for i in range(len(known))]
    missed = [_rates(counts[o], seconds[o]) @ counts[i] / seconds[i] - 1 for i, o in enumerate(others)]
    # Few runs say little about their own spread: Student's factor, roughly, for that many.
    error = TWICE * (1 + 2 / (len(known) - 1)) * float(np.sqrt(np.mean(np.square(missed))))
    return Pace(rates, max(LEAST, error), len(known), seen)


def _rates(counts: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Returns the rates, none negative, with the least squared relative error; no more of them than there are runs.

    The optimum lies at the unconstrained one of some subset of the columns, and there are fifteen.
    """
    relative = counts / seconds[:, None]
    scale = np.maximum(relative.max(axis=0), 1e-300)
    best, least = np.zeros(counts.shape[1]), math.inf
    present = [i for i in range(counts.shape[1]) if counts[:, i].any()]
    for size in range(1, min(len(seconds), len(present)) + 1):
        for chosen in itertools.combinations(present, size):
            columns = list(chosen)
            rates, *_ = np.linalg.lstsq(relative[:, columns] / scale[columns], np.ones(len(seconds)), rcond=None)
            rest = float(np.sum(np.square(relative[:, columns] / scale[columns] @ rates - 1)))
            # A further rate must earn its place, or noise would choose it.
            if (rates >= 0).all() and rest < 0.9 * least - 1e-12:
                best, least = np.zeros(counts.shape[1]), rest
                best[columns] = rates / scale[columns]
    return best


def probes(recipes: Sequence[Recipe]) -> list[Recipe]:
    """Returns the recipes whose short runs tell the most of all these: for every bits the smallest and the largest forward.

    And one with checkpointing where some have it. At most five.
    """
    found: list[Recipe] = []
    for bits in dict.fromkeys(recipe.bits for recipe in recipes):
        same = sorted((r for r in recipes if r.bits == bits), key=lambda r: (r.micro_batch or r.batch_size, r.rank))
        found += [same[0], same[-1]] if same[0] != same[-1] else [same[0]]
    if not any(r.gradient_checkpointing for r in found):
        found += [r for r in recipes if r.gradient_checkpointing][:1]
    return found[:5]
