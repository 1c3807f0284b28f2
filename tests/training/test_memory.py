"""The predicted peak is that which is counted, and each part moves as it should."""

from __future__ import annotations

from dataclasses import replace

import pytest

from training import memory, schedule
from training.data import prepare, read
from training.model import describe, load_tokenizer
from training.recipe import Job, Recipe
from training.run import probe_bytes
from training.world import World

RECIPES = [
    {"dropout": 0},
    {"dropout": 0.05, "rank": 64},
    {"dropout": 0, "rank": 128, "batch_size": 1},
    {"batch_size": 32, "rank": 4},
    {"batch_size": 32, "micro_batch": 4, "rank": 64, "dropout": 0},
    {"targets": "attention"},
    {"targets": "mlp", "dropout": 0},
    {"targets": ("q_proj", "v_proj"), "adapter": "rslora"},
    {"gradient_checkpointing": True, "dropout": 0},
    {"gradient_checkpointing": True, "bits": 4, "batch_size": 16},
    {"bits": 4, "dropout": 0},
    {"bits": 8, "dropout": 0},
    {"bits": 8},
    {"precision": "bf16", "dropout": 0},
    {"precision": "bf16", "bits": 16},
    {"precision": "bf16", "bits": 4, "dropout": 0, "gradient_checkpointing": True},
    {"precision": "bf16", "bits": 8, "targets": "attention"},
    {"precision": "fp16"},
    {"precision": "fp16", "bits": 4, "dropout": 0},
    {"adapter": "dora", "dropout": 0},
    {"adapter": "dora", "rank": 64, "batch_size": 1},
    {"adapter": "dora", "bits": 4},
    {"adapter": "dora", "precision": "bf16", "batch_size": 32, "micro_batch": 4},
    {"adapter": "dora", "precision": "bf16", "bits": 16, "gradient_checkpointing": True},
    {"adapter": "adalora", "dropout": 0},
    {"adapter": "adalora", "rank": 64, "batch_size": 1},
    {"adapter": "adalora", "bits": 8},
    {"adapter": "adalora", "precision": "bf16", "bits": 16, "targets": "mlp"},
    {"adapter": "full"},
    {"adapter": "full", "batch_size": 1},
    {"adapter": "full", "precision": "bf16"},
    {"adapter": "full", "precision": "bf16", "bits": 16, "batch_size": 32, "micro_batch": 4},
    {"adapter": "full", "gradient_checkpointing": True},
    {"lora_plus_ratio": 8, "rank": 64},
    {"optimizer": "adamw_8bit", "rank": 128, "batch_size": 1},
    {"optimizer": "adamw_8bit", "adapter": "full", "batch_size": 1},
    {"packing": "off"},
    {"packing": "off", "dropout": 0, "micro_batch": 3},
    {"packing": "off", "precision": "bf16", "gradient_checkpointing": True},
]


def counted(job: Job) -> tuple[int, dict]:
    """Returns the bytes counted in two real steps, and the forwards of the batch that was used."""
    rows = prepare(read(job.data), job.data, load_tokenizer(job.recipe), job.recipe.max_length).train
    planned = schedule.plan(job.recipe, rows, workers=1)
    packed = job.recipe.packing == "auto"
    step = schedule.heaviest(planned, rows, World(), packed=packed)
    forwards = schedule.loads(planned.micro_batches(step, 0, 1), rows, packed=packed)
    return probe_bytes(job, describe(job.recipe.model), planned, rows, World(), "cpu"), {"forwards": forwards}


@pytest.mark.parametrize("fields", RECIPES, ids=lambda fields: " ".join(f"{k}={v}" for k, v in fields.items()))
def test_the_prediction_is_within_a_twentieth_of_what_is_counted(make_job, fields):
    job = make_job(**{"model": "embedded", "rank": 16, "dropout": 0.05, "steps": 2, **fields})
    found, known = counted(job)
    predicted = memory.predict(job.recipe, describe("embedded"), **known)
    assert predicted.total == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("fields", [{"micro_batch": 4, "rank": 128}, {"micro_batch": 5, "rank": 256}])
def test_gradients_of_earlier_forwards_are_there(make_job, fields):
    job = make_job(model="embedded", **fields)
    found, known = counted(job)
    assert memory.predict(job.recipe, describe("embedded"), **known).total == pytest.approx(found, rel=0.03)


