"""Recipes timed alone; models compared on rows that nobody trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from training import loop, measure
from training.recipe import EvaluationConfig


def test_a_recipe_is_timed_alone_and_scaled_to_its_whole_length(make_job):
    jobs = [make_job(steps=steps).model_dump(mode="json") for steps in (2, 40)]
    short, long = measure.time_alone(jobs, repeats=3, steps=2)
    json.dumps([short, long])
    for found in (short, long):
        assert 0 < found["low"] <= found["seconds"] <= found["high"] and found["repeats"] == 3
    assert long["seconds"] > 3 * short["seconds"]  # 20 times the steps


def test_models_are_compared_row_by_row(make_job, tmp_path):
    job = make_job(model="embedded", rank=16, steps=12, output=str(tmp_path / "adapter"),
                   evaluation=EvaluationConfig(reports=1, test_rows=10))  # fmt: skip
    outcome = loop.train(job)
    recipe = job.recipe.model_dump(mode="json")
    models = [
        {"who": "base", "recipe": recipe, "checkpoint": None},
        {"who": "tuned", "recipe": recipe, "checkpoint": outcome.checkpoint},
    ]
    found = measure.compare(models, job.model_dump(mode="json"), shown=6)
    json.dumps(found)
    base, tuned = found["models"]
    assert [base["who"], tuned["who"]] == ["base", "tuned"]
    assert len(base["right"]) == len(tuned["right"]) == 10 and base["tokens"] == tuned["tokens"]
    assert sum(tuned["nll"]) < sum(base["nll"])
    assert len(found["rows"]) == 6 and all(set(row) == {"prompt", "expected", "base", "tuned"} for row in found["rows"])
    expected = {json.loads(line)["response"] for line in Path(job.data.test).read_text().splitlines()}
    assert all(row["expected"] in expected for row in found["rows"])
    assert found["machine"]["gemm_seconds"] > 0


def test_a_comparison_on_all_rows_of_the_cache_is_json(make_job, tmp_path):
    job = make_job(model="embedded", steps=1, cache=str(tmp_path / "cache"))
    models = [{"who": "base", "recipe": job.recipe.model_dump(mode="json"), "checkpoint": None}]
    found = json.loads(json.dumps(measure.compare(models, job.model_dump(mode="json"), shown=2)))
    assert len(found["groups"]["tokens of the prompt"]) == len(found["models"][0]["right"])


def test_judging_gives_the_scores_of_the_comparison_and_no_answers(make_job, tmp_path):
    job = make_job(steps=2, output=str(tmp_path / "adapter"), evaluation=EvaluationConfig(reports=1, test_rows=6))
    outcome = loop.train(job)
    recipe = job.recipe.model_dump(mode="json")
    models = [
        {"who": "base", "recipe": recipe, "checkpoint": None},
        {"who": "tuned", "recipe": recipe, "checkpoint": outcome.checkpoint},
    ]
    found = measure.judge(models, job.model_dump(mode="json"))
    json.dumps(found)
    compared = measure.compare(models, job.model_dump(mode="json"))["models"]
    assert found["models"] == [{name: value for name, value in m.items() if name != "metrics"} for m in compared]
    assert set(found) == {"models", "machine"} and set(found["models"][0]) == {"who", "right", "nll", "tokens", "retention"}


def test_regressions_are_shown_first_and_gains_do_not_push_out_the_rest():
    winner = [1.0] * 20 + [0.0] * 2 + [0.0] * 2 + [1.0] * 2
    other = [0.0] * 20 + [1.0] * 2 + [0.0] * 2 + [1.0] * 2
    order = measure._telling(winner, other)
    assert order[:2] == [20, 21] and order[2:10] == list(range(8))
    assert order[10:14] == [22, 23, 24, 25] and sorted(order) == list(range(26))


def test_the_base_alone_can_be_scored(make_job):
    job = make_job(evaluation=EvaluationConfig(test_rows=4))
    models = [{"who": "base", "recipe": job.recipe.model_dump(mode="json"), "checkpoint": None}]
    found = measure.compare(models, job.model_dump(mode="json"))
    assert len(found["models"][0]["right"]) == len(found["rows"]) == 4


def test_a_changed_checkpoint_is_not_compared(make_job, tmp_path):
    job = make_job(steps=1, output=str(tmp_path / "adapter"))
    folder = loop.train(job).checkpoint
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(Exception, match="SHA-256 differs"):
        measure.compare(
            [{"who": "x", "recipe": job.recipe.model_dump(mode="json"), "checkpoint": folder}], job.model_dump(mode="json")
        )
