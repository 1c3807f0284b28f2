"""How each method makes a base model trainable.

Owns: `ADAPTERS`, name -> `Method`: how parameters are attached, and what the method does in each step. A new one is one entry.
Must not know: data, optimizers, reports.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from training import own
from training.errors import wrong
from training.model import OUTPUT_HEADS, match
from training.recipe import Recipe

# AdaLoRA (Zhang et al. 2023): ranks begin at 1.5 times their later mean, as in the paper's section 4; they rest for the first
# tenth of the steps and stay as they are in the last quarter, and are given out anew at most a hundred times.
START_RANK, REST, SETTLED, ROUNDS = 1.5, 0.1, 0.25, 100


@dataclass(frozen=True)
class Method:
    """One way of training a base model.

    `attach`: (model, recipe, names of modules, optimizer steps of the run) -> model with what is to be trained.
    `penalty`: model -> a scalar that is added to the loss once per optimizer step.
    `stepped`: (model, number of the optimizer step from 1 on) is called after each, while the gradients are there.
    `state`: model -> tensors by name and a JSON value, what a method remembers beside its parameters; `restore` takes both back.
    """

    attach: Callable
    penalty: Callable | None = None
    stepped: Callable | None = None
    state: Callable | None = None
    restore: Callable | None = None


def attach(model, recipe: Recipe, shape, *, steps: int = 1):
    """Returns the model with what the recipe's method trains; only that requires gradients. Outputs do not change.

    Args:
        model: the frozen base.
        recipe: names the method, its size and its targets.
        shape: `training.model.describe` of the base, by which targets are found.
        steps: optimizer steps of the run, over which some methods plan.

    Raises:
        InputError: a target matches nothing.
    """
    import torch

    torch.manual_seed(recipe.seed)
    return method_of(recipe.adapter).attach(model, recipe, sorted(match(recipe.targets, shape)), steps)


def detach(model):
    """Returns the base without what PEFT has put on it. What another method did cannot be undone; `training.warm` sees it."""
    if not hasattr(model, "peft_config"):
        return model
    base = model.unload()
    base.disable_input_require_grads()
    vars(base).pop("_require_grads_hooks", None)
    return base


def method_of(name: str) -> Method:
    """Returns a method by its name, or a user's own.

    Raises:
        InputError: it cannot be imported, or is no Method.
    """
    if name in ADAPTERS:
        return ADAPTERS[name]
    method = own.load(name, "recipe.adapter")
    if not isinstance(method, Method):
        raise wrong("recipe.adapter", f"{name} must be a Method, got {type(method).__name__}.",
                    "Make it training.adapters.Method(attach=...).")  # fmt: skip
    return method


def start_rank(recipe: Recipe) -> int:
    """Returns the rank with which every adapter begins; AdaLoRA begins above the mean that it comes to."""
    return math.ceil(START_RANK * recipe.rank) if recipe.adapter == "adalora" else recipe.rank


def _in_fp32(model):
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            raise RuntimeError(f"{name} would be trained, but is no adapter")
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # adapters stay in fp32 whatever the base is
    return model


def _common(model, recipe: Recipe, modules: list[str]) -> dict:
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer: (in, out)

    return {
        "lora_alpha": recipe.alpha, "lora_dropout": recipe.dropout, "target_modules": modules, "bias": "none",
        "task_type": "CAUSAL_LM", "exclude_modules": list(OUTPUT_HEADS),
        "fan_in_fan_out": any(isinstance(module, Conv1D) for module in model.modules()),
    }  # fmt: skip


def _lora(model, recipe: Recipe, modules: list[str], steps: int, **variant):
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import Linear

    config = LoraConfig(r=recipe.rank, **_common(model, recipe, modules), **variant)
    attached = _in_fp32(get_peft_model(model, config, autocast_adapter_dtype=False))
    for module in attached.modules():
        if type(module) is Linear and type(module.base_layer) is torch.nn.Linear and not config.use_dora:
            module.forward = partial(_lean, module)
    return attached


def _lean(layer, x, *args, **options):
    """Does what PEFT's LoRA layer does, but scales where the rank is and adds the product in place.

    PEFT scales and adds as wide as the layer's output, which for a small model takes a tenth of a step (benchmarks/training).
    """
    import torch

    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    usual = not args and not options and not layer.disable_adapters and not layer.merged
    if not usual or x.dtype != a.dtype or torch.is_autocast_enabled(x.device.type):
        return type(layer).forward(layer, x, *args, **options)
    rows = x.flatten(0, -2)
    inner = torch.nn.functional.linear(layer.lora_dropout["default"](rows), a) * layer.scaling["default"]
    return layer.base_layer(rows).addmm_(inner, b.T).unflatten(0, x.shape[:-1])


def _adalora(model, recipe: Recipe, modules: list[str], steps: int):
    from peft import AdaLoraConfig, get_peft_model

    total = max(2, steps)
    config = AdaLoraConfig(
        init_r=start_rank(recipe), target_r=recipe.rank, total_step=total, tinit=round(REST * total),
        tfinal=round(SETTLED * total), deltaT=max(1, total // ROUNDS), **_common(model, recipe, modules),
    )  # fmt: skip
    attached = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in attached.named_parameters():
        if ".ranknum." in name:  # a constant, but where PEFT casts it to the base's precision it wants a gradient again
            parameter.requires_grad_(False).data = parameter.data.float()
    return _in_fp32(attached)


def _orthogonal(model):
    """Returns AdaLoRA's regularisation (equation 4): the mean of ||P'P - I|| and ||QQ' - I||, times its weight.

    PEFT adds it where the model computes the loss itself, which it does not here.
    """
    import torch

    terms = []
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = parameter @ parameter.T if "lora_A" in name else parameter.T @ parameter
            terms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype)))
    return model.peft_config["default"].orth_reg_weight * torch.stack(terms).mean()


def _allocate(model, step: int) -> None:
    model.base_model.update_and_allocate(step)


IMPORTANCE = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # of each weight, as PEFT's allocator calls them


def _ranks(model) -> tuple[dict, dict | None]:
    allocator = model.base_model.rankallocator
    tensors = {f"{kind}/{name}": value for kind in IMPORTANCE for name, value in getattr(allocator, kind).items()}
    return tensors, model.peft_config["default"].rank_pattern or None


def _set_ranks(model, tensors: dict, pattern: dict | None) -> None:
    allocator = model.base_model.rankallocator
    allocator.reset_ipt()
    for name, value in tensors.items():
        kind, _, parameter = name.partition("/")
        getattr(allocator, kind)[parameter] = value
    if pattern is not None:
        model.peft_config["default"].rank_pattern = pattern


def _full(model, recipe: Recipe, modules: list[str], steps: int):
    return model.requires_grad_(True)


ADAPTERS = {
    "lora": Method(_lora),
    "rslora": Method(partial(_lora, use_rslora=True)),
    "dora": Method(partial(_lora, use_dora=True)),
    "adalora": Method(_adalora, penalty=_orthogonal, stepped=_allocate, state=_ranks, restore=_set_ranks),
    "full": Method(_full),
}
