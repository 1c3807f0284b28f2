"""What counts as diverged."""

from __future__ import annotations

import math

import pytest

from training.stability import PATIENCE, Watch, diverged


def watch(*losses: float) -> Watch:
    seen = Watch()
    for loss in losses:
        seen = seen.see(loss)
    return seen


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_has_diverged_at_once(loss):
    assert "loss became" in diverged(watch(2.0), loss, 1.0)


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_has_diverged(norm):
    assert "gradient" in diverged(watch(2.0), 2.0, norm)


def test_a_mean_far_above_the_untuned_loss_has_diverged():
    assert diverged(watch(2.0, *[9.0] * 20), 9.0, 1.0) == "the training loss rose from 2.00 to 8.92 nats per token by step 21"


@pytest.mark.parametrize(
    "losses",
    [
        [2.0, *[50.0] * (PATIENCE - 2)],  # too early to say
        [2.0, 2.0, 2.0, 2.0, 2.0, 7.0],  # one spike
        [2.0, *[3.9] * 50],  # worse, but below 1.5 times and one more
        [3.0, 2.5, 2.0, 1.5, 1.0, 0.5],
        [0.001, *[0.5] * 50],  # a tiny loss may grow many times over
    ],
)
def test_the_rest_has_not(losses):
    assert diverged(watch(*losses), losses[-1], 1.0) is None


def test_a_watch_is_never_changed():
    first = watch(1.0)
    first.see(5.0)
    assert (first.first, first.mean, first.steps) == (1.0, 1.0, 1)
