"""Only adapters train, in fp32; a fresh adapter changes nothing; what a method does in each step it really does."""

from __future__ import annotations

import pytest
import torch

from training import schedule
from training.adapters import ADAPTERS, START_RANK, attach
from training.data import prepare, read
from training.model import describe, load_model, load_tokenizer, match
from training.recipe import Recipe
from training.run import Run, set_up
from training.schedule import Plan
from training.world import World

PEFT = sorted(set(ADAPTERS) - {"full"})


def attached(llama, **fields):
    recipe = Recipe(**{"model": llama, "rank": 4, "dropout": 0, **fields})
    return attach(load_model(recipe), recipe, describe(llama))


def sizes(llama, adapter: str) -> int:
    """Returns the trained elements at rank 4: A and B; with dora the magnitudes, with adalora the singular values as well."""
    linear = describe(llama).linear.values()
    rank = int(4 * START_RANK) if adapter == "adalora" else 4
    more = {"dora": sum(out for out, _ in linear), "adalora": rank * len(linear)}
    return rank * sum(a + b for a, b in linear) + more.get(adapter, 0)


@pytest.mark.parametrize("adapter", PEFT)
@pytest.mark.parametrize(("bits", "precision"), [(32, "fp32"), (16, "bf16"), (8, "fp32"), (4, "bf16")])
def test_only_adapters_train_and_in_fp32(llama, adapter, bits, precision):
    model = attached(llama, adapter=adapter, bits=bits, precision=precision)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert sum(p.numel() for p in trained.values()) == sizes(llama, adapter)


@pytest.mark.parametrize(("bits", "dtype"), [(32, torch.float32), (16, torch.bfloat16)])
def test_with_full_all_weights_train_as_they_are(llama, bits, dtype):
    model = attached(llama, adapter="full", bits=bits, precision="fp32" if bits == 32 else "bf16")
    assert all(p.requires_grad and p.dtype == dtype for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == describe(llama).parameters


@pytest.mark.parametrize("adapter", PEFT)
@pytest.mark.parametrize("bits", [32, 4])
def test_a_fresh_adapter_changes_no_output(llama, adapter, bits):
    ids = torch.arange(5, 45).reshape(2, 20)
    base = load_model(Recipe(model=llama, bits=bits)).eval()
    with torch.no_grad():
        found, own = attached(llama, adapter=adapter, bits=bits).eval()(ids).logits, base(ids).logits
    # DoRA divides the weights by their norm and multiplies them by it again.
    assert torch.allclose(found, own, rtol=0, atol=1e-6) if adapter == "dora" else torch.equal(found, own)


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


# Methods


def run_of(job) -> tuple[Run, Plan, object]:
    rows = prepare(read(job.data), job.data, load_tokenizer(job.recipe), job.recipe.max_length).train
    planned = schedule.plan(job.recipe, rows, workers=1)
    return set_up(job, describe(job.recipe.model), planned, World(), "cpu"), planned, rows


def steps(run, planned, rows, rate=5e-3):
    """Does all steps of a plan, and yields the number of each."""
    for step in range(planned.steps):
        run.step(rows, planned.micro_batches(step, 0, 1), schedule.supervised(rows, planned, step), rate)
        yield step + 1


def ranks(model) -> list[int]:
    return [int((value != 0).sum()) for name, value in model.named_parameters() if "lora_E" in name]


@pytest.mark.parametrize("count", [2, 3, 20])
def test_the_ranks_of_adalora_fall_to_the_mean_that_was_asked_for(make_job, count):
    run, planned, rows = run_of(make_job(adapter="adalora", rank=4, steps=count))
    seen = [sum(ranks(run.inner)) for _ in steps(run, planned, rows)]
    layers = len(ranks(run.inner))
    assert seen[-1] == 4 * layers and len(set(ranks(run.inner))) > 1  # the mean; each layer has its own
    if count == 20:
        assert seen[:2] == [6 * layers] * 2  # the first tenth rests
        assert seen[2:15] == sorted(seen[2:15], reverse=True) and seen[14:] == [4 * layers] * 6


def test_the_orthogonal_penalty_of_adalora_is_in_the_gradient_and_not_in_the_loss(make_job):
    job = make_job(adapter="adalora", steps=4)
    told = {}
    for weight in (0.0, 0.5):
        run, planned, rows = run_of(job)
        run.inner.peft_config["default"].orth_reg_weight = weight
        told[weight] = run.step(rows, planned.micro_batches(0, 0, 1), schedule.supervised(rows, planned, 0), 0.0)
    # With E at zero nothing of the loss itself reaches A and B.
    assert told[0.0][0] == told[0.5][0] and told[0.5][1] > told[0.0][1]

    run, planned, rows = run_of(make_job(adapter="adalora", steps=30))
    penalty = ADAPTERS["adalora"].penalty
    before = penalty(run.inner).item()
    parts = [p for n, p in run.inner.named_parameters() if "lora_A" in n]
    assert before > 0.5 and all((p @ p.T - torch.eye(len(p))).norm() > 0.5 for p in parts)
    for _ in steps(run, planned, rows, 2e-2):
        pass
    assert penalty(run.inner).item() < 0.7 * before


def test_dora_trains_directions_and_magnitudes(make_job):
    run, planned, rows = run_of(make_job(adapter="dora"))
    before = {name: p.detach().clone() for name, p in run.inner.named_parameters() if p.requires_grad}
    for _ in steps(run, planned, rows):
        pass
    now = dict(run.inner.named_parameters())
    changed = {name.rsplit(".lora_", 1)[1].split(".")[0] for name, value in before.items() if not torch.equal(value, now[name])}
    assert changed == {"A", "B", "magnitude_vector"}


@pytest.mark.parametrize("adapter", sorted(ADAPTERS))
def test_every_method_trains_beside_a_checkpointed_base(make_job, adapter):
    run, planned, rows = run_of(make_job(adapter=adapter, gradient_checkpointing=True))
    plain, *_ = run_of(make_job(adapter=adapter))
    for one in (run, plain):
        one.told = one.step(rows, planned.micro_batches(0, 0, 1), schedule.supervised(rows, planned, 0), 0.0)
    assert run.told == pytest.approx(plain.told, rel=1e-4)
