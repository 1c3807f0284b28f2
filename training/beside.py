"""Which recipes can be trained in a warm group, and which beside which. Pure: without torch and Ray.

Owns: `takes`, `refusal`, `base_of`, `key_of`. Must not know: how they are trained.
"""

from __future__ import annotations

from training.recipe import Job, Recipe, Resources

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
