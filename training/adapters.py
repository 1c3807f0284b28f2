"""How each adapter is attached to a base model.

Owns: `ADAPTERS`, name -> function(model, recipe) -> model with trainable adapters. A new method is one entry.
Must not know: training, data.
"""

from __future__ import annotations

from training.model import OUTPUT_HEADS, match
from training.recipe import Recipe


def attach(model, recipe: Recipe, shape):
    """Returns the model with fresh adapters; only they require gradients. B starts at zero, so outputs do not change.

    Args:
        model: the frozen base.
        recipe: names the adapter, its size and its targets.
        shape: `training.model.describe` of the base, by which targets are found.
    """
    import torch

    torch.manual_seed(recipe.seed)
    model = ADAPTERS[recipe.adapter](model, recipe, sorted(match(recipe.targets, shape)))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            raise RuntimeError(f"{name} would be trained, but is no adapter")
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # adapters stay in fp32 whatever the base is
    return model


def _lora(model, recipe: Recipe, modules: list[str], *, scaled_by_root: bool = False):
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer: (in, out)

    config = LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=recipe.dropout, target_modules=modules, bias="none",
        task_type="CAUSAL_LM", use_rslora=scaled_by_root, exclude_modules=list(OUTPUT_HEADS),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )  # fmt: skip
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def _rslora(model, recipe: Recipe, modules: list[str]):
    return _lora(model, recipe, modules, scaled_by_root=True)


ADAPTERS = {"lora": _lora, "rslora": _rslora}
