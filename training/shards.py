"""What ZeRO keeps in pieces on its workers, put together and taken apart, so that another number of workers can go on.

Owns: `gather`, `scatter`. Every worker calls them alike: they are collectives. Must not know: files, steps.

Rests on DeepSpeed's own `safe_get_full_*` and `safe_set_full_*` (deepspeed.utils), which know how each stage cuts a tensor. Only
moments of 8 bits cannot be put together: they have one scale per block of a piece.
"""

from __future__ import annotations

import torch

Tensors = dict[str, torch.Tensor]


def gather(run, main: bool) -> tuple[Tensors, Tensors]:
    """Returns weights by name and states by `name//key`, as one worker alone would have them; on the main worker alone."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    first = _pieces(run)[0][1]
    keys = [key for key, value in first.items() if isinstance(value, torch.Tensor) and value.ndim]
    scalars = {key: torch.tensor(float(value)) for key, value in first.items() if key not in keys}
    weights, states = {}, {}
    for name, parameter in run.trained():
        weight = safe_get_full_fp32_param(parameter)
        whole = {key: safe_get_full_optimizer_state(parameter, key) for key in keys}
        if main:
            weights[name] = weight.detach().cpu().clone()
            states |= {f"{name}//{key}": value.detach().cpu().clone() for key, value in (whole | scalars).items()}
    return weights, states


def scatter(run, weights: Tensors, states: Tensors) -> None:
    """Puts whole tensors into the pieces of this worker."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    first = run.trained()[0][0]
    kept = {key.rpartition("//")[2]: value for key, value in states.items() if key.rpartition("//")[0] == first}
    keys = [key for key, value in kept.items() if value.ndim]
    for piece, state in _pieces(run) if kept else ():
        state.clear()
        state |= {key: _scalar(value, piece, run) for key, value in kept.items() if key not in keys}
        state |= {key: torch.zeros_like(piece) for key in keys}
    if kept and hasattr(run.optimizer, "_lazy_init_hp_params_optimizer_state"):  # stages 1 and 2
        run.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in run.trained():
        _set_weight(parameter, weights[name])
        safe_set_full_fp32_param(parameter, weights[name].to(parameter.device, torch.float32))
        for key in keys:
            safe_set_full_optimizer_state(parameter, states[f"{name}//{key}"].to(parameter.device), key)


def _pieces(run) -> list[tuple[torch.Tensor, dict]]:
    inner = run.optimizer.optimizer  # the one that DeepSpeed has wrapped
    return [(piece, inner.state[piece]) for group in inner.param_groups for piece in group["params"]]


def _scalar(value: torch.Tensor, piece: torch.Tensor, run) -> torch.Tensor | int:
    """A step count is a tensor for torch's optimizers and a number for DeepSpeed's own."""
    if type(run.optimizer.optimizer).__module__.startswith("torch."):
        return value.to(piece.device, torch.float32)
    return int(value)


def _set_weight(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    if not hasattr(parameter, "ds_id"):
        parameter.data.copy_(value)
        return
    import deepspeed

    with torch.no_grad(), deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(value)
