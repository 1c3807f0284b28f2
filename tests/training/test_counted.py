"""Seconds that are counted from operations repeat to the digit and follow from the recipe alone."""

from __future__ import annotations

import pytest

from training.loop import train
from training.meter import Counted, operations
from training.model import describe
from training.recipe import EvaluationConfig, Recipe

COUNTED = EvaluationConfig(reports=2, timing="counted")


def test_counted_seconds_repeat_to_the_digit_however_the_batch_is_cut(make_job):
    seen = []
    first = train(make_job(evaluation=COUNTED), lambda p: seen.append(p.seconds))
    again = train(make_job(evaluation=COUNTED), lambda p: None)
    cut = train(make_job(evaluation=COUNTED, micro_batch=2), lambda p: None)
    assert first.seconds == again.seconds == cut.seconds > 0
    assert (first.loss, first.scores, first.peak_bytes) == (again.loss, again.scores, again.peak_bytes)
    assert seen[-1] == first.seconds and seen[0] == pytest.approx(first.seconds / 4, rel=0.2)


def test_operations_grow_with_tokens_what_is_trained_and_checkpointing_and_attention_with_the_square(llama):
    shape = describe(llama)
    weights = shape.linear_parameters + shape.vocabulary * shape.hidden
    plain = operations(Recipe(), shape, 1000, [10])
    assert plain == 10 * (4 * weights + 2 * 1000) + 6 * shape.layers * shape.hidden * 100
    assert operations(Recipe(), shape, 1000, [10, 10]) == 2 * plain
    assert operations(Recipe(), shape, 1000, [20]) > 2 * plain
    assert operations(Recipe(gradient_checkpointing=True), shape, 1000, [10]) > 1.4 * plain
    watch = Counted()
    watch.start()
    watch.count(2e11)
    assert (watch.stop(), watch.seconds) == (0.0, 2.0)
