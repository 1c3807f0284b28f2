"""What held-out rows and other seeds say of a choice: better than its rivals, or a tie.

Owns: `Certify` (what it may cost), which trials are rivals, how many seeds the allowance buys, and the statistics. Pure.
Must not know: how a trial is trained again, stores.

Two trainings of one recipe with two seeds differ, and the trial that was chosen had a lucky one. So the chosen point and its
nearest rivals are trained again with seeds that chose nothing, and scored on rows that chose nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import Field

from hpo.certificate import Optimism, Rival, Verdict
from hpo.choosing import ties
from hpo.objectives import Objective
from hpo.trial import Trial
from training.recipe import Frozen, Number, Whole

RESAMPLES = 4000
SURE = 0.95
LEAST = 2  # seeds with which a spread can be seen at all


class Certify(Frozen):
    """What it may cost to be sure of the winner."""

    extra: Number = Field(0.15, ge=0, le=10, description="for training again: a share of the study's training seconds; 0: none")
    seeds: Whole = Field(5, ge=2, le=20, description="at most so many other seeds for each")
    rivals: Whole = Field(3, ge=0, le=10, description="at most so many of the front beside the winner")


@dataclass(frozen=True)
class Scores:
    """One trial on rows that chose nothing: for each seed the values of the rows, and what each row weighs.

    Higher is better. Without rows a seed's list holds its one score.
    """

    number: int
    seeds: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]

    def means(self) -> list[float]:
        """Returns the weighted mean of each seed."""
        total = sum(self.weights)
        return [sum(values) / total for values in self.seeds]


def rivals(winner: Trial, members: Sequence[Trial], objectives: Sequence[Objective], most: int) -> list[Trial]:
    """Returns the members of the front that may be as good as the winner: those that tie, else the nearest, nearest first."""
    score = objectives[0]
    away = {t.number: abs(score.loss(t.outcome) - score.loss(winner.outcome)) for t in members}
    others = sorted((t for t in members if t.number != winner.number), key=lambda t: (away[t.number], t.number))
    tied = [t for t in others if ties(winner, t)]
    return (tied or others[:1])[:most]


def seeds_for(costs: Sequence[float], allowed: float, most: int) -> list[int]:
    """Returns how many seeds each may have, the winner first; those without are left out from the end.

    Args:
        costs: seconds of training each once, the winner first, then its rivals from the nearest on.
        allowed: seconds in all.
    """
    for count in range(len(costs), 0, -1):
        together = sum(costs[:count])
        bought = min(most, math.floor(allowed / together + 1e-9)) if together > 0 else most
        if bought >= LEAST:
            return [bought] * count
    return [1] if costs and 0 < costs[0] <= allowed else []


def judge(winner: Scores, others: Sequence[Scores], *, over: str, failed: Mapping[int, str], seed: int = 0) -> Verdict:
    """Returns whether the winner is better than each rival with 95 % confidence, or which of them it ties with.

    Rows are resampled together for all (paired bootstrap, Efron & Tibshirani 1993, chapter 13). Where there are seeds, every
    draw also moves each trial's mean by the error that so few seeds leave: normal with the variance between seeds, pooled over
    the trials and itself drawn from its chi-square distribution, over the number of seeds (Student 1908).

    Args:
        over: what was looked at: `seeds` or `rows` (the trained models themselves).
        failed: trial -> what happened where a training with another seed did not complete.
    """
    import numpy as np

    all_of = [winner, *others]
    rng = np.random.default_rng(seed)
    draws = _draws(all_of, rng)
    noise = _seed_noise(all_of, rng)
    draws = draws + noise if noise is not None else draws
    best = draws.argmax(axis=0)
    shares = [float((best == i).mean()) for i in range(len(all_of))]
    ours = sum(winner.means()) / len(winner.seeds)
    found = []
    for i, other in enumerate(others, start=1):
        difference = draws[0] - draws[i]
        low, high = (float(end) for end in np.quantile(difference, (0.025, 0.975)))
        # Half of the equal draws to each: two models with the same answers beat each other half of the time.
        ahead = float((difference > 0).mean() + (difference == 0).mean() / 2)
        value = ours - sum(other.means()) / len(other.seeds)
        found.append(Rival(number=other.number, value=value, low=low, high=high, ahead=ahead,
                           scores=tuple(other.means())))  # fmt: skip
    tied = tuple(r.number for r in found if 1 - SURE < r.ahead < SURE)
    beaten = [r for r, share in zip(found, shares[1:], strict=True) if share >= SURE]
    sure = all(r.ahead >= SURE for r in found) and (not found or shares[0] >= SURE)
    unknown = winner.number in failed or not found or (over == "seeds" and noise is None)
    kind = "open" if unknown else "beaten" if beaten else "winner" if sure else "tie"
    tied = tied or tuple(r.number for r in found if r.ahead < SURE or not sure) if kind == "tie" else ()
    better = beaten[0].number if kind == "beaten" else None
    return Verdict(kind=kind, over=over, confidence=shares[0], tied=tied, better=better, rivals=tuple(found),
                   scores=tuple(winner.means()), failed=dict(failed))  # fmt: skip


def optimism(chosen: Sequence[float], held: Scores, *, seed: int = 0) -> Optimism:
    """Returns how much better the winner looked where it was chosen than on rows and seeds that did not choose it.

    Args:
        chosen: its validation score, row by row; or that score alone.
        held: of the winner.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    rows = np.asarray(chosen, dtype=float)
    before = rows[rng.integers(0, len(rows), size=(RESAMPLES, len(rows)))].mean(axis=1)
    after = _draws([held], rng)[0]
    noise = _seed_noise([held], rng)
    difference = before - after - (noise[0] if noise is not None else 0)
    known = len(rows) > 1 and (len(held.weights) > 1 or noise is not None)
    low, high = (float(end) for end in np.quantile(difference, (0.025, 0.975)))
    outside = sum(held.means()) / len(held.seeds)
    return Optimism(
        chosen=float(rows.mean()), held_out=outside, value=float(rows.mean()) - outside, rows=len(held.weights),
        low=low if known else None, high=high if known else None, seeds=len(held.seeds),
    )  # fmt: skip


def _draws(scores: Sequence[Scores], rng):
    """Returns (trials, RESAMPLES) means over resampled rows, the same rows for all."""
    import numpy as np

    count = len(scores[0].weights)
    if any(len(one.weights) != count for one in scores):
        raise ValueError(f"the trials were scored on different numbers of rows: {[len(one.weights) for one in scores]}")
    chosen = rng.integers(0, count, size=(RESAMPLES, count)) if count > 1 else np.zeros((RESAMPLES, 1), dtype=int)
    rows = [(np.mean(one.seeds, axis=0), np.asarray(one.weights, dtype=float)) for one in scores]
    return np.stack([values[chosen].sum(axis=1) / weights[chosen].sum(axis=1) for values, weights in rows])


def _seed_noise(scores: Sequence[Scores], rng):
    """Returns (trials, RESAMPLES) errors of the means over seeds; None where no trial has two seeds."""
    import numpy as np

    means = [np.array(one.means()) for one in scores]
    freedom = sum(len(m) - 1 for m in means)
    if freedom == 0:
        return None
    variance = sum(float(((m - m.mean()) ** 2).sum()) for m in means) / freedom
    spread = np.sqrt(variance * freedom / rng.chisquare(freedom, size=RESAMPLES))
    return np.stack([rng.standard_normal(RESAMPLES) * spread / math.sqrt(len(m)) for m in means])
