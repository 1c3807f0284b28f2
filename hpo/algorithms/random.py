"""Random search: every point of the space is as likely as its ranges say, whatever was learned.

Owns: drawing a new point, for this algorithm and as the last resort of the others. Must not know: other algorithms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

from hpo.objectives import Objective
from hpo.space import Params, Space, key
from hpo.trial import Trial

TRIES = 1000
"""Draws that all hit known points mean that about 99.5 % of the space, as it is drawn, is known (0.995^1000 < 1 %)."""
COUNTABLE = 1_000_000
"""A space of more points than that is not walked through for what the draws have left."""


def suggest(space: Space, objectives: Sequence[Objective], history: Sequence[Trial], rng: Random) -> Params | None:
    """Returns a point drawn uniformly, on the log scale where the range says so (Bergstra & Bengio 2012, section 2).

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
