"""Only adapters train, in fp32; a fresh adapter changes nothing."""

from __future__ import annotations

import pytest
import torch

from training.adapters import ADAPTERS, attach
from training.model import describe, load_model, match
from training.recipe import Recipe


def attached(llama, **fields):
    recipe = Recipe(**{"model": llama, "rank": 4, "dropout": 0, **fields})
    return attach(load_model(recipe), recipe, describe(llama))


@pytest.mark.parametrize("adapter", sorted(ADAPTERS))
@pytest.mark.parametrize(("bits", "precision"), [(32, "fp32"), (16, "bf16"), (8, "fp32"), (4, "bf16")])
def test_only_adapters_train_and_in_fp32(llama, adapter, bits, precision):
    model = attached(llama, adapter=adapter, bits=bits, precision=precision)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert sum(p.numel() for p in trained.values()) == 4 * sum(a + b for a, b in describe(llama).linear.values())


@pytest.mark.parametrize("adapter", sorted(ADAPTERS))
@pytest.mark.parametrize("bits", [32, 4])
def test_a_fresh_adapter_changes_no_output(llama, adapter, bits):
    ids = torch.arange(5, 45).reshape(2, 20)
    base = load_model(Recipe(model=llama, bits=bits)).eval()
    with torch.no_grad():
        assert torch.equal(attached(llama, adapter=adapter, bits=bits).eval()(ids).logits, base(ids).logits)


def scalings(model) -> set[float]:
    return {module.scaling["default"] for module in model.modules() if hasattr(module, "lora_A")}


def test_the_scale_is_alpha_over_rank_or_over_its_root(llama):
    assert scalings(attached(llama, rank=16, alpha=32)) == {2.0}
    assert scalings(attached(llama, rank=16, alpha=32, adapter="rslora")) == {8.0}


@pytest.mark.parametrize("targets", ["all-linear", "attention", "mlp", ("q_proj", "layers.1.mlp.up_proj")])
def test_exactly_the_targets_get_an_adapter(llama, targets):
    model = attached(llama, targets=targets)
    found = {name.removeprefix("base_model.model.") for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert found == set(match(targets, describe(llama)))
    assert not any("lm_head" in name or "embed" in name for name in found)


def test_the_seed_decides_the_start(llama):
    first, same, other = (attached(llama, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_dropout_is_the_recipes(llama):
    model = attached(llama, dropout=0.25)
    assert {m.p for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout) and "lora_dropout" in name} == {0.25}
