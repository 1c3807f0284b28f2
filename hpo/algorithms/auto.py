"""The algorithm that suits the space, the objectives and what was learned; see `choose` for which and why.

Owns: the choice. Must not know: how the others search.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from hpo.algorithms import load
from hpo.objectives import Objective
from hpo.space import Params, Space
from hpo.trial import FINAL, Trial

FEW = 16
"""Points of a space that are simply all tried, in the order of the grid."""
MANY = 500
"""Results from which on children of the best are as good as a model's points, and take milliseconds."""


def suggest(space: Space, objectives: Sequence[Objective], history: Sequence[Trial], rng: Random) -> Params | None:
    """Returns the point that the chosen algorithm names, or None if none is left."""
    name, _ = choose(space, len(objectives), sum(trial.state in FINAL for trial in history))
    options = {"levels": FEW} if name == "grid" else {}
    return load(name)(space, objectives, history, rng, **options)


def choose(space: Space, objectives: int, results: int) -> tuple[str, str]:
    """Returns the algorithm to ask after so many results, and why that one, as a sentence."""
    if space.size <= FEW:
        return "grid", f"the space has {space.size:.0f} points, so all of them are tried."
    if objectives > 1 and results >= MANY:
        return "nsga2", f"from {MANY} results on, children of the best are as good as a model's points."
    conditional = [name for name, dimension in space.items() if dimension.when]
    if conditional:
        return "bayes", f"a model learns most from few trials; of Parzen's, because {conditional[0]} exists at some points only."
    return "bayes", "a model learns most from few trials; a Gaussian process at first, Parzen estimators beyond 150 results."
