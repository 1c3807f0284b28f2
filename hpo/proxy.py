"""From small to large: what a study on something smaller found, tried on the target, and whether it holds there.

Owns: `chosen`, `agreement`, `transfer`. A proxy is an ordinary study in the same storage with the same space: a smaller sibling
of the model, a share of the rows, a shorter run; cheap, and packed where its trials can be. Must not know: how a door shows it.

Its ranking is worth something on the target only if both rank alike. So besides the best few, some points from all over the
proxy's ranking are trained on the target too: over the best alone a rank correlation says nothing (restriction of range).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hpo import spec as specs
from hpo.errors import InputError, Problem
from hpo.objectives import Objective
from hpo.pareto import eligible
from hpo.space import Params, Space, key
from hpo.study import Status, Study, open_study, run
from hpo.trial import Trial

TOP, SPREAD, LEAST = 4, 4, 0.5


@dataclass(frozen=True)
class Transfer:
    """What came of it. `correlation` is Spearman's, over `points` that were trained on both; None where they are too few."""

    study: Study
    proxy: str
    correlation: float | None
    points: int
    holds: bool
    said: str


def transfer(
    proxy: str, source: object, sets: Sequence[str] = (), *, top: int = TOP, spread: int = SPREAD, least: float = LEAST,
    on_status: Callable[[Status], None] = lambda status: None,
) -> Transfer:  # fmt: skip
    """Runs a study on the best points of an earlier, smaller one and on some from all over it; says whether both rank alike.

    Args:
        proxy: an earlier study in the storage of this one, over the same dimensions.
        source: the study on the target, as for `hpo.run`; its budget of trials is that of the points.
        sets: overrides as path=value.
        top: points from the top of the proxy's ranking in the first objective.
        spread: further points, evenly from the rest of it.
        least: Spearman's rank correlation below which nothing is taken over.
        on_status: is told of progress.

    Raises:
        InputError: the proxy has not enough complete trials inside the target's space, or searches other dimensions.
    """
    loaded = specs.load(source, sets)
    score = loaded.spec.targets[0]
    known = open_study(proxy, storage=loaded.spec.storage, database=loaded.spec.database)
    if set(known.spec.space) != set(loaded.spec.space):
        raise InputError(Problem("proxy", f"{proxy} searches {', '.join(known.spec.space)}, and not the target's dimensions.",
                                 "Give both studies the same space."))  # fmt: skip
    points = chosen(known.history(), score, loaded.spec.space, top=top, spread=spread)
    if len(points) < 3:
        raise InputError(Problem("proxy", f"{proxy} has {len(points)} complete trials inside the target's space.",
                                 "Run it with more trials: three points and more say whether both rank alike."))  # fmt: skip
    study = run(source, [*sets, f"start={json.dumps(points)}", f"budget.trials={1 + len(points)}"], on_status=on_status)
    correlation, count = agreement(known.history(), study.history(), score)
    holds = correlation is not None and correlation >= least
    return Transfer(study, proxy, correlation, count, holds, _said(proxy, study, correlation, count, least))


def chosen(trials: Sequence[Trial], score: Objective, space: Space, *, top: int, spread: int) -> list[Params]:
    """Returns the points of the best complete trials, and of some evenly from the rest of the ranking, best first."""
    ranked = sorted((t for t in _complete(trials, score) if space.contains(t.params)), key=lambda t: score.loss(t.outcome))
    rest = ranked[top:]
    even = [rest[round((i + 0.5) * len(rest) / spread - 0.5)] for i in range(spread)] if len(rest) > spread else rest
    return [trial.params for trial in (*ranked[:top], *even)]


def agreement(proxy: Sequence[Trial], target: Sequence[Trial], score: Objective) -> tuple[float | None, int]:
    """Returns Spearman's rank correlation of a score over the points that are complete on both, and how many there are.

    None where they are fewer than three, or all alike on one side.
    """
    from scipy.stats import spearmanr

    known = {key(t.params): score.loss(t.outcome) for t in _complete(proxy, score)}
    pairs = [(known[key(t.params)], score.loss(t.outcome)) for t in _complete(target, score) if key(t.params) in known]
    if len(pairs) < 3 or any(len(set(side)) == 1 for side in zip(*pairs, strict=True)):
        return None, len(pairs)
    return float(spearmanr(*zip(*pairs, strict=True)).statistic), len(pairs)


def _complete(trials: Sequence[Trial], score: Objective) -> list[Trial]:
    return [t for t in trials if eligible(t) and score.loss(t.outcome) is not None]


def _said(proxy: str, study: Study, correlation: float | None, count: int, least: float) -> str:
    if correlation is None:
        return f"{proxy} and {study.name} have {count} points in common, which do not say whether they rank alike."
    over = f"rank correlation {correlation:+.2f} over {count} points"
    if correlation < least:
        return (f"{proxy} does not rank as {study.name} does: {over}, below {least:g}. Nothing is taken over from it; search on "
                f"the target itself: run {study.name} with more budget.trials.")  # fmt: skip
    return f"{proxy} ranks as {study.name} does: {over}. The winner is the best of those trained on the target."
