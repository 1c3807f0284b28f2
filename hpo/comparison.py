"""Models compared on the same rows: every metric with its interval, what became worse, where, and what was forgotten.

Owns: `metrics_of`, `breakdown`, `retained`. Must not know: how rows were scored, how this is shown.

Intervals are percentile bootstraps over rows (Efron & Tibshirani 1993, chapter 13); all models see the same resampled rows, so
that a difference is one of pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from hpo.certificate import Compared, Interval, Retained, Slice
from training.metrics import METRICS, Goal, mean, perplexity

RESAMPLES = 2000
LABELS = 24  # at most so many answers are a breakdown of their own
LEAST = 5  # rows of a group that is shown
Draws = Callable[[Sequence[float]], float]


@lru_cache(maxsize=4)
def _weights(rows: int, seed: int = 0):
    import numpy as np

    return np.random.default_rng(seed).multinomial(rows, [1 / rows] * rows, size=RESAMPLES)


def _drawn(stats: Sequence[Sequence[float]], of: Draws) -> tuple[float, Any]:
    """Returns a score of all rows and the same score of resampled rows, from the statistics of each row."""
    import numpy as np

    array = np.asarray(stats, dtype=float)
    return of(array.sum(axis=0).tolist()), np.asarray([of(sums) for sums in (_weights(len(array)) @ array).tolist()])


def _interval(value: float, drawn: Any) -> Interval:
    import numpy as np

    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(value=float(value), low=float(low), high=float(high))


def compare(name: str, goal: Goal, of: Draws, stats: Mapping[str, Sequence[Sequence[float]]], winner: str) -> Compared:
    """Returns one metric of all models; rows that were not looked at have no statistics and are left out."""
    looked = [i for i, row in enumerate(stats[winner]) if row]
    found = {who: _drawn([rows[i] for i in looked], of) for who, rows in stats.items()}
    value, drawn = found[winner]
    differences = {who: _interval(value - v, drawn - d) for who, (v, d) in found.items() if who != winner}
    bad = {who: d.high < 0 if goal == "maximize" else d.low > 0 for who, d in differences.items()}
    return Compared(
        name=name, goal=goal, rows=len(looked), values={who: _interval(*pair) for who, pair in found.items()},
        differences=differences, worse=tuple(who for who, is_worse in bad.items() if is_worse),
    )  # fmt: skip


def metrics_of(models: Sequence[Mapping[str, Any]], goals: Mapping[str, Goal]) -> tuple[Compared, ...]:
    """Returns every metric that all models have.

    Args:
        models: each `who`, `right` by row and `metrics`, name -> statistics by row; the last one is compared with the others.
        goals: of the user's own metrics.
    """
    winner = models[-1]["who"]
    names = [n for n in models[-1].get("metrics", ()) if all(n in m.get("metrics", ()) for m in models)]
    found = [compare("accuracy", "maximize", mean, {m["who"]: [[r, 1.0] for r in m["right"]] for m in models}, winner)]
    for name in names:
        known = METRICS.get(name)
        goal, of = (known.goal, known.of) if known else (goals.get(name, "maximize"), mean)
        stats = {m["who"]: m["metrics"][name] for m in models}
        if any(stats[winner]):
            found.append(compare(name, goal, of, stats, winner))
    return tuple(found)


def breakdown(models: Sequence[Mapping[str, Any]], groups: Mapping[str, Sequence[Any]]) -> tuple[Slice, ...]:
    """Returns the accuracy of all models by group of rows: by answer where there are few, by quarter of a length.

    Args:
        models: as `metrics_of`.
        groups: what rows are grouped by -> by row a text, or a number.
    """
    winner, other = models[-1], models[-2]
    found = []
    for by, values in groups.items():
        for group, rows in _groups(values):
            gain = compare("accuracy", "maximize", mean, {m["who"]: [[m["right"][i], 1.0] for i in rows] for m in
                           (other, winner)}, winner["who"])  # fmt: skip
            accuracy = {m["who"]: sum(m["right"][i] for i in rows) / len(rows) for m in models}
            found.append(Slice(by=by, group=group, rows=len(rows), accuracy=accuracy, gain=gain.differences[other["who"]],
                               worse=bool(gain.worse)))  # fmt: skip
    return tuple(found)


def _groups(values: Sequence[Any]) -> list[tuple[str, list[int]]]:
    if isinstance(values[0], str):
        names = sorted(set(values))
        if not 1 < len(names) <= LABELS or len(names) * LEAST > len(values):
            return []
        return [(name, [i for i, value in enumerate(values) if value == name]) for name in names]
    import numpy as np

    edges = sorted({int(edge) for edge in np.quantile(values, [0.25, 0.5, 0.75, 1.0], method="lower")})
    found, below = [], min(values) - 1
    for edge in edges:
        rows = [i for i, value in enumerate(values) if below < value <= edge]
        found.append((f"{below + 1} to {edge}", rows))
        below = edge
    found = [(name, rows) for name, rows in found if len(rows) >= LEAST]
    return found if len(found) > 1 else []


def retained(models: Sequence[Mapping[str, Any]], text: str) -> Retained | None:
    """Returns the perplexity of each model on general text and its rise against the first one; None where there was no text.

    Args:
        models: each `who` and `retention` (`nll` and `tokens` by text); the first is the untuned base.
        text: what it was measured on.
    """
    if any(not m.get("retention") for m in models):
        return None
    base, values, rises = models[0]["retention"], {}, {}
    for m in models:
        own = m["retention"]
        values[m["who"]] = perplexity([sum(own["nll"]), sum(own["tokens"])])
        if m is not models[0]:
            # The same text in other tokens (another base in the space) has no perplexity to compare.
            pairs = zip(own["nll"], base["nll"], own["tokens"], strict=True)
            ratio = [[a - b, n] for a, b, n in pairs] if own["tokens"] == base["tokens"] else None
            value, drawn = _drawn(ratio, perplexity) if ratio else (None, None)
            rises |= {m["who"]: _interval(value - 1, drawn - 1)} if ratio else {}
    return Retained(text=text, texts=len(base["nll"]), tokens=sum(base["tokens"]), perplexity=values, rise=rises)