def test_they_are_there_in_the_rest_of_a_batch_too():
    shape = describe("embedded")
    linear = {name.replace("layers.0.", f"layers.{i}."): size
              for i in range(24) for name, size in shape.linear.items() if "layers.0." in name}  # fmt: skip
    deep = replace(shape, config=shape.config | {"num_hidden_layers": 24}, linear=linear)

    def peak(batch: int, micro: int) -> int:
        recipe = Recipe(batch_size=batch, micro_batch=micro, rank=256, dropout=0)
        return memory.predict(recipe, deep, tokens_per_row=60, response=6).total

    assert peak(9, 5) == peak(8, 4)  # four rows after others


@pytest.mark.parametrize("fields", [{}, {"bits": 4, "targets": "mlp"}, {"gradient_checkpointing": True, "rank": 32},
                                    {"adapter": "dora"}, {"adapter": "adalora"}, {"adapter": "full"}])  # fmt: skip
def test_it_holds_for_another_shape(make_job, fields):
    job = make_job(**fields, steps=2)
    found, known = counted(job)
    assert memory.predict(job.recipe, describe(job.recipe.model), **known).total == pytest.approx(found, rel=0.05)


def total(**fields) -> int:
    options = {name: fields.pop(name) for name in ("workers", "tokens_per_row", "response", "device") if name in fields}
    return memory.predict(Recipe(**fields), describe("embedded"), **{"tokens_per_row": 60, **options}).total


def test_what_needs_more_is_predicted_to_need_more():
    assert total(rank=4) < total(rank=64) < total(rank=128)
    assert total(batch_size=1) < total(batch_size=4) < total(batch_size=32)
    assert total(batch_size=32, micro_batch=1) < total(batch_size=32, micro_batch=8) < total(batch_size=32)
    assert total(tokens_per_row=20) < total(tokens_per_row=60)
    assert total(response=4) <= total(response=50)
    assert total(gradient_checkpointing=True) < total()
    assert total(bits=4) < total(bits=32) and total(bits=4) < total(bits=8)
    weights = [memory.predict(Recipe(bits=bits, precision="bf16"), describe("embedded")).weights for bits in (4, 8, 16, 32)]
    assert weights == sorted(weights)
    assert total(targets="attention") < total()
    assert total(dropout=0) < total(dropout=0.1, device="cuda") < total(dropout=0.1)


def test_workers_share_the_batch_and_with_zero_the_state():
    parts = [memory.predict(Recipe(batch_size=b, rank=64), describe("embedded"), workers=w) for b, w in ((32, 4), (8, 1))]
    assert parts[0].activations == parts[1].activations and parts[0].weights == parts[1].weights
    saved = [memory.predict(Recipe(zero_stage=s, rank=64), describe("embedded"), workers=4).adapters for s in (0, 1, 2)]
    assert saved == sorted(saved, reverse=True) and saved[1] < saved[0]


def test_at_stage_3_weights_are_shared_too_and_offload_empties_the_device():
    def parts(**fields) -> memory.Memory:
        return memory.predict(Recipe(adapter="full", **fields), describe("embedded"), workers=4)

    two, three = parts(zero_stage=2), parts(zero_stage=3)
    blocks = 2 * 4 * describe("embedded").linear_parameters / 3  # gathered
    assert three.weights == pytest.approx(two.weights / 4 + blocks, rel=0.01)
    assert parts(zero_stage=2, offload=True).adapters < two.adapters and parts(zero_stage=3, offload=True).weights < three.weights
    assert parts(zero_stage=3, offload=True).weights == pytest.approx(blocks, rel=0.01)


def test_a_row_is_never_longer_than_the_recipe_allows():
    assert total(max_length=32, tokens_per_row=500) == total(max_length=32, tokens_per_row=0) == total(tokens_per_row=32)


def test_moments_in_8_bits_are_a_quarter_and_what_may_be_paged_is_not_on_the_device():
    parts = {name: memory.predict(Recipe(adapter="full", optimizer=name), describe("embedded")).adapters
             for name in ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit")}  # fmt: skip
    parameters = describe("embedded").parameters
    assert parts["adamw"] - parts["adamw_8bit"] == pytest.approx(2 * parameters * (4 - 1 - 1 / 64), rel=0.01)
    assert parts["paged_adamw"] < parts["adamw"] and parts["paged_adamw_8bit"] < parts["adamw_8bit"]
