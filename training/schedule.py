"""Which rows each optimizer step trains on, and at what rate. Pure; knows nothing of models and devices."""

from __future__ import annotations

import itertools
import math
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from training.data import Tokenized
from training.errors import wrong
from training.recipe import Recipe
from training.world import World

SLACK = 64  # tokens of padding that attention may have in one group of packed rows
LEAST = 0.1  # of the peak rate, at the end of cosine_min


@dataclass(frozen=True)
class Plan:
    """Which rows each optimizer step trains on, over all workers: `order[step * batch : (step + 1) * batch]`."""

    steps: int
    batch: int
    micro: int
    order: Sequence[int] = field(repr=False)

    def micro_batches(self, step: int, rank: int, workers: int) -> list[list[int]]:
        """Returns this worker's rows of one step, cut into forwards; equally many on every worker."""
        mine = list(self.order[step * self.batch : (step + 1) * self.batch][rank::workers])
        return [mine[i : i + self.micro] for i in range(0, len(mine), self.micro)]


def plan(recipe: Recipe, rows: Tokenized, *, workers: int) -> Plan:
    """Returns the rows of every step: one seeded permutation per epoch, batches running on across epochs, all full.

    Where rows come from several sources, each step has its share of each by weight, to within one row of what is due from the
    beginning on. A source's rows come in permutations of their own, so none comes again before all the others of its source
    did; an epoch is as many rows as there are.

    Raises:
        ValueError: the batch cannot be shared equally among the workers.
        InputError: the recipe's mix names no source of the data, or leaves none.
    """
    if recipe.batch_size % workers:
        raise ValueError(f"batch_size must be a multiple of the workers, got {recipe.batch_size} and {workers}")
    rng = random.Random(recipe.seed)
    order = array("q")
    if rows.weights or recipe.mix:
        drawn = _mixed(rows, weights(recipe, rows), recipe.batch_size, rng)
    else:
        drawn = _permutations(range(len(rows)), rng)

    def extend():
        order.extend(itertools.islice(drawn, len(rows)))

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


def _permutations(rows: Sequence[int], rng: random.Random) -> Iterator[int]:
    while True:
        epoch = array("q", rows)
        rng.shuffle(epoch)
        yield from epoch


def weights(recipe: Recipe, rows: Tokenized) -> dict[str, float]:
    """Returns the share of each source among the rows that are drawn: the data's weights, where `mix` has no others.

    Rows that belong to no source (validation rows of a file of their own, in a final model) are drawn as often as the average.
    """
    if strange := set(recipe.mix or {}) - set(rows.weights):
        known = ", ".join(rows.weights) or "none: data.train is no mapping of names"
        raise wrong("recipe.mix", f"names {', '.join(sorted(strange))}, which is no source of data.train.", f"Known: {known}.")
    chosen = rows.weights | (recipe.mix or {})
    counts: dict[str, int] = {}
    for name, count in rows.parts:
        counts[name] = counts.get(name, 0) + count
    known = sum(weight for name, weight in chosen.items() if name in counts)
    if not known:
        raise wrong("recipe.mix", "leaves no source a weight above 0.", "Raise one.")
    if other := counts.get("", 0):
        chosen |= {"": known * other / (sum(counts.values()) - other)}
    total = sum(weight for name, weight in chosen.items() if name in counts)
    return {name: chosen[name] / total for name in counts if chosen[name]}


def _mixed(rows: Tokenized, shares: dict[str, float], batch: int, rng: random.Random) -> Iterator[int]:
    """Yields rows by the sources' shares: next is always the source that is furthest behind; shuffled within a batch."""
    members = {name: array("q") for name in shares}
    at = 0
    for name, count in rows.parts:
        if name in members:
            members[name].extend(range(at, at + count))
        at += count
    drawn = {name: _permutations(own, rng) for name, own in members.items()}
    behind = dict.fromkeys(shares, 0.0)
    while True:
        some = []
        for _ in range(batch):
            for name, share in shares.items():
                behind[name] += share
            name = max(behind, key=behind.__getitem__)
            behind[name] -= 1
            some.append(next(drawn[name]))
        rng.shuffle(some)
        yield from some


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


@dataclass(frozen=True)
class Load:
    """One forward: its tokens and the positions whose logits are computed, padding among both; `width` of its longest row.

    `padding`: tokens that attention adds to the rows of a packed forward; `apart`: it takes them in more parts than one.
    """

    tokens: int
    scored: int
    width: int
    padding: int = 0
    apart: bool = False


def loads(chunks: list[list[int]], rows: Tokenized, *, packed: bool) -> list[Load]:
    """Returns what each forward of a step holds, in the order in which they run."""
    found = []
    for chunk in chunks if packed else by_length(chunks, rows):
        lengths = [len(rows.ids[r]) for r in chunk]
        answers = [len(rows.ids[r]) - max(rows.prompt_lengths[r], 1) for r in chunk]
        width = max(lengths)
        if packed:
            groups = alike(lengths)
            padding = sum(len(group) * group[-1] for group in groups) - sum(lengths)
            found.append(Load(sum(lengths), sum(answers), width, padding, len(groups) > 1 or padding > 0))
        else:  # rows end together: the last columns are scored, and one that predicts them
            found.append(Load(len(chunk) * width, len(chunk) * min(max(answers) + 1, width), width))
    return found


def alike(lengths: list[int]) -> list[list[int]]:
    """Returns lengths of rows in groups, all ascending, as few as SLACK allows: each costs a kernel of its own in every layer."""
    found: list[list[int]] = []
    padding = 0
    for length in sorted(lengths):
        padding += len(found[-1]) * (length - found[-1][-1]) if found else 0
        if found and padding <= SLACK:
            found[-1].append(length)
        else:
            found.append([length])
            padding = 0
    return found


def by_length(chunks: list[list[int]], rows: Tokenized) -> list[list[int]]:
    """Returns the same rows in as many forwards of the same sizes, those of like length together, so that little is padded.

    The gradient of a step is a sum over its rows, so it does not depend on it.
    """
    ordered = iter(sorted((r for chunk in chunks for r in chunk), key=lambda r: len(rows.ids[r])))
    return [[next(ordered) for _ in chunk] for chunk in chunks]


def heaviest(planned: Plan, rows: Tokenized, world: World, *, packed: bool) -> int:
    """Returns the step whose widest forward has the most tokens, padding among them: the one that needs the most memory."""

    def weight(step: int) -> int:
        return max(load.tokens for load in loads(planned.micro_batches(step, 0, world.size), rows, packed=packed))

    return max(range(planned.steps), key=weight)
