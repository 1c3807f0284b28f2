"""Recipes are bounded, closed, frozen and the same in JSON; mistakes can cross process borders."""

from __future__ import annotations

import json
import math
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from training.errors import InputError, Problem, wrong
from training.recipe import DataConfig, Job, Limits, Outcome, Progress, Recipe, Resources

BAD = [
    ("rank", 0), ("rank", 4097), ("rank", 1.5), ("alpha", 0), ("alpha", -1), ("dropout", 1), ("dropout", -0.1),
    ("learning_rate", 0), ("learning_rate", 1e5), ("warmup", 1), ("weight_decay", -1), ("clip", 0), ("batch_size", 0),
    ("micro_batch", 0), ("epochs", 0), ("steps", 0), ("tokens", 0), ("max_length", 7), ("seed", -1), ("seed", 2**31),
    ("bits", 5), ("zero_stage", 4), ("precision", "fp64"), ("schedule", "step"), ("adapter", "qlora"), ("optimizer", "sgd"),
    ("model", ""), ("gradient_checkpointing", "yes"), ("gradient_checkpointing", 1),
    ("offload", 1),
]  # fmt: skip
NUMBERS = ["rank", "alpha", "dropout", "learning_rate", "warmup", "weight_decay", "clip", "batch_size", "micro_batch", "epochs",
           "steps", "tokens", "max_length", "seed"]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD)
def test_out_of_bounds_is_refused(name, value):
    with pytest.raises(ValidationError) as caught:
        Recipe(**{name: value})
    assert caught.value.errors()[0]["loc"] == (name,)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, False])
def test_nan_infinity_and_booleans_are_no_numbers(name, value):
    with pytest.raises(ValidationError):
        Recipe(**{name: value})


@pytest.mark.parametrize("two", [("epochs", "steps"), ("steps", "tokens"), ("epochs", "tokens")])
def test_only_one_length_is_allowed(two):
    with pytest.raises(ValidationError, match="give one of epochs, steps and tokens"):
        Recipe(**dict.fromkeys(two, 2))


def test_a_base_in_16_bits_needs_bf16():
    with pytest.raises(ValidationError, match="needs precision: bf16"):
        Recipe(bits=16)
    assert Recipe(bits=16, precision="bf16").bits == 16


def test_records_are_frozen_and_closed():
    with pytest.raises(ValidationError, match="frozen"):
        Recipe().rank = 3
    with pytest.raises(ValidationError, match="Extra inputs"):
        Recipe(learning_rat=1e-3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Resources(workers=0),
        lambda: Limits(seconds=0),
        lambda: Limits(peak_bytes=True),
        lambda: Outcome(loss=math.nan),
        lambda: Progress(step=1, steps=2, tokens=3, share=0.5, seconds=1, metrics={"loss": math.inf}),
        lambda: DataConfig(train="x", separator=""),
    ],
)
def test_other_records_are_bounded_too(make):
    with pytest.raises(ValidationError):
        make()


recipes = st.builds(
    Recipe,
    model=st.text(min_size=1, max_size=20),
    revision=st.none() | st.text(max_size=9),
    adapter=st.sampled_from(["lora", "rslora"]),
    rank=st.integers(1, 4096),
    alpha=st.floats(0, 65536, exclude_min=True),
    dropout=st.floats(0, 1, exclude_max=True),
    targets=st.just("mlp") | st.lists(st.text(max_size=9), max_size=3).map(tuple),
    learning_rate=st.floats(0, 1e4, exclude_min=True),
    warmup=st.floats(0, 1, exclude_max=True),
    batch_size=st.integers(1, 65536),
    micro_batch=st.none() | st.integers(1, 64),
    steps=st.none() | st.integers(1, 10**9),
    precision=st.just("bf16"),
    bits=st.sampled_from([4, 8, 16, 32]),
    gradient_checkpointing=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)


@given(recipes)
@settings(max_examples=60, deadline=None)
def test_json_brings_back_the_same_recipe(recipe):
    text = recipe.model_dump_json()
    assert Recipe.model_validate_json(text) == recipe
    assert Recipe.model_validate(json.loads(text)) == recipe
    job = Job(recipe=recipe, data=DataConfig(train="x", columns={"text": "q"}, labels=("a", "b")))
    assert Job.model_validate_json(job.model_dump_json()) == job


def test_a_mistake_is_picklable_and_says_where_rule_and_remedy():
    error = InputError(Problem("a.b", "must be low.", "Lower it."), Problem("c", "is missing."))
    again = pickle.loads(pickle.dumps(error))
    assert again.problems == error.problems
    assert str(again) == "a.b: must be low. Lower it.\nc: is missing."
    assert str(wrong("x", "is bad.")) == "x: is bad."
