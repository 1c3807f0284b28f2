"""Who dominates whom.

Owns: the non-dominated set, the front of a study, hypervolume (computed by moocore).
Must not know: where trials come from.

Convention: vectors are minimised; equal vectors do not dominate each other, so duplicates all stay; NaN is not allowed.
"""

from __future__ import annotations

from collections.abc import Sequence

from hpo.objectives import Objective, losses
from hpo.trial import Trial

FULL = 1.0 - 1e-9


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Says whether a is nowhere worse than b and somewhere better (Deb 2001, definition 2.5)."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def nondominated(vectors: Sequence[Sequence[float]]) -> list[int]:
    """Returns the indices of vectors that no other dominates, in order. O(n^2) comparisons in the worst case."""
    kept: list[int] = []
    # In lexicographic order a vector can only be dominated by an earlier one, so one pass over the kept ones is enough.
    for i in sorted(range(len(vectors)), key=lambda i: tuple(vectors[i])):
        if not any(dominates(vectors[j], vectors[i]) for j in kept):
            kept.append(i)
    return sorted(kept)


def eligible(trial: Trial) -> bool:
    """Says whether a trial may stand on a front: complete, and trained to the end of its own length."""
    return trial.state == "complete" and trial.outcome is not None and trial.outcome.share >= FULL


def front(trials: Sequence[Trial], objectives: Sequence[Objective]) -> list[Trial]:
    """Returns the complete trials that no other complete trial dominates, best first in the first objective."""
    rows = [(trial, vector) for trial in trials if eligible(trial) and (vector := losses(trial, objectives)) is not None]
    best = nondominated([vector for _, vector in rows])
    return [rows[i][0] for i in sorted(best, key=lambda i: (rows[i][1], rows[i][0].number))]


def hypervolume(vectors: Sequence[Sequence[float]], reference: Sequence[float]) -> float:
    """Returns the volume dominated by the vectors up to the reference point (Fonseca et al. 2006, by moocore).

    Vectors that do not lie strictly below the reference in every objective add nothing.
    """
    inside = [vector for vector in vectors if all(v < r for v, r in zip(vector, reference, strict=True))]
    if not inside:
        return 0.0
    import moocore

    return float(moocore.hypervolume(inside, ref=list(reference)))
