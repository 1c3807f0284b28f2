"""What is refused before it is launched.

Owns: the comparison of a recipe's predicted memory with the limit, the cut of its micro-batch, and the refusal of points whose
values do not go together: a space that mixes methods has such points beside sound ones. Pure.
Must not know: who proposed the recipe.
"""

from __future__ import annotations

from dataclasses import dataclass

from hpo.errors import InputError
from training import memory
from training.model import Shape
from training.recipe import Limits, Recipe, Resources, clashes


@dataclass(frozen=True)
class Verdict:
    """The recipe to launch (perhaps with a smaller micro-batch), or why not."""

    recipe: Recipe
    predicted: int | None
    refusal: str | None = None


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
    device = "cuda" if resources.gpus else "cpu"
    share = max(1, recipe.batch_size // resources.workers)
    micro = min(recipe.micro_batch or share, share)
    while True:
        cut = recipe if micro == share else recipe.model_copy(update={"micro_batch": micro})
        try:
            predicted = memory.predict(cut, shape, workers=resources.workers, tokens_per_row=tokens_per_row, device=device).total
        except InputError as error:
            return Verdict(cut, None, str(error))
        if limits.peak_bytes is None or predicted <= limits.peak_bytes:
            return Verdict(cut, predicted)
        if micro == 1:
            return Verdict(cut, predicted, f"{predicted:,} peak bytes predicted, over the limit of {limits.peak_bytes:,}")
        micro = (micro + 1) // 2
