"""DeepSpeed ZeRO: from a Recipe to its configuration, from a model to its engine; and what is cut at stage 3, seen whole.

Owns: `config` (pure), `start`, `sparing`, `elements`, `whole`. Must not know: adapters, rows, reports.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

from training.recipe import Recipe

BUCKET = 5_000_000  # elements that are reduced at once; DeepSpeed allocates a buffer of that size on every worker


SMALL = 10  # times the hidden size: smaller tensors stay whole on every worker at stage 3 (transformers' own choice for "auto")


def config(
    recipe: Recipe, *, workers: int, micro_batch: int, accumulation: int, trainable: int, hidden: int = 0, block: int = 0,
    pinned: bool = False,
) -> dict:  # fmt: skip
    """Returns DeepSpeed's configuration (Rajbhandari et al. 2020, Ren et al. 2021 for offload) for one recipe.

    The optimizer and the schedule are ours, so that they are the same with and without DeepSpeed.

    Args:
        recipe: gives the stage, offload, clipping and precision.
        workers: number of data-parallel processes.
        micro_batch: sequences per forward and worker.
        accumulation: forwards per optimizer step and worker.
        trainable: elements of all adapters; no buffer needs to be larger.
        hidden: width of the model, by which stage 3 tells tensors that are worth cutting.
        block: elements of one block's weights, of which stage 3 has two whole at a time.
        pinned: the host's memory may be page-locked, which makes offload faster.
    """
    host = {"device": "cpu", "pin_memory": pinned}
    stage: dict = {"stage": recipe.zero_stage, "overlap_comm": False, "reduce_bucket_size": min(BUCKET, trainable)}
    if recipe.zero_stage == 3:
        # By default up to a billion elements would be gathered ahead and kept: the whole of a small model.
        stage |= {"stage3_param_persistence_threshold": SMALL * hidden, "stage3_prefetch_bucket_size": min(BUCKET, block),
                  "stage3_max_live_parameters": 2 * block, "stage3_max_reuse_distance": 0}  # fmt: skip
    if recipe.offload:
        stage |= {"offload_optimizer": host} | ({"offload_param": host} if recipe.zero_stage == 3 else {})
    return {
        "train_batch_size": micro_batch * accumulation * workers,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": recipe.clip,
        "zero_optimization": stage,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": False},  # autocast does the precision; adapters and their gradients stay fp32
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def start(model, optimizer, settings: dict, device: str):
    """Returns DeepSpeed's engine around a model, and the optimizer in it. All workers of the group call this together."""
    import deepspeed
    import torch

    if device == "cpu":
        # All that DeepSpeed would compile here, for minutes and with g++, is a collective that only inference uses, and that
        # takes all workers to be on one machine.
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_init_required=False)
    if settings["zero_optimization"]["stage"] == 3:
        linear = torch.nn.functional.linear
        deepspeed.zero.Init(module=model, config_dict_or_path=settings, dtype=torch.float32)
        torch.nn.functional.linear = linear  # which it replaces for the whole process: see `sparing`
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)
    engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine, optimizer


@contextmanager
def sparing(recipe: Recipe):
    """At stage 3, has linear layers keep their weight for the backward pass as what it is: a part, to be gathered again then.

    Torch's own keeps the gathered weight, and with it the whole of a frozen base.
    """
    if recipe.zero_stage != 3:
        yield
        return
    import torch
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    linear = torch.nn.functional.linear
    torch.nn.functional.linear = zero3_linear_wrap
    try:
        yield
    finally:
        torch.nn.functional.linear = linear


def elements(parameter) -> int:
    """Returns the elements of a parameter, all workers' parts of it together."""
    return getattr(parameter, "ds_numel", parameter.numel())


@contextmanager
def whole(model, engine):
    """Has all that is trained whole on each worker inside the block, which all workers enter; what is changed there is lost."""
    cut = [p for p in model.parameters() if p.requires_grad and hasattr(p, "ds_numel")]
    if cut:
        import deepspeed

        engine.empty_partition_cache()  # what is on its way to the next forward arrives, and is let go
    with deepspeed.zero.GatheredParameters(cut) if cut else nullcontext():
        yield
