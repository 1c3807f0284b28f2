"""What a history teaches, in the form in which any algorithm can use it.

Owns: which trials teach, and their vectors on a common scale. Must not know: any algorithm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hpo.objectives import Objective, losses
from hpo.space import Params, Space
from hpo.trial import Trial

BAD = 1.1
"""Every coordinate of a point without values: a tenth of the range worse than the worst value seen."""

# A stopped trial was falling behind, which is known; its values are of an unfinished training and not comparable. So it
# counts as worse than every complete one, and as better than one that cannot be trained at all.
VIOLATION = {"stopped": 0.5, "infeasible": 1.0, "diverged": 1.0}


@dataclass(frozen=True)
class Lesson:
    """A point, its vector to minimise (0 the best seen and 1 the worst in each objective), its violation (0: none)."""

    params: Params
    vector: tuple[float, ...]
    violation: float


def lessons(space: Space, objectives: Sequence[Objective], history: Sequence[Trial]) -> list[Lesson]:
    """Returns what can be learned from a history, in its order.

    Complete trials with all objectives teach their values; infeasible and diverged ones that the point is to be
    avoided, and so, mildly, stopped ones that came to an outcome. Running, failed and cancelled trials teach nothing,
    nor do complete ones with a missing objective, nor trials outside the space (the recipe's defaults may be).
    """
    rows = []
    for trial in history:
        violation = VIOLATION.get(trial.state, 0.0)
        vector = losses(trial, objectives) if trial.state == "complete" else None
        knows = vector is not None or violation == 1.0 or (violation > 0 and trial.outcome is not None)
        if knows and space.contains(trial.params):
            rows.append((trial.params, vector, violation))
    columns = list(zip(*(vector for _, vector, _ in rows if vector is not None), strict=True))
    ranges = [(min(column), max(column)) for column in columns]
    bad = (BAD,) * len(objectives)
    return [Lesson(params, _scaled(vector, ranges) if vector else bad, violation) for params, vector, violation in rows]


def _scaled(vector: Sequence[float], ranges: Sequence[tuple[float, float]]) -> tuple[float, ...]:
    # Bytes and shares of one differ by ten powers of ten, and the hypervolumes inside the algorithms depend on where
    # zero lies. Halves, because the range of two finite numbers may not be finite.
    return tuple(
        (value / 2 - low / 2) / (high / 2 - low / 2) if high / 2 > low / 2 else 0.0
        for value, (low, high) in zip(vector, ranges, strict=True)
    )
