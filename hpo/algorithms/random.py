"""Random search: every point of the space is as likely as its ranges say, whatever was learned.

Owns: drawing a new point, for this algorithm and as the last resort of the others. Must not know: other algorithms.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from random import Random

from hpo.objectives import Objective
from hpo.space import Params, Space, key
from hpo.trial import Trial

TRIES = 1000
"""Draws that all hit known points mean that about 99.5 % of the space, as it is drawn, is known (0.995^1000 < 1 %)."""
COUNTABLE = 1_000_000
"""A space of more points than that is not walked through for what the draws have left."""
SOBOL = 20
"""Points of the sequence that are looked at for a new one; in a small space it repeats itself, as any sequence does."""
NOT_DRAWN = ("defaults", "start", "steered", "prior")
"""Origins of trials that say nothing of the seed."""


def suggest(space: Space, objectives: Sequence[Objective], history: Sequence[Trial], rng: Random) -> Params | None:
    """Returns the next point of a scrambled Sobol sequence, which fills a space more evenly than independent draws.

    The first point of a study is drawn from `rng`; it is the seed of the scrambling (Owen 1998) of all that follow, so that the
    sequence is a function of the history. Ranges that say so are on the log scale (Bergstra & Bengio 2012, section 2). Where the
    sequence meets nothing new, points are drawn independently; see `draw`.
    """
    drawn = next((trial.params for trial in history if trial.origin not in NOT_DRAWN and trial.params), None)
    if drawn is None or not space:
        return draw(space, history, rng)
    tried = {trial.key for trial in history}
    found = (point for point in _sequence(space, drawn, len(history)) if key(point) not in tried)
    return next(found, None) or draw(space, history, rng)


def _sequence(space: Space, drawn: Params, begin: int) -> list[Params]:
    from scipy.stats import qmc

    seed = zlib.crc32(json.dumps(sorted(drawn.items())).encode())
    sequence = qmc.Sobol(len(space), scramble=True, rng=seed).fast_forward(begin)
    rows = sequence.random(SOBOL).tolist()
    return [
        space.trim({name: dimension.decode(unit) for (name, dimension), unit in zip(space.items(), row, strict=True)})
        for row in rows
    ]


def draw(space: Space, history: Sequence[Trial], rng: Random) -> Params | None:
    """Returns a new point drawn uniformly from `rng`, each draw independent of all others.

    When the draws meet nothing new, a space of at most a million points is walked through in the order of its grid for
    the first that is new; in any other the answer is None.
    """
    tried = {trial.key for trial in history}
    for _ in range(TRIES):
        point = space.sample(rng)
        if key(point) not in tried:
            return point
    if math.isinf(space.size) or space.size > COUNTABLE:
        return None
    return next((point for point in space.walk(int(space.size)) if key(point) not in tried), None)
