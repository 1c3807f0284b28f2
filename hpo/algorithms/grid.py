"""Grid search: every combination of a few values of each range, in a fixed order.

Owns: the walk along the grid. Must not know: other algorithms.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Annotated

from pydantic import Field

from hpo.algorithms import require
from hpo.objectives import Objective
from hpo.space import Params, Space, key
from hpo.trial import Trial


def suggest(
    space: Space,
    objectives: Sequence[Objective],
    history: Sequence[Trial],
    rng: Random,
    *,
    levels: Annotated[int, Field(ge=1, le=1000)] = 3,
) -> Params | None:
    """Returns the first point of the grid that is in no trial yet, or None after the last.

    The order is that of `Space.walk`: the dimension written last varies fastest, choices that others depend on slowest.
    What is known already, be it from a start point, is skipped. Nothing is drawn from `rng`.

    Args:
        levels: values on each range, its ends included, evenly spread (on the log scale where the range says so); a
            choice or a shorter whole range gives all its values. Default 3: low, middle, high, the smallest grid that
            shows a curvature (the 3^k factorial design; Montgomery, Design and Analysis of Experiments, chapter 9).

    Raises:
        ValueError: `levels` is out of range.
    """
    require("grid", levels=levels)
    tried = {trial.key for trial in history}
    return next((point for point in space.walk(levels) if key(point) not in tried), None)
