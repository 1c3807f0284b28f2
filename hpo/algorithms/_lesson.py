"""What a history teaches, in the form in which any algorithm can use it.

Owns: which trials teach, and their vectors on a common scale. Must not know: any algorithm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from hpo.objectives import Objective, losses
from hpo.pareto import nondominated
from hpo.space import Params, Space
from hpo.trial import Trial

BAD = 1.1
"""Every coordinate of a point without values: a tenth of the range worse than the worst value seen."""

# A stopped trial was falling behind, which is known; its values are of an unfinished training and not comparable. So it
# counts as worse than every complete one, and as better than one that cannot be trained at all.
VIOLATION = {"stopped": 0.5, "infeasible": 1.0, "diverged": 1.0}


@dataclass(frozen=True)
class Lesson:
    """A point and what came of it.

    Attributes:
        vector: to minimise; 0 is the best seen and 1 the worst in each objective.
        violation: 0: none; the larger, the further from what can be trained.
        excess: bytes over the limit in doublings (below 0: under it), measured or predicted; None where they are not known, or
            where no point was refused for them.
    """

    params: Params
    vector: tuple[float, ...]
    violation: float
    excess: float | None = None


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
            rows.append((trial.params, vector, violation, _bytes(trial)))
    columns = list(zip(*(vector for _, vector, _, _ in rows if vector is not None), strict=True))
    ranges = [(min(column), max(column)) for column in columns]
    bad = (BAD,) * len(objectives)
    found = [Lesson(params, _scaled(vector, ranges) if vector else bad, violation) for params, vector, violation, _ in rows]
    return _beyond(found, [size for *_, size in rows])


def _bytes(trial: Trial) -> int | None:
    known = trial.state in ("complete", "infeasible") and trial.outcome is not None
    return trial.outcome.peak_bytes or None if known else None


def _beyond(found: list[Lesson], sizes: Sequence[int | None]) -> list[Lesson]:
    """Returns the lessons with their excess of bytes, which also grades the violation: what is just too large is milder.

    The limit is not told to an algorithm, but it lies between the largest point that could be trained and the smallest larger
    one that could not; their geometric middle stands for it. What is infeasible with fewer bytes is so for another reason.
    """
    trained = [size for lesson, size in zip(found, sizes, strict=True) if size and not lesson.violation]
    most = max(trained, default=0)
    refused = [size for lesson, size in zip(found, sizes, strict=True) if size and lesson.violation and size > most]
    if not refused:
        return found
    limit = math.sqrt(most) * math.sqrt(min(refused)) if most else min(refused) / 1.01
    graded = []
    for lesson, size in zip(found, sizes, strict=True):
        excess = math.log2(size / limit) if size and (size > most or not lesson.violation) else None
        harm = 0.5 + 0.5 * min(1.0, excess) if excess is not None and excess > 0 else lesson.violation
        graded.append(replace(lesson, excess=excess, violation=harm))
    return graded


def fewer(learned: Sequence[Lesson], count: int, rng: Random) -> list[Lesson]:
    """Returns at most `count` lessons in their order: those of the front first, the rest drawn; a model costs by their number."""
    if len(learned) <= count:
        return list(learned)
    good = [i for i, lesson in enumerate(learned) if not lesson.violation]
    best = [good[i] for i in nondominated([learned[i].vector for i in good])]
    kept = set(best if len(best) <= count // 2 else rng.sample(best, count // 2))
    rest = [i for i in range(len(learned)) if i not in kept]
    return [learned[i] for i in sorted(kept | set(rng.sample(rest, count - len(kept))))]


def _scaled(vector: Sequence[float], ranges: Sequence[tuple[float, float]]) -> tuple[float, ...]:
    # Bytes and shares of one differ by ten powers of ten, and the hypervolumes inside the algorithms depend on where
    # zero lies. Halves, because the range of two finite numbers may not be finite.
    return tuple(
        (value / 2 - low / 2) / (high / 2 - low / 2) if high / 2 > low / 2 else 0.0
        for value, (low, high) in zip(vector, ranges, strict=True)
    )
