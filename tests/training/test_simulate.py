"""The stand-in keeps the signature and the promises of the real loop."""

from __future__ import annotations

import pytest

from training.recipe import DataConfig, EvaluationConfig, Job, Limits, Recipe
from training.simulate import train


def job(limits: Limits | None = None, **recipe) -> Job:
    return Job(recipe=Recipe(**{"learning_rate": 2e-3, **recipe}), data=DataConfig(train="x"), limits=limits or Limits(),
               evaluation=EvaluationConfig(reports=5))  # fmt: skip


def go_on(progress):
    return None


def test_the_same_recipe_gives_the_same_outcome():
    assert train(job(rank=8), go_on) == train(job(rank=8), go_on)
    assert train(job(rank=8), go_on) != train(job(rank=8, seed=1), go_on)


def test_it_reports_its_own_length_in_order():
    seen = []
    outcome = train(job(), seen.append)
    assert [p.share for p in seen] == [pytest.approx((i + 1) / 5) for i in range(5)]
    assert outcome.ended == "complete" and outcome.share == 1 and 0 < outcome.scores["accuracy"] < 1
    assert seen[-1].metrics["accuracy"] == pytest.approx(outcome.scores["accuracy"])
    assert seen[-1].seconds == pytest.approx(outcome.seconds)


def test_it_ends_early_as_the_loop_does():
    stopped = train(job(), lambda p: "enough" if p.step == 2 else None)
    assert (stopped.ended, stopped.reason, stopped.share) == ("stopped", "enough", pytest.approx(0.4))
    assert train(job(), lambda p: "late" if p.step == p.steps else None).ended == "complete"
    assert train(job(learning_rate=1.0), go_on).ended == "diverged"
    refused = train(job(Limits(peak_bytes=10)), go_on)
    assert refused.ended == "infeasible" and "limit of 10" in refused.reason and refused.share == 0


def test_the_objectives_conflict():
    short, long = train(job(epochs=1), go_on), train(job(epochs=3), go_on)
    assert long.scores["accuracy"] > short.scores["accuracy"] and long.seconds > short.seconds
    plain, saving = train(job(), go_on), train(job(gradient_checkpointing=True), go_on)
    assert saving.peak_bytes < plain.peak_bytes and saving.seconds > plain.seconds
