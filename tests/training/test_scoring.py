"""Scores inside a run: they change nothing of it, and a user's own metric, task and method take part like those that ship."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from training import checkpoint, loop, measure, own
from training.adapters import ADAPTERS, Method
from training.errors import InputError
from training.model import load_model
from training.recipe import EvaluationConfig, Recipe
from training.tasks import Task, exactly

HERE = Path(__file__).stem


def chatty(answer: str, expected: str, prompt: str) -> float:
    assert prompt.endswith("Answer:") and expected.count("|") == 1
    return len(answer)


def first_half(model, rows, *, batch_size, labels=()):
    found = exactly(model, rows, batch_size=batch_size)
    return found | {"short": [float(n < 6) for n in found["tokens"]]}


REQUESTS = Task(
    COLUMNS={"asked": ("instruction",), "note": ("response",)}, TEMPLATE="{asked}\nAnswer:", RESPONSE="note", SCORES=("short",),
    score=first_half,
)  # fmt: skip


def biases(model, recipe, modules, steps):
    """Trains the norms alone: a method that adds no adapter."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    return model


NORMS = Method(biases)


def adapter(outcome) -> dict:
    return load_file(Path(outcome.checkpoint) / "adapter_model.safetensors")


def test_how_often_and_by_what_a_run_is_scored_changes_no_bit_of_what_it_learns(make_job, tmp_path):
    # Dropout draws random numbers at every step: scoring must neither draw from them nor leave dropout off.
    seen = []
    for reports, metrics in ((1, ()), (4, ()), (4, ("perplexity", "rouge_l"))):
        job = make_job(dropout=0.2, steps=8, output=str(tmp_path / str(len(seen))),
                       evaluation=EvaluationConfig(reports=reports, metrics=metrics))  # fmt: skip
        seen.append(loop.train(job))
    once, often, more = map(adapter, seen)
    assert all(often[name].equal(tensor) and more[name].equal(tensor) for name, tensor in once.items())
    assert set(seen[0].scores) == {"accuracy"} and set(seen[2].scores) == {"accuracy", "perplexity", "rouge_l"}
    assert seen[0].loss == seen[2].loss


def test_metrics_are_on_the_curve_and_in_the_outcome(make_job):
    curve = []
    job = make_job(model="embedded", steps=8, evaluation=EvaluationConfig(
        reports=2, metrics=("perplexity_response", "f1", "bleu", f"{HERE}:chatty"), answers=6))  # fmt: skip
    outcome = loop.train(job, lambda progress: curve.append(progress.metrics))
    scored = [metrics for metrics in curve if "loss" in metrics]
    assert len(scored) == 2 and all(set(metrics) == {"train_loss", "loss", *outcome.scores} for metrics in scored)
    assert outcome.scores["perplexity_response"] == pytest.approx(math.exp(outcome.loss))
    assert {"accuracy", "f1", "bleu", "chatty"} < set(outcome.scores) and outcome.scores["chatty"] > 1


def test_a_task_of_ones_own_reads_its_columns_and_adds_its_scores(make_job):
    job, plain = make_job(), loop.train(make_job())
    outcome = loop.train(job.model_copy(update={"data": job.data.model_copy(update={"task": f"{HERE}:REQUESTS"})}))
    assert outcome.loss == plain.loss  # the same rows under other names
    assert set(outcome.scores) == {"accuracy", "short"} and 0 < outcome.scores["short"] <= 1


def test_a_task_that_lacks_something_is_refused(make_job):
    data = make_job().data
    for task, said in ((object(), "lacks COLUMNS"), (dataclasses.replace(REQUESTS, RESPONSE="x"), "none of its COLUMNS")):
        with own.given({"odd": task}), pytest.raises(InputError, match=said):
            loop.train(make_job(data=data.model_copy(update={"task": "given:odd"})))


def test_a_method_of_ones_own_trains_is_kept_and_compared(make_job, tmp_path):
    job = make_job(model="embedded", adapter=f"{HERE}:NORMS", steps=8, learning_rate=3e-2, output=str(tmp_path / "kept"),
                   evaluation=EvaluationConfig(reports=1, test_rows=8))  # fmt: skip
    outcome = loop.train(job)
    untuned = load_model(Recipe())
    norms = sum(p.numel() for name, p in untuned.named_parameters() if "norm" in name)
    assert outcome.ended == "complete" and outcome.trainable == norms
    kept = checkpoint.load_adapter(untuned, outcome.checkpoint)
    changed = {name for (name, a), b in zip(untuned.named_parameters(), kept.parameters(), strict=True) if not a.equal(b)}
    assert changed and all("norm" in name for name in changed)
    recipe = job.recipe.model_dump(mode="json")
    models = [{"who": "base", "recipe": recipe, "checkpoint": None}, {"who": "own", "recipe": recipe,
              "checkpoint": outcome.checkpoint}]  # fmt: skip
    base, tuned = measure.judge(models, job.model_dump(mode="json"))["models"]
    assert sum(tuned["nll"]) < sum(base["nll"])


def test_a_new_method_is_one_entry(make_job, monkeypatch):
    monkeypatch.setitem(ADAPTERS, "norms", NORMS)
    assert loop.train(make_job(adapter="norms")).ended == "complete"


def test_what_is_no_method_is_refused(make_job):
    with pytest.raises(InputError, match="must be a Method, got function"):
        loop.train(make_job(adapter=f"{HERE}:chatty"))
