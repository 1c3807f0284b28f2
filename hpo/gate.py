"""What is refused before it is launched.

Owns: the comparison of a recipe's predicted memory and seconds with the limits, the cut of its micro-batch, and the refusal of
points whose values do not go together: a space that mixes methods has such points beside sound ones. Pure.
Must not know: who proposed the recipe.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from hpo.errors import InputError
from hpo.trial import RESULTS, Trial
from training import memory
from training.model import Shape
from training.recipe import Limits, Recipe, Resources, clashes

# What does not change how long a step takes, or next to nothing: rank 32 -> 64 on a 3B model costs 2.7 %.
FREE = {"rank", "alpha", "dropout", "learning_rate", "lora_plus_ratio", "schedule", "warmup", "weight_decay", "clip", "seed",
        "epochs", "steps", "tokens", "micro_batch", "revision"}  # fmt: skip
SEEN = 0.1  # share of its length that a trial must have done to say how long the whole takes
TRUST = 1.25  # an underestimate beyond that says more about one trial than about all
SLACK = 0.1  # a prediction from other trials may be wrong by that much; only what is beyond it is refused


@dataclass(frozen=True)
class Verdict:
    """The recipe to launch (perhaps with a smaller micro-batch), or why not; predicted bytes and seconds where known."""

    recipe: Recipe
    predicted: int | None
    refusal: str | None = None
    seconds: float | None = None


def wall(limit: int | None, ran_out: Sequence[int], measured: Sequence[tuple[int, int]] = ()) -> int | None:
    """Returns the predicted bytes that a recipe may have, by the limit and by how predictions came out in this study.

    The limit is lowered by the worst underestimate seen (at most by TRUST), and below any prediction that ran out all the same.

    Args:
        ran_out: predicted for the trials that were launched and ran out of memory or over the limit.
        measured: (predicted, measured) of trials that came to an end.
    """
    worst = min(max((m / p for p, m in measured if p), default=1.0), TRUST)
    allowed = [int(limit / max(worst, 1.0))] if limit is not None else []
    return min(allowed + [p - 1 for p in ran_out], default=None)


def seconds_of(recipe: Recipe, history: Sequence[Trial]) -> float | None:
    """Returns how long the training steps of a recipe take by the trials that differ in nothing that matters for it, or None.

    The median of their seconds, each scaled to the length of this one.
    """
    shape, unit, length = _pace(recipe)
    found = []
    for trial in history:
        outcome = trial.outcome
        if trial.state in RESULTS and outcome is not None and outcome.seconds and outcome.share >= SEEN:
            other, its_unit, its_length = _pace(trial.recipe)
            if (other, its_unit) == (shape, unit):
                found.append(outcome.seconds / outcome.share / its_length * length)
    return statistics.median(found) if found else None


def _pace(recipe: Recipe) -> tuple[dict, str, float]:
    unit = next((name for name in ("steps", "tokens") if getattr(recipe, name) is not None), "epochs")
    return recipe.model_dump(exclude=FREE), unit, getattr(recipe, unit) or 1.0


def too_long(recipe: Recipe, limit: float | None, history: Sequence[Trial]) -> tuple[float | None, str | None]:
    """Returns the predicted seconds of a recipe, where other trials tell them, and why it is refused, if it is.

    Args:
        limit: seconds that a trial may use.
    """
    predicted = seconds_of(recipe, history) if limit is not None else None
    if predicted is None or predicted * (1 - SLACK) <= limit:
        return predicted, None
    return predicted, f"{predicted:,.4g} seconds predicted from other trials, over the limit of {limit:,.4g}"


def _bytes(recipe: Recipe, shape: Shape, resources: Resources, tokens_per_row: int) -> int:
    device = "cuda" if resources.gpus else "cpu"
    return memory.predict(recipe, shape, workers=resources.workers, tokens_per_row=tokens_per_row, device=device).total


def predict(recipe: Recipe, shape: Shape, resources: Resources, tokens_per_row: int) -> int | None:
    """Returns the peak bytes of a recipe as it stands, or None where they cannot be predicted."""
    try:
        return _bytes(recipe, shape, resources, tokens_per_row)
    except InputError:
        return None


def judge(recipe: Recipe, shape: Shape | None, limits: Limits, resources: Resources, tokens_per_row: int) -> Verdict:
    """Returns what to do with a recipe.

    The micro-batch follows the batch and is halved only as far as the memory limit demands; a recipe that does not fit with
    one sequence at a time is refused, and so is one whose values do not go together. Without a shape (a simulated study)
    everything passes.

    Args:
        tokens_per_row: of the longest training row, at most the recipe's `max_length`.
    """
    if shape is None:
        return Verdict(recipe, None)
    for field, rule, remedy in clashes(recipe, resources):
        return Verdict(recipe, None, f"{field}: {rule} {remedy}")
    share = max(1, recipe.batch_size // resources.workers)
    micro = min(recipe.micro_batch or share, share)
    while True:
        cut = recipe if micro == share else recipe.model_copy(update={"micro_batch": micro})
        try:
            predicted = _bytes(cut, shape, resources, tokens_per_row)
        except InputError as error:
            return Verdict(cut, None, str(error))
        if limits.peak_bytes is None or predicted <= limits.peak_bytes:
            return Verdict(cut, predicted)
        if micro == 1:
            return Verdict(cut, predicted, f"{predicted:,} peak bytes predicted, over the limit of {limits.peak_bytes:,}")
        micro = (micro + 1) // 2
