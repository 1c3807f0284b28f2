"""Which recipes can be trained in a warm group, and which beside which. Pure: without torch and Ray.

Owns: `takes`, `refusal`, `base_of`, `key_of`, `seats`. Must not know: how they are trained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from training.model import Shape, match
from training.recipe import Job, Recipe, Resources

if TYPE_CHECKING:
    from training.memory import Memory

# Of a step: seconds to dispatch its operations for each adapted layer, and operations per second of what computes. The first is
# paid once for a pack, the second by each trial; on a CPU one after the other, on a GPU side by side (benchmarks/packing).
DISPATCH = {"cpu": 4e-4, "cuda": 1.6e-4}
RATE = {"cpu": 5e10, "cuda": 2e14}
MOST = {"cpu": 8, "cuda": 32}

SHARED = ("model", "revision", "bits", "precision", "targets", "gradient_checkpointing")


def takes(recipe: Recipe, resources: Resources) -> str | None:
    """Returns why a recipe cannot be trained by a warm group, or None."""
    if resources.workers > 1:
        return f"resources.workers: {resources.workers} workers fail as one"
    if recipe.zero_stage:
        return f"recipe.zero_stage: {recipe.zero_stage} changes the base in ways that nobody undoes"
    return None


def refusal(recipe: Recipe) -> str | None:
    """Returns why a recipe cannot be trained beside others, or None."""
    if recipe.adapter not in ("lora", "rslora"):
        return f"adapter: {recipe.adapter} has more than A and B for each layer"
    if recipe.optimizer != "adamw":
        return f"optimizer: {recipe.optimizer} keeps its moments in a form of its own"
    if recipe.zero_stage:
        return f"zero_stage: {recipe.zero_stage} shares one trial among workers"
    if recipe.precision == "fp16":
        return "precision: fp16 scales the loss of each trial in its own way"
    if recipe.bits == 8:
        return "bits: 8 finds outliers over all rows of a forward, also those of neighbours"
    if recipe.packing == "off":
        return "packing: off pads rows to the longest of a forward"
    return None


def base_of(recipe: Recipe) -> tuple:
    """Returns what recipes must have in common to share a base."""
    return tuple(getattr(recipe, name) for name in SHARED)


def key_of(job: Job) -> str | None:
    """Returns what jobs must have in common to be trained together, or None for a job that is trained alone."""
    if refusal(job.recipe) or job.interventions or job.resources.workers > 1:
        return None
    data = job.data.model_dump_json()
    return repr((*base_of(job.recipe), job.recipe.max_length, job.rows, job.cache, data, job.evaluation.rows))


@dataclass(frozen=True)
class Seats:
    """How many recipes one worker should train at a time, the gain in tokens per second that is expected of it, and why."""

    count: int
    gain: float
    why: str


def seats(
    recipe: Recipe, shape: Shape, row_tokens: float, resources: Resources, *, memory: Memory | None = None,
    room: int | None = None,
) -> Seats:  # fmt: skip
    """Returns how many recipes like this one should be trained at a time by one worker.

    A step takes the time to dispatch its operations and the time to compute them. A pack dispatches once for all its trials, so
    it gains as long as dispatching is not small beside computing: as many seats as make it half of that, and as many as fit.

    Args:
        recipe: a usual one of the study.
        shape: of its base.
        row_tokens: mean tokens of a row.
        resources: of one worker.
        memory: predicted of the recipe alone; in a pack the base's weights are there once.
        room: bytes that a worker may take; None is not known.
    """
    device = "cuda" if resources.gpus else "cpu"
    cores = max(1, int(resources.cpus)) if device == "cpu" else 1
    tokens = row_tokens * (recipe.micro_batch or recipe.batch_size)
    dispatch = DISPATCH[device] * len(match(recipe.targets, shape))
    compute = 4 * tokens * (shape.linear_parameters + shape.vocabulary * shape.hidden / 3) / (RATE[device] * cores)
    count = min(MOST[device], max(1, math.ceil(2 * dispatch / compute)))
    fits = max(1, int((room - memory.weights) // (memory.total - memory.weights))) if memory and room else count
    short = f", as many as fit into {room / 1e9:.2f} GB" if fits < count else ""
    count = min(count, fits)
    together = max if device == "cuda" else sum
    gain = together((dispatch, compute)) / together((dispatch / count, compute))
    why = (f"a step of {tokens:.0f} tokens takes about {1000 * dispatch:.1f} ms to dispatch and {1000 * compute:.1f} ms to "
           f"compute: {count} at a time{short}, {gain:.1f} times the tokens per second")  # fmt: skip
    return Seats(count, gain, why)
