"""From a Recipe to a DeepSpeed ZeRO configuration. Pure; knows nothing of models."""

from __future__ import annotations

from training.recipe import Recipe

BUCKET = 5_000_000  # elements that are reduced at once; DeepSpeed allocates a buffer of that size on every worker


def config(recipe: Recipe, *, workers: int, micro_batch: int, accumulation: int, trainable: int) -> dict:
    """Returns DeepSpeed's configuration (Rajbhandari et al. 2020) for one recipe.

    The optimizer and the schedule are ours, so that they are the same with and without DeepSpeed.

    Args:
        recipe: gives the stage, clipping and precision.
        workers: number of data-parallel processes.
        micro_batch: sequences per forward and worker.
        accumulation: forwards per optimizer step and worker.
        trainable: elements of all adapters; no buffer needs to be larger.
    """
    return {
        "train_batch_size": micro_batch * accumulation * workers,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": recipe.clip,
        "zero_optimization": {
            "stage": recipe.zero_stage,
            "overlap_comm": False,
            "reduce_bucket_size": min(BUCKET, trainable),
        },
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": False},  # autocast does the precision; adapters and their gradients stay fp32
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
