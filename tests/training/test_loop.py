"""One recipe, trained: what is learned does not depend on how it is cut, and every run ends in one of four ways."""

from __future__ import annotations

import math
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training import evaluate, loop, stability
from training.checkpoint import verify
from training.data import Tokenized, prepare, read
from training.errors import InputError
from training.loop import train
from training.model import describe, load_model, load_tokenizer
from training.recipe import EvaluationConfig, Limits, Recipe
from training.run import Run, scaler_of, set_up
from training.schedule import Plan, plan, rate, supervised
from training.world import World

# Plans


def lengths(*sizes: int) -> Tokenized:
    return Tokenized([[1] * size for size in sizes], [size // 2 for size in sizes])


@given(rows=st.integers(1, 40), batch=st.integers(1, 16), epochs=st.integers(1, 5), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_every_row_comes_once_per_epoch_in_full_batches(rows, batch, epochs, seed):
    found = plan(Recipe(batch_size=batch, epochs=epochs, seed=seed), lengths(*[4] * rows), workers=1)
    assert found.steps == max(1, round(epochs * rows / batch))
    assert len(found.order) >= found.steps * batch
    for start in range(0, len(found.order), rows):
        assert sorted(found.order[start : start + rows]) == list(range(rows))
    for step in range(found.steps):
        assert sum(map(len, found.micro_batches(step, 0, 1))) == batch


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_workers_share_every_step_without_overlap_and_in_equally_many_forwards(workers, micro, rows):
    found = plan(Recipe(batch_size=4 * workers, micro_batch=micro, steps=3), lengths(*[4] * rows), workers=workers)
    for step in range(3):
        parts = [found.micro_batches(step, rank, workers) for rank in range(workers)]
        assert len({len(part) for part in parts}) == 1 and all(len(chunk) <= micro for part in parts for chunk in part)
        whole = Counter(row for part in parts for chunk in part for row in chunk)
        assert whole == Counter(found.order[step * found.batch : (step + 1) * found.batch])


def test_the_length_is_in_steps_epochs_or_tokens():
    rows = lengths(*range(4, 24))
    assert plan(Recipe(batch_size=4, steps=7), rows, workers=1).steps == 7
    assert plan(Recipe(batch_size=4), rows, workers=1).steps == 5
    assert plan(Recipe(batch_size=4, epochs=1.5), rows, workers=1).steps == round(1.5 * 5)
    found = plan(Recipe(batch_size=4, tokens=1000), rows, workers=1)
    seen = [sum(len(rows.ids[r]) for r in found.order[: 4 * steps]) for steps in (found.steps - 1, found.steps)]
    assert seen[0] < 1000 <= seen[1]
    assert plan(Recipe(batch_size=4, tokens=1), rows, workers=1).steps == 1


def test_the_order_is_seeded():
    rows = lengths(*[4] * 50)
    orders = [plan(Recipe(seed=seed), rows, workers=1).order for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_a_batch_that_workers_cannot_share_is_refused():
    with pytest.raises(ValueError, match="multiple of the workers, got 6 and 4"):
        plan(Recipe(batch_size=6), lengths(4, 4), workers=4)


def test_the_supervised_tokens_of_a_step_are_those_of_its_responses():
    rows = lengths(10, 10, 10, 10, 4, 30)
    assert supervised(rows, Plan(3, 2, 2, [0, 1, 4, 5, 2, 3]), 1) == 2 + 15
    assert supervised(Tokenized([[1, 2, 3]], [0]), Plan(1, 1, 1, [0]), 0) == 2  # the first token is never predicted


# Rates


def test_cosine_min_ends_at_a_tenth_of_the_peak():
    recipe = Recipe(learning_rate=2.0, warmup=0.1, schedule="cosine_min")
    rates = [rate(recipe, step, 100) for step in range(101)]
    assert rates[9] == rates[10] == 2.0 and rates[100] == pytest.approx(0.2)
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert rates[55] == pytest.approx((2.0 + 0.2) / 2)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_rate_rises_to_its_peak_and_follows_its_schedule(schedule):
    recipe = Recipe(learning_rate=2.0, warmup=0.1, schedule=schedule)
    rates = [rate(recipe, step, 100) for step in range(100)]
    assert rates[:10] == [pytest.approx(0.2 * (step + 1)) for step in range(10)]
    assert rates[9] == rates[10] == 2.0
    if schedule == "constant":
        assert set(rates[9:]) == {2.0}
    else:
        assert all(a > b > 0 for a, b in zip(rates[10:], rates[11:], strict=False))
        assert rates[55] == pytest.approx(1.0)
        assert rates[99] < 0.03
        assert rate(recipe, 100, 100) == pytest.approx(0)


def test_without_warm_up_the_first_step_has_the_peak():
    assert rate(Recipe(learning_rate=2.0, warmup=0), 0, 10) == 2.0
    assert rate(Recipe(learning_rate=2.0, warmup=0.1), 0, 1) == 2.0


# Learning


def learner(job, rows: Tokenized):
    planned = plan(job.recipe, rows, workers=1)
    return set_up(job, describe(job.recipe.model), planned, World(), "cpu"), planned


def tokenized(job) -> Tokenized:
    return prepare(read(job.data), job.data, load_tokenizer(job.recipe), job.recipe.max_length).train


@pytest.mark.parametrize(
    ("bits", "precision"),
    [
        (32, "fp32"),
        (8, "fp32"),
        (4, "fp32"),
        (32, "bf16"),
        (16, "bf16"),
        (8, "bf16"),
        (4, "bf16"),
        (32, "fp16"),
        (8, "fp16"),
        (4, "fp16"),
    ],
)
def test_every_number_of_bits_really_learns(make_job, bits, precision):
    job = make_job(model="embedded", rank=16, bits=bits, precision=precision)
    rows = tokenized(job)
    run, planned = learner(job, rows)
    losses = [run.step(rows, planned.micro_batches(0, 0, 1), supervised(rows, planned, 0), 5e-3)[0] for _ in range(12)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("fields", [
    {"adapter": "dora"}, {"adapter": "dora", "bits": 4}, {"adapter": "dora", "precision": "bf16"}, {"lora_plus_ratio": 4},
    {"adapter": "full"}, {"adapter": "full", "bits": 16, "precision": "bf16"}, {"adapter": "full", "precision": "bf16"},
    {"adapter": "adalora", "steps": 40}, {"adapter": "adalora", "bits": 8, "steps": 40},
], ids=str)  # fmt: skip
def test_every_method_really_learns(make_job, fields):
    job = make_job(**{"model": "embedded", "rank": 16, "steps": 12} | fields)
    rows = tokenized(job)
    run, planned = learner(job, rows)
    losses = [run.step(rows, planned.micro_batches(0, 0, 1), supervised(rows, planned, 0), 5e-3)[0] for _ in range(planned.steps)]
    assert losses[-1] < 0.5 * losses[0]


def test_what_does_not_go_together_is_refused_before_anything_is_loaded(make_job):
    with pytest.raises(InputError, match="recipe.adapter: full trains the weights themselves, which 4 bits cannot hold"):
        train(make_job(model="nowhere", adapter="full", bits=4))


def test_training_lowers_the_loss_on_rows_that_were_not_trained_on(make_job):
    job = make_job(model="embedded", rank=16, batch_size=4, steps=12, evaluation=EvaluationConfig(reports=3))
    curve = []
    outcome = train(job, lambda progress: curve.append(progress))
    untuned = load_model(job.recipe)
    rows = prepare(read(job.data), job.data, load_tokenizer(job.recipe), job.recipe.max_length)
    before = evaluate.summary(evaluate.score_rows(untuned, rows.validation, rows, job))["loss"]
    assert outcome.loss < 0.9 * before
    assert outcome.ended == "complete" and outcome.share == 1.0 and outcome.reason == ""
    scored = [progress for progress in curve if "loss" in progress.metrics]
    assert [progress.step for progress in scored] == [4, 8, 12] and scored[-1].metrics["loss"] == outcome.loss
    assert curve[-1].share == 1.0 and curve[-1].tokens == outcome.tokens
    assert [progress.seconds for progress in curve] == sorted(progress.seconds for progress in curve)


def test_the_same_seed_gives_the_same_outcome_and_another_does_not(make_job):
    first, same, other = (train(make_job(dropout=0.1, seed=seed)) for seed in (3, 3, 4))
    assert (first.loss, first.scores, first.peak_bytes, first.tokens) == (same.loss, same.scores, same.peak_bytes, same.tokens)
    assert first.conditions["right"] == same.conditions["right"]
    assert first.loss != other.loss


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_how_a_batch_is_cut_into_forwards_does_not_matter(make_job, micro):
    whole, cut = train(make_job(steps=6)), train(make_job(steps=6, micro_batch=micro))
    assert cut.loss == pytest.approx(whole.loss, abs=1e-5)
    assert cut.peak_bytes < whole.peak_bytes and cut.conditions["micro_batch"] == micro


def test_the_gradient_is_of_the_mean_over_tokens_also_where_rows_differ_in_length(make_job):
    job = make_job(batch_size=3, micro_batch=1)
    rows = Tokenized([[5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15], [16, 17, 18, 19]], [2, 2, 0])
    run, _ = learner(job, rows)
    planned = Plan(1, 3, 1, [0, 1, 2])
    loss, norm = run.step(rows, planned.micro_batches(0, 0, 1), supervised(rows, planned, 0), 0.0)
    nll, tokens, _ = evaluate.response_scores(run.inner, rows.ids, rows.prompt_lengths, batch_size=3)
    assert tokens == [6, 1, 3] and loss == pytest.approx(sum(nll) / 10, abs=1e-5)
    assert run.step(rows, [[0, 1, 2]], 10, 0.0) == pytest.approx((loss, norm), rel=1e-4)


def test_checkpointing_gives_the_same_loss_for_fewer_bytes(make_job):
    plain, saving = train(make_job()), train(make_job(gradient_checkpointing=True))
    assert saving.loss == pytest.approx(plain.loss, abs=1e-6)
    assert saving.peak_bytes < 0.9 * plain.peak_bytes


def test_clipping_bounds_the_step_and_tells_the_whole_norm(make_job):
    job = make_job(clip=1e-9)
    rows = tokenized(job)
    run, planned = learner(job, rows)
    _, norm = run.step(rows, planned.micro_batches(0, 0, 1), supervised(rows, planned, 0), 0.0)
    assert norm > 1e-3
    _, same = run.step(rows, planned.micro_batches(0, 0, 1), supervised(rows, planned, 0), 0.0)
    assert same == pytest.approx(norm, rel=1e-5)


def test_a_gradient_that_is_not_finite_changes_no_weight(make_job):
    job = make_job()
    rows = tokenized(job)
    run, planned = learner(job, rows)
    before = [parameter.clone() for parameter in run.parameters]
    run.parameters[0].register_hook(lambda gradient: gradient * math.nan)
    _, norm = run.step(rows, planned.micro_batches(0, 0, 1), supervised(rows, planned, 0), 1.0)
    assert math.isnan(norm)
    assert all(torch.equal(a, b) for a, b in zip(before, run.parameters, strict=True))


def test_an_overflow_in_fp16_leaves_the_step_out_and_halves_the_scale(make_job):
    job = make_job(model="embedded", precision="fp16")
    rows = tokenized(job)
    run, planned = learner(job, rows)

    def step() -> float:
        return run.step(rows, planned.micro_batches(0, 0, 1), supervised(rows, planned, 0), 1e-2)[1]

    run.scaler = scaler_of(job.recipe, "cpu", start=2.0**8)
    assert 0 < step() < math.inf and run.done == 1 and run.scaler.get_scale() == 2.0**8
    before = [parameter.detach().clone() for parameter in run.parameters]
    run.scaler = scaler_of(job.recipe, "cpu", start=2.0**24)
    assert step() == 0.0 and run.done == 1  # nothing was done, and it counts for no divergence
    assert run.scaler.get_scale() == 2.0**23
    assert all(torch.equal(a, b) for a, b in zip(before, run.parameters, strict=True))
    for _ in range(20):
        step()
    assert run.done > 1 and 1 <= run.scaler.get_scale() < 2.0**16
    assert not any(torch.equal(a, b) for a, b in zip(before, run.parameters, strict=True))


def test_a_gradient_that_never_becomes_finite_in_fp16_has_diverged(make_job):
    job = make_job(precision="fp16")
    rows = tokenized(job)
    run, planned = learner(job, rows)
    run.parameters[0].register_hook(lambda gradient: gradient * math.nan)
    norms = [run.step(rows, planned.micro_batches(0, 0, 1), supervised(rows, planned, 0), 1e-2)[1] for _ in range(18)]
    assert norms[0] == 0.0 and math.isnan(norms[-1])


def test_the_scale_of_fp16_does_not_change_the_gradient(make_job):
    told = {}
    for start in (2.0**2, 2.0**9):
        job = make_job(model="embedded", precision="fp16")
        rows = tokenized(job)
        run, planned = learner(job, rows)
        run.scaler = scaler_of(job.recipe, "cpu", start=start)
        told[start] = run.step(rows, planned.micro_batches(0, 0, 1), supervised(rows, planned, 0), 0.0)
    assert told[2.0**2] == pytest.approx(told[2.0**9], rel=1e-2)


# Ends


def test_a_complete_run_keeps_its_adapter_and_says_under_what_conditions(make_job, tmp_path):
    outcome = train(make_job(output=str(tmp_path / "adapter")))
    assert outcome.checkpoint == str(tmp_path / "adapter")
    manifest = verify(outcome.checkpoint)
    assert manifest["tokens"] == outcome.tokens and manifest["recipe"]["rank"] == 4
    assert manifest["metrics"]["loss"] == outcome.loss
    assert outcome.conditions["workers"] == 1 and outcome.conditions["torch"] == torch.__version__
    assert len(outcome.conditions["right"]) == outcome.conditions["validation_rows"] == 16
    assert outcome.trainable == 4 * sum(a + b for a, b in describe(make_job().recipe.model).linear.values())


def test_a_run_that_is_told_to_stop_has_its_share_and_no_checkpoint(make_job, tmp_path):
    job = make_job(steps=8, output=str(tmp_path / "adapter"), evaluation=EvaluationConfig(reports=4))
    outcome = train(job, lambda progress: "not promising" if progress.step >= 2 else None)
    assert (outcome.ended, outcome.reason, outcome.share) == ("stopped", "not promising", 0.25)
    assert outcome.loss is not None and outcome.checkpoint is None and not list(tmp_path.iterdir())
    assert 0 < outcome.tokens < train(make_job(steps=8)).tokens


def test_a_stop_at_the_last_step_comes_too_late(make_job):
    assert train(make_job(), lambda progress: "late" if progress.step == progress.steps else None).ended == "complete"


@pytest.mark.parametrize("rate", [30.0, 1e4])
def test_a_far_too_large_rate_diverges_with_a_reason(make_job, tmp_path, rate):
    job = make_job(model="embedded", steps=40, learning_rate=rate, warmup=0, output=str(tmp_path / "adapter"))
    outcome = train(job)
    assert outcome.ended == "diverged" and ("loss" in outcome.reason or "gradient" in outcome.reason)
    assert 0 < outcome.share < 1 and outcome.checkpoint is None and not list(tmp_path.iterdir())


def test_a_validation_loss_that_is_not_finite_has_diverged(make_job, monkeypatch):
    monkeypatch.setattr(evaluate, "summary", lambda *scores: {"accuracy": 0.0, "loss": math.nan})
    outcome = train(make_job())
    assert outcome.ended == "diverged" and "validation loss became nan" in outcome.reason
    assert outcome.loss is None and outcome.scores == {}


def test_too_many_bytes_are_infeasible_before_the_first_step(make_job):
    reports = []
    outcome = train(make_job(limits=Limits(peak_bytes=100_000)), reports.append)
    assert outcome.ended == "infeasible" and outcome.reason.endswith("peak bytes are over the limit of 100,000")
    assert (outcome.share, outcome.tokens, outcome.seconds, reports) == (0.0, 0, 0.0, [])
    assert outcome.peak_bytes > 100_000


def test_too_many_seconds_are_infeasible(make_job, tmp_path):
    outcome = train(make_job(limits=Limits(seconds=1e-6), output=str(tmp_path / "adapter")))
    assert outcome.ended == "infeasible" and "seconds are over the limit" in outcome.reason
    assert outcome.checkpoint is None and outcome.share < 1


def fail_at(monkeypatch, call: int, error: BaseException) -> None:
    real, calls = Run.step, []

    def step(self, *args):
        calls.append(args)
        if len(calls) == call:
            raise error
        return real(self, *args)

    monkeypatch.setattr(Run, "step", step)


def caused() -> RuntimeError:
    error = RuntimeError("the engine failed")
    error.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    return error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nand more"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        caused(),
    ],
    ids=["gpu", "host", "allocator", "cause"],
)
@pytest.mark.parametrize(("call", "share"), [(1, 0.0), (5, 0.5)], ids=["in the probe", "in a step"])
def test_running_out_of_memory_is_infeasible(make_job, monkeypatch, error, call, share):
    fail_at(monkeypatch, call, error)
    outcome = train(make_job())
    assert (outcome.ended, outcome.share) == ("infeasible", share)
    assert outcome.reason.startswith(f"out of memory at step {int(share * 4)}: ") and "\n" not in outcome.reason


def test_what_is_broken_is_raised(make_job, monkeypatch):
    fail_at(monkeypatch, 4, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        train(make_job())


def test_seconds_are_of_the_steps_alone(make_job, monkeypatch):
    real = loop.scored

    def slow(*args):
        time.sleep(0.5)
        return real(*args)

    monkeypatch.setattr(loop, "scored", slow)
    before = time.perf_counter()
    outcome = train(make_job(), lambda progress: time.sleep(0.2))
    assert 0 < outcome.seconds <= time.perf_counter() - before - 2 * 0.5 - 2 * 0.2


def test_zero_alone_is_refused_with_the_reason(make_job):
    with pytest.raises(InputError, match="recipe.zero_stage: ZeRO shares state among workers, and this process is alone"):
        train(make_job(zero_stage=1))


def test_rows_that_are_cut_are_counted(make_job):
    outcome = train(make_job(max_length=24, steps=1))
    assert outcome.conditions["cut_rows"] == 48


def test_divergence_is_decided_elsewhere(make_job, monkeypatch):
    monkeypatch.setattr(stability, "diverged", lambda watch, loss, norm: "because")
    outcome = train(make_job())
    assert (outcome.ended, outcome.reason, outcome.share) == ("diverged", "because", 0.25)


def test_the_cache_is_written_once_and_changes_nothing(make_job, tmp_path):
    job = make_job(steps=1, cache=str(tmp_path / "cache"))
    first, again = train(job), train(job)
    assert first.loss == again.loss and len(list(Path(job.cache).iterdir())) == 1
