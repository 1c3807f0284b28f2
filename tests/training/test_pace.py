"""Seconds are predicted from counted operations, and the stated error is kept."""

from __future__ import annotations

import random

import pytest
from torch.utils.flop_counter import FlopCounterMode

from training import pace, schedule, simulate
from training.data import prepare, read
from training.model import describe, load_tokenizer
from training.pace import WIDE, Rows, count, fit, steps_of
from training.recipe import Job, Recipe
from training.run import set_up
from training.world import World

ROWS = Rows(1000, 60_000)
SHAPE = describe("embedded")


def drawn(rng: random.Random, **fixed) -> Recipe:
    """A recipe of a space like those that ship."""
    fields = {"rank": rng.choice([4, 16, 64]), "batch_size": rng.choice([4, 8, 16, 32]), "epochs": rng.choice([1, 2, 3]),
              "bits": rng.choice([32, 4]), "gradient_checkpointing": rng.random() < 0.5,
              "learning_rate": 10 ** rng.uniform(-4, -2)}  # fmt: skip
    return Recipe(**fields | fixed)


def seconds_of(recipe: Recipe, noise: float, rng: random.Random) -> float:
    """A machine with rates of its own: operations, quantized ones, calls, updates, and a disturbance."""
    rates = (2e-11, 1e-11, 3e-4, 1e-9)
    return sum(r * c for r, c in zip(rates, count(recipe, SHAPE, ROWS).values, strict=True)) * rng.lognormvariate(0, noise)


def test_rates_are_found_exactly_where_nothing_disturbs():
    rng = random.Random(0)
    recipes = [drawn(rng) for _ in range(12)]
    found = fit([(count(r, SHAPE, ROWS), seconds_of(r, 0, rng)) for r in recipes])
    for recipe in (drawn(rng) for _ in range(50)):
        assert found.predict(count(recipe, SHAPE, ROWS)).seconds == pytest.approx(seconds_of(recipe, 0, rng), rel=0.02)
    assert found.error == pace.LEAST


@pytest.mark.parametrize("known", [4, 8, 30])
@pytest.mark.parametrize("noise", [0.03, 0.1])
def test_the_truth_lies_in_the_stated_band_most_of_the_time(known, noise):
    inside = total = 0
    for seed in range(10):
        rng = random.Random(seed)
        found = fit([(count(r, SHAPE, ROWS), seconds_of(r, noise, rng)) for r in (drawn(rng) for _ in range(known))])
        for recipe in (drawn(rng) for _ in range(30)):
            said, truth = found.predict(count(recipe, SHAPE, ROWS)), seconds_of(recipe, noise, rng)
            inside, total = inside + (said.low <= truth <= said.high), total + 1
    assert inside / total > 0.85
    if known == 30:
        assert found.error < 5 * noise  # and the band is no excuse


def test_simulated_trials_predict_each_other():
    def run(rng: random.Random) -> tuple:
        recipe = drawn(rng)
        outcome = simulate.train(Job(recipe=recipe, data={"train": "none"}), lambda progress: None)
        return count(recipe, None, ROWS).times(outcome.share), outcome.seconds

    inside, errors = [], []
    for seed in range(10):
        rng = random.Random(seed)
        found = fit([run(rng) for _ in range(10)])
        inside += [found.predict(c).low <= s <= found.predict(c).high for c, s in (run(rng) for _ in range(30))]
        errors.append(found.error)
    assert sum(inside) / len(inside) > 0.85 and sorted(errors)[5] < 0.2


def test_of_what_was_never_run_little_is_claimed():
    rng = random.Random(2)
    dense = [drawn(rng, bits=32) for _ in range(8)]
    found = fit([(count(r, SHAPE, ROWS), seconds_of(r, 0.01, rng)) for r in dense])
    assert found.predict(count(Recipe(), SHAPE, ROWS)).error < 0.2
    assert found.predict(count(Recipe(bits=4), SHAPE, ROWS)).error >= WIDE
    assert fit([]) is None and fit([(count(Recipe(), SHAPE, ROWS), 3.0)]).error == WIDE


@pytest.mark.parametrize("fields", [{"epochs": 1}, {"epochs": 2.5, "batch_size": 16}, {"steps": 7}, {"tokens": 900}])
def test_steps_are_those_of_the_plan(make_job, fields):
    job = make_job(model="embedded", **fields)
    rows = prepare(read(job.data), job.data, load_tokenizer(job.recipe), job.recipe.max_length).train
    told = Rows(len(rows), sum(len(ids) for ids in rows.ids))
    assert steps_of(job.recipe, told) == pytest.approx(schedule.plan(job.recipe, rows, workers=1).steps, abs=1)


@pytest.mark.parametrize("fields", [{}, {"rank": 64}, {"adapter": "full"}, {"gradient_checkpointing": True}], ids=str)
def test_operations_are_those_that_torch_counts(make_job, fields):
    job = make_job(**{"model": "embedded", "rank": 16, "steps": 1, "batch_size": 8, "micro_batch": 8, **fields})
    rows = prepare(read(job.data), job.data, load_tokenizer(job.recipe), job.recipe.max_length).train
    planned = schedule.plan(job.recipe, rows, workers=1)
    run = set_up(job, SHAPE, planned, World(), "cpu")
    chunks = planned.micro_batches(0, 0, 1)
    tokens, answers = sum(len(rows.ids[r]) for r in chunks[0]), schedule.supervised(rows, planned, 0)
    with FlopCounterMode(display=False) as counter:
        run.step(rows, chunks, answers, 1e-3)
    told = count(job.recipe, SHAPE, Rows(len(chunks[0]), tokens), response=answers / tokens)
    assert told.operations == pytest.approx(counter.get_total_flops(), rel=0.2)


def test_workers_share_the_work():
    one, four = (count(Recipe(batch_size=32), SHAPE, ROWS, workers=n) for n in (1, 4))
    assert four.operations == pytest.approx(one.operations / 4) and four.updates == one.updates
    assert count(Recipe(batch_size=32, micro_batch=1), SHAPE, ROWS).calls == pytest.approx(32 * one.calls)
