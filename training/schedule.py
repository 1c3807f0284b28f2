"""Which rows each optimizer step trains on, and at what rate. Pure; knows nothing of models and devices."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

from training.data import Tokenized
from training.recipe import Recipe
from training.world import World

LEAST = 0.1  # of the peak rate, at the end of cosine_min


@dataclass(frozen=True)
class Plan:
    """Which rows each optimizer step trains on, over all workers: `order[step * batch : (step + 1) * batch]`."""

    steps: int
    batch: int
    micro: int
    order: list[int] = field(repr=False)

    def micro_batches(self, step: int, rank: int, workers: int) -> list[list[int]]:
        """Returns this worker's rows of one step, cut into forwards; equally many on every worker."""
        mine = self.order[step * self.batch : (step + 1) * self.batch][rank::workers]
        return [mine[i : i + self.micro] for i in range(0, len(mine), self.micro)]


def plan(recipe: Recipe, rows: Tokenized, *, workers: int) -> Plan:
    """Returns the rows of every step: one seeded permutation per epoch, batches running on across epochs, all full.

    Raises:
        ValueError: the batch cannot be shared equally among the workers.
    """
    if recipe.batch_size % workers:
        raise ValueError(f"batch_size must be a multiple of the workers, got {recipe.batch_size} and {workers}")
    rng = random.Random(recipe.seed)
    order: list[int] = []

    def extend():
        epoch = list(range(len(rows)))
        rng.shuffle(epoch)
        order.extend(epoch)

    if recipe.steps:
        steps = recipe.steps
    elif recipe.tokens:
        steps, seen = 0, 0
        while seen < recipe.tokens:
            while len(order) < (steps + 1) * recipe.batch_size:
                extend()
            seen += sum(len(rows.ids[i]) for i in order[steps * recipe.batch_size : (steps + 1) * recipe.batch_size])
            steps += 1
    else:
        steps = max(1, round((recipe.epochs or 1) * len(rows) / recipe.batch_size))
    while len(order) < steps * recipe.batch_size:
        extend()
    share = recipe.batch_size // workers
    return Plan(steps, recipe.batch_size, min(recipe.micro_batch or share, share), order)


def rate(recipe: Recipe, step: int, steps: int) -> float:
    """Returns the learning rate of a step (0-based): linear warm-up, then cosine or linear down to 0, or constant.

    `cosine_min` goes down to a tenth of the peak.
    """
    warmup = round(recipe.warmup * steps)
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    if recipe.schedule == "constant":
        return recipe.learning_rate
    done = (step - warmup) / max(steps - warmup, 1)
    if recipe.schedule == "linear":
        return recipe.learning_rate * (1 - done)
    least = LEAST if recipe.schedule == "cosine_min" else 0.0
    return recipe.learning_rate * (least + (1 - least) * 0.5 * (1 + math.cos(math.pi * done)))


def supervised(rows: Tokenized, planned: Plan, step: int) -> int:
    """Returns the number of response tokens in one step over all workers; the first token of a row is never predicted."""
    chosen = planned.order[step * planned.batch : (step + 1) * planned.batch]
    return sum(len(rows.ids[r]) - max(rows.prompt_lengths[r], 1) for r in chosen)


def heaviest(planned: Plan, rows: Tokenized, world: World) -> int:
    """Returns the step whose widest forward has the most padded tokens: the one that needs the most memory."""

    def weight(step: int) -> int:
        return max(len(c) * max(len(rows.ids[r]) for r in c) for c in planned.micro_batches(step, 0, world.size))

    return max(range(planned.steps), key=weight)
