"""What a colleague would say of a study's trials, with how sure that is.

Owns: `insights`: sentences from importances and effects. Pure. Must not know: stores, how it is shown.

Nothing is said of a dimension whose share may be nothing (its 95 % range reaches 0), and of its effect only what holds in at
least 90 % of the resampled studies; the share of them is in the sentence. What the trials cannot tell is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from hpo.importance import Effect, Explained, Importance, explain, position
from hpo.objectives import Objective
from hpo.space import Choice, Space, Value
from hpo.trial import Trial

AGREE = 0.9  # of the resamples
NOTHING = 0.05  # a share below which a dimension hardly matters
DECIDES = 0.2  # a share from which on a cost follows from it
SEES = 0.3  # of an objective that must be explained before anything is said of what explains nothing
LITTLE = 0.1  # of the effect: what is gained beyond a level where it hardly matters any more
END = 0.2  # of a range: its ends
PLATEAU = 0.4  # of the levels, at least
MARKED = 0.5  # of an effect's own size that the other objective must move by, to call it a trade


@dataclass(frozen=True)
class Insight:
    """One sentence, of which objectives and dimensions, and the share of the resamples in which it holds (None: a range)."""

    text: str
    objectives: tuple[str, ...]
    names: tuple[str, ...]
    agree: float | None


def insights(
    space: Space, trials: Sequence[Trial], objectives: Sequence[Objective], explained: Sequence[Explained] | None = None
) -> list[Insight]:
    """Returns the sentences, those on the first objective first; [] where the trials cannot tell.

    Args:
        explained: of each objective, where it is known already.
    """
    known = explained or [explain(space, trials, objective) for objective in objectives]
    found: list[Insight] = []
    for objective, one in zip(objectives, known, strict=True):
        effects = {effect.name: effect for effect in one.effects}
        for item in one.importances:
            if item.low > 0 and item.share >= NOTHING:
                say = _shape if objective is objectives[0] else _decides
                found += say(space, objective, item, effects[item.name])
        found += _idle(objective, one.importances)
    return [*found, *_trades(space, objectives, known)]


def _decides(space: Space, objective: Objective, item: Importance, effect: Effect) -> list[Insight]:
    """Returns what a cost follows from."""
    if item.share < DECIDES:
        return []
    text = f"{item.name} decides {objective.name}: it explains {item.share:.0%} of it ({item.low:.0%} to {item.high:.0%})"
    way = _way(effect)
    if way is not None and (not isinstance(space[item.name], Choice) or _ordered(space[item.name])):
        span = f"from {_show(effect.values[0])} to {_show(effect.values[-1])}"
        text += f", {span} {_change(objective, effect)}"
    return [Insight(f"{text}.", (objective.name,), (item.name,), way[1] if way else None)]


def _shape(space: Space, objective: Objective, item: Importance, effect: Effect) -> list[Insight]:
    """Returns where a dimension that matters is best, and where it stops to matter."""
    name, dimension = item.name, space[item.name]
    share = f"explains {item.share:.0%} of {objective.name} ({item.low:.0%} to {item.high:.0%})"
    if len(effect.values) < 2:
        return []
    if isinstance(dimension, Choice) and not _ordered(dimension):
        return _levels(objective, item, effect, share)
    best = [min(range(len(effect.values)), key=lambda i, losses=losses: losses[i]) for losses in effect.losses]
    places = [position(dimension, effect.values[i]) for i in best]
    ends = [position(dimension, effect.values[i]) for i in (0, -1)]
    reach = ends[1] - ends[0] or 1.0
    upper = sum(place >= ends[1] - END * reach for place in places) / len(places)
    lower = sum(place <= ends[0] + END * reach for place in places) / len(places)
    level = _enough(effect)
    found = []
    if level is not None:
        side, value, agree = level
        text = f"{name} hardly matters {side} {_show(value)} for {objective.name} ({_share(agree)}); it {share}."
        found.append(Insight(text, (objective.name,), (name,), agree))
    elif max(upper, lower) >= AGREE:
        at_top = upper >= lower
        verb, side, edge = ("Raise", "upper", effect.values[-1]) if at_top else ("Lower", "lower", effect.values[0])
        whole = 1.0 if at_top else 0.0
        at_edge = abs(position(dimension, edge) - whole) < END / 2
        wider = " A wider range may hold better ones." if at_edge and not isinstance(dimension, Choice) else ""
        text = (f"{verb} {name}: for {objective.name} the best points lie at the {side} end of its range, near {_show(edge)} "
                f"({_share(max(upper, lower))}); it {share}.{wider}")  # fmt: skip
        found.append(Insight(text, (objective.name,), (name,), max(upper, lower)))
    else:
        low, high = sorted(best)[int(0.025 * len(best))], sorted(best)[int(0.975 * (len(best) - 1))]
        if position(dimension, effect.values[high]) - position(dimension, effect.values[low]) <= 0.5:
            middle, last = effect.values[int(median(best))], len(effect.values) - 1
            # As finely as was looked: the neighbours of the levels that were best.
            around = f"{_show(effect.values[max(low - 1, 0)])} and {_show(effect.values[min(high + 1, last)])}"
            text = (f"{name} is best near {_show(middle)} for {objective.name} (in 95% of the resamples between {around}); "
                    f"it {share}.")  # fmt: skip
            found.append(Insight(text, (objective.name,), (name,), None))
    return found or [Insight(f"{name} matters for {objective.name}: it {share}; which value is best, these trials do not tell.",
                             (objective.name,), (name,), None)]  # fmt: skip


def _levels(objective: Objective, item: Importance, effect: Effect, share: str) -> list[Insight]:
    count = len(effect.losses)
    bests = [min(range(len(losses)), key=losses.__getitem__) for losses in effect.losses]
    wins = [bests.count(i) for i in range(len(effect.values))]
    i = max(range(len(wins)), key=wins.__getitem__)
    if wins[i] / count < AGREE:
        return []
    text = f"{item.name}: {_show(effect.values[i])} is best for {objective.name} ({_share(wins[i] / count)}); it {share}."
    return [Insight(text, (objective.name,), (item.name,), wins[i] / count)]


def _enough(effect: Effect) -> tuple[str, Value, float] | None:
    """Returns (above or below, the value from which on it hardly matters, agreement), or None."""
    count, size = len(effect.losses), len(effect.values)
    if size < 3:
        return None
    orders = (("above", range(size)), ("below", range(size - 1, -1, -1)))
    for side, order in orders:
        order = list(order)
        # A forest flattens the last leaves of a slope, so a plateau must be a good part of the range.
        for place in range(1, size - max(2, math.ceil(PLATEAU * size)) + 1):
            beyond, before = order[place:], order[0]

            def flat(losses: Sequence[float], beyond=beyond, before=before) -> bool:
                span = max(losses) - min(losses)
                tail = [losses[i] for i in beyond]
                within = max(tail) - min(tail) <= LITTLE * span
                return span > 0 and within and losses[before] - max(tail) >= (1 - 2 * LITTLE) * span

            agree = sum(map(flat, effect.losses)) / count
            if agree >= AGREE:
                return side, effect.values[order[place]], agree
    return None


def _idle(objective: Objective, importances: Sequence[Importance]) -> list[Insight]:
    # Forests that explain nothing, of few trials or of noise, do not show that nothing is there.
    names = tuple(item.name for item in importances if item.low == 0 and item.high < NOTHING)
    if not names or sum(item.share for item in importances if item.low > 0) < SEES:
        return []
    each = " each" if len(names) > 1 else ""
    text = f"No effect of {_and(names)} on {objective.name} shows in these trials (less than {NOTHING:.0%} of it{each})."
    return [Insight(text, (objective.name,), names, None)]


def _trades(space: Space, objectives: Sequence[Objective], known: Sequence[Explained]) -> list[Insight]:
    """Returns which dimensions buy one objective with another."""
    found = []
    for name, dimension in space.items():
        if isinstance(dimension, Choice) and not _ordered(dimension) and len(dimension.values) > 2:
            continue
        moved = []
        for objective, one in zip(objectives, known, strict=True):
            matters = any(item.name == name and item.low > 0 for item in one.importances)
            effect = next((e for e in one.effects if e.name == name), None)
            if matters and effect is not None and (way := _way(effect)) is not None and _large(effect):
                moved.append((objective, effect, *way))
        better = [one for one in moved if one[2] < 0]
        worse = [one for one in moved if one[2] > 0]
        if better and worse:
            values = better[0][1].values
            changes = _and([_change(o, e) for o, e, *_ in [*better, *worse]])
            text = (f"{name} trades {_and([o.name for o, *_ in worse])} for {_and([o.name for o, *_ in better])}: "
                    f"from {_show(values[0])} to {_show(values[-1])} {changes}.")  # fmt: skip
            agree = min(one[3] for one in moved)
            found.append(Insight(text, tuple(o.name for o, *_ in moved), (name,), agree))
    return found


def _way(effect: Effect) -> tuple[int, float] | None:
    """Returns (-1 where the loss falls from the first value to the last, 1 where it rises, agreement), or None."""
    falls = sum(losses[-1] < losses[0] for losses in effect.losses) / len(effect.losses)
    marked = sum(abs(losses[-1] - losses[0]) >= MARKED * (max(losses) - min(losses)) for losses in effect.losses)
    if max(falls, 1 - falls) < AGREE or marked / len(effect.losses) < AGREE:
        return None
    return (-1, falls) if falls > 0.5 else (1, 1 - falls)


def _large(effect: Effect) -> bool:
    ends = [median(losses[i] for losses in effect.losses) for i in (0, -1)]
    return abs(ends[1] - ends[0]) >= NOTHING * max(map(abs, ends))


def _change(objective: Objective, effect: Effect) -> str:
    sign = -1 if objective.goal == "maximize" else 1
    ends: Callable[[int], float] = lambda i: sign * median(losses[i] for losses in effect.losses)  # noqa: E731
    before, after = ends(0), ends(-1)
    if before > 0 and after > 0 and objective.name != "accuracy":
        return f"{objective.name} {after / before - 1:+.0%}"
    return f"{objective.name} {after - before:+.3g}"


def _ordered(dimension: Choice) -> bool:
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in dimension.values)


def _share(agree: float) -> str:
    return f"in {agree:.0%} of the resamples"


def _show(value: Value) -> str:
    return f"{value:.2g}" if isinstance(value, float) else "yes" if value is True else "no" if value is False else str(value)


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


__all__ = ["Insight", "insights"]
