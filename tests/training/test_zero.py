"""DeepSpeed's configuration follows the recipe."""

from __future__ import annotations

import json

import pytest

from training import zero
from training.recipe import Recipe


@pytest.mark.parametrize("stage", [1, 2])
def test_the_configuration_says_what_the_recipe_says(stage):
    found = zero.config(Recipe(zero_stage=stage, clip=0.3), workers=4, micro_batch=2, accumulation=8, trainable=9)
    assert found["zero_optimization"]["stage"] == stage
    assert found["gradient_clipping"] == 0.3
    assert found["train_micro_batch_size_per_gpu"] == 2 and found["gradient_accumulation_steps"] == 8
    assert found["train_batch_size"] == 2 * 8 * 4  # DeepSpeed refuses any other product
    json.dumps(found)


def test_precision_stays_with_autocast_and_the_optimizer_with_us():
    found = zero.config(Recipe(zero_stage=2, precision="bf16"), workers=1, micro_batch=1, accumulation=1, trainable=9)
    assert found["bf16"] == {"enabled": False}
    assert "optimizer" not in found and "scheduler" not in found and found["zero_allow_untested_optimizer"]


def test_no_buffer_is_larger_than_what_is_trained():
    def bucket(trainable: int) -> int:
        found = zero.config(Recipe(zero_stage=2), workers=2, micro_batch=1, accumulation=1, trainable=trainable)
        return found["zero_optimization"]["reduce_bucket_size"]

    assert bucket(1000) == 1000 and bucket(10**9) == zero.BUCKET
