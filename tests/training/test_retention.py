"""General text is read and scored as plainly computed; a model that was tuned too hard knows it less well."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from training import loop, measure, retention
from training.errors import InputError
from training.model import load_model, load_tokenizer
from training.recipe import EvaluationConfig, Recipe

GENERAL = "embedded:general.jsonl"


def test_the_score_is_that_of_whole_texts_cut_at_their_end():
    recipe = Recipe()
    model, tokenizer = load_model(recipe), load_tokenizer(recipe)
    found = retention.score(model, GENERAL, tokenizer, max_length=24, batch_size=7)
    assert len(found["nll"]) == 200 == len(retention.read(GENERAL))
    for i in (0, 57):
        ids = tokenizer(retention.read(GENERAL)[i])["input_ids"][:24]
        with torch.no_grad():
            logits = model.eval()(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = -sum(logits[place - 1, ids[place]].item() for place in range(1, len(ids)))
        assert found["nll"][i] == pytest.approx(expected, abs=1e-3) and found["tokens"][i] == len(ids) - 1


def test_the_embedded_model_knows_its_general_text_and_forgets_it_when_it_is_tuned_too_hard(make_job, tmp_path):
    evaluation = EvaluationConfig(reports=1, rows=4, test_rows=8, retention=GENERAL)
    job = make_job(model="embedded", adapter="full", steps=10, learning_rate=2e-2, warmup=0, evaluation=evaluation,
                   output=str(tmp_path / "full"))  # fmt: skip
    outcome = loop.train(job)
    recipe = job.recipe.model_dump(mode="json")
    models = [{"who": who, "recipe": recipe, "checkpoint": folder} for who, folder in
              (("untuned", None), ("winner", outcome.checkpoint))]  # fmt: skip
    found = measure.compare(models, job.model_dump(mode="json"))
    json.dumps(found)
    base, tuned = (sum(m["retention"]["nll"]) / sum(m["retention"]["tokens"]) for m in found["models"])
    assert base < 1.0 < tuned  # below e: it was pretrained on text of this kind
    assert found["overlap"] == {"removed": 0, "left": 0}
    assert {len(values) for values in found["groups"].values()} == {8}
    assert all(set(m["metrics"]) >= {"perplexity", "rouge_l", "bleu", "accuracy_generated"} for m in found["models"])
    judged = measure.judge(models, job.model_dump(mode="json"))["models"]
    assert [m["retention"] for m in judged] == [m["retention"] for m in found["models"]]


def test_rows_on_two_sides_are_counted(make_job, tmp_path):
    job = make_job(evaluation=EvaluationConfig(test_rows=4))
    lines = Path(job.data.train).read_text() + Path(job.data.test).read_text().splitlines()[0] + "\n"
    (tmp_path / "train.jsonl").write_text(lines)
    data = job.data.model_copy(update={"train": str(tmp_path / "train.jsonl")})
    models = [{"who": "base", "recipe": job.recipe.model_dump(mode="json"), "checkpoint": None}]
    found = measure.compare(models, job.model_copy(update={"data": data}).model_dump(mode="json"))
    assert found["overlap"] == {"removed": 1, "left": 0}


def test_a_text_that_cannot_be_read_is_refused_where_it_was_named(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"words": "x"}\n')
    for name in (str(tmp_path / "bad.jsonl"), str(tmp_path / "gone.jsonl")):
        with pytest.raises(InputError, match="evaluation.retention"):
            retention.read(name)
