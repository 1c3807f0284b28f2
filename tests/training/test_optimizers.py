"""Every group has its own rate; every optimizer learns."""

from __future__ import annotations

import pytest
import torch

from training import loop, optimizers, schedule
from training.adapters import ADAPTERS, attach
from training.errors import InputError
from training.model import describe, load_model
from training.recipe import Recipe


def built(llama, **fields):
    recipe = Recipe(**{"model": llama, "rank": 4, "learning_rate": 1e-3} | fields)
    model = attach(load_model(recipe), recipe, describe(llama))
    return optimizers.build(recipe, model), model, recipe


@pytest.mark.parametrize("adapter", ["lora", "rslora", "dora"])
def test_the_rates_of_lora_plus_are_those_of_peft(llama, adapter):
    from peft.optimizers import create_loraplus_optimizer

    own, model, recipe = built(llama, adapter=adapter, lora_plus_ratio=16)
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    rates = [{id(p): group["lr"] for group in each.param_groups for p in group["params"]} for each in (own, theirs)]
    assert rates[0] == rates[1] and set(rates[0].values()) == {1e-3, 16e-3}
    assert sum(len(group["params"]) for group in own.param_groups) == sum(p.requires_grad for p in model.parameters())


def test_the_schedule_scales_each_groups_own_peak(llama):
    optimizer, _, recipe = built(llama, lora_plus_ratio=8)
    for step in range(20):
        now = schedule.rate(recipe, step, 20)
        optimizers.set_rate(optimizer, now)
        assert sorted(group["lr"] for group in optimizer.param_groups) == [now, 8 * now]


@pytest.mark.parametrize("adapter", sorted(ADAPTERS))
def test_without_a_ratio_all_rates_are_the_recipes_and_vectors_are_not_decayed(llama, adapter):
    optimizer, _, _ = built(llama, adapter=adapter, weight_decay=0.1)
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3}
    for group in optimizer.param_groups:
        assert all(group["weight_decay"] == (0.1 if p.ndim > 1 else 0.0) for p in group["params"])
    assert len(optimizer.param_groups) == (2 if adapter in ("dora", "full") else 1)


def test_a_higher_rate_of_b_moves_b_further(make_job):
    moved = {}
    for ratio in (1, 16):
        optimizer, model, _ = built(make_job().recipe.model, lora_plus_ratio=ratio)
        start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        optimizers.set_rate(optimizer, 1e-3)
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.ones_like(p)
        optimizer.step()
        moved[ratio] = {name: (p - start[name]).abs().max().item() for name, p in model.named_parameters() if name in start}
    for name in moved[1]:
        assert moved[16][name] == pytest.approx(moved[1][name] * (16 if "lora_B" in name else 1), rel=0.01)


def test_moments_in_8_bits_learn_like_those_in_32(make_job):
    losses = {}
    for name in ("adamw", "adamw_8bit"):
        job = make_job(model="embedded", rank=64, optimizer=name, steps=12, learning_rate=5e-3)
        losses[name] = []
        loop.train(job, lambda progress, name=name: losses[name].append(progress.metrics["train_loss"]))
    assert losses["adamw_8bit"] == pytest.approx(losses["adamw"], rel=0.05)
    assert losses["adamw_8bit"] != losses["adamw"]
    assert losses["adamw_8bit"][-1] < 0.8 * losses["adamw_8bit"][0]


def test_only_tensors_that_are_large_enough_have_moments_in_8_bits(llama):
    optimizer, model, _ = built(llama, adapter="full", optimizer="adamw_8bit")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    kinds = {(p.numel() >= optimizers.SMALL, optimizer.state[p]["state1"].dtype) for p in model.parameters()}
    assert kinds == {(True, torch.uint8), (False, torch.float32)}


def test_paged_moments_without_a_gpu_are_refused(make_job):
    with pytest.raises(InputError, match="optimizer: paged_adamw moves pages between a GPU and the host, and there is no GPU"):
        loop.train(make_job(optimizer="paged_adamw"))
