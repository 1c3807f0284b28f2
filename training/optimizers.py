"""How weights are changed by gradients.

Owns: `OPTIMIZERS`, name -> class and settings; the groups of parameters and their rates. Must not know: schedules, steps.

Every group says in `times` how its rate relates to the schedule's.
"""

from __future__ import annotations

from training.recipe import Recipe

SMALL = 4096  # elements; bitsandbytes keeps the moments of smaller tensors in fp32


def build(recipe: Recipe, model):
    """Returns the recipe's optimizer over all of a model's parameters that require gradients.

    Vectors (norms, biases, magnitudes) are not decayed. With LoRA+ (Hayou et al. 2024) what PEFT's `create_loraplus_optimizer`
    takes for B has its own rate: B itself, and vectors.
    """
    groups: dict[tuple[float, float], list] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        times = recipe.lora_plus_ratio if "lora_B" in name or parameter.ndim < 2 else 1.0
        groups.setdefault((times, recipe.weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    made = [{"params": group, "times": times, "lr": recipe.learning_rate * times, "weight_decay": decay}
            for (times, decay), group in groups.items()]  # fmt: skip
    return (_on_the_host if recipe.offload else OPTIMIZERS[recipe.optimizer])(made, recipe.learning_rate)


def set_rate(optimizer, rate: float) -> None:
    """Sets the schedule's rate, of which every group takes its own multiple."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("times", 1.0)


def _adamw(groups: list[dict], rate: float):
    import torch

    return torch.optim.AdamW(groups, lr=rate, fused=True)


def _on_the_host(groups: list[dict], rate: float):
    from deepspeed.ops.adam import DeepSpeedCPUAdam  # AdamW on a CPU, for state that is kept there (Ren et al. 2021)

    return DeepSpeedCPUAdam(groups, lr=rate, adamw_mode=True)


def _of_bitsandbytes(name: str):
    def make(groups: list[dict], rate: float):
        import bitsandbytes

        return getattr(bitsandbytes.optim, name)(groups, lr=rate, min_8bit_size=SMALL)

    return make


OPTIMIZERS = {
    "adamw": _adamw,
    "adamw_8bit": _of_bitsandbytes("AdamW8bit"),
    "paged_adamw": _of_bitsandbytes("PagedAdamW"),
    "paged_adamw_8bit": _of_bitsandbytes("PagedAdamW8bit"),
}
