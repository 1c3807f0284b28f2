"""DeepSpeed's configuration follows the recipe."""

from __future__ import annotations

import json

import pytest

from training import zero
from training.recipe import Recipe, Resources, clashes


@pytest.mark.parametrize("stage", [1, 2, 3])
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


def settings(**fields) -> dict:
    found = zero.config(Recipe(**fields), workers=2, micro_batch=1, accumulation=1, trainable=9, hidden=64, block=5000)
    return found["zero_optimization"]


def test_optimizer_state_goes_to_the_host_where_asked_and_weights_at_stage_3():
    assert not {"offload_optimizer", "offload_param"} & set(settings(zero_stage=3))
    for stage in (1, 2, 3):
        found = settings(zero_stage=stage, offload=True)
        assert found["offload_optimizer"]["device"] == "cpu"
        assert ("offload_param" in found) == (stage == 3)


def test_stage_3_gathers_two_blocks_at_most():
    found = settings(zero_stage=3)
    assert (found["stage3_max_live_parameters"], found["stage3_max_reuse_distance"]) == (10_000, 0)


@pytest.mark.parametrize(
    ("fields", "where", "said"),
    [
        ({"zero_stage": 3, "bits": 4}, "zero_stage", "scales of 4 bits are no weights"),
        ({"zero_stage": 3, "bits": 8}, "zero_stage", "scales of 8 bits"),
        ({"zero_stage": 3, "adapter": "adalora"}, "adapter", "one process"),
        ({"zero_stage": 3, "precision": "fp16"}, "precision", "scaled loss"),
        ({"zero_stage": 2, "adapter": "full", "bits": 4}, "adapter", "4 bits cannot hold"),
        ({"offload": True}, "offload", "zero_stage is 0"),
        ({"zero_stage": 2, "offload": True}, "offload", "there is no GPU"),
        ({"zero_stage": 2, "offload": True, "optimizer": "adamw_8bit"}, "offload", "optimizer is adamw_8bit"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_reason(fields, where, said):
    found = [(name, rule, remedy) for name, rule, remedy in clashes(Recipe(**fields), Resources(workers=2)) if said in rule]
    assert [(name, bool(remedy)) for name, _, remedy in found] == [(where, True)]


@pytest.mark.parametrize("fields", [{"zero_stage": 3}, {"zero_stage": 3, "adapter": "full"}, {"zero_stage": 3, "adapter": "dora"},
                                    {"zero_stage": 2, "bits": 4}])  # fmt: skip
def test_what_goes_together_is_not_refused(fields):
    assert clashes(Recipe(**fields), Resources(workers=2)) == []
    assert clashes(Recipe(zero_stage=3, offload=True), Resources(workers=2, gpus=1)) == []
