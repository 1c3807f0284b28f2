"""The final retrain: within the memory that there is, and of a trial whose adapter was deleted."""

from __future__ import annotations

import pytest
import torch

import hpo
from hpo.promote import train_within_memory
from training.loop import train
from training.recipe import DataConfig, EvaluationConfig, Job, Recipe
from training.run import Run

DATA = {"train": "embedded:train.jsonl", "validation": "embedded:validation.jsonl", "test": "embedded:test.jsonl",
        "template": "{instruction}\nAnswer:"}  # fmt: skip


def test_where_memory_runs_out_the_micro_batch_is_halved_and_the_batch_and_the_result_stay(monkeypatch, tmp_path):
    recipe = Recipe(max_length=128, steps=6, batch_size=8, dropout=0)
    job = Job(recipe=recipe, data=DataConfig(**DATA), evaluation=EvaluationConfig(rows=8, reports=1), interventions=True,
              resume=str(tmp_path / "running"))  # fmt: skip
    whole, real = train(job.model_copy(update={"resume": None})), Run.step

    def step(self, rows, chunks, *args):
        if max(map(len, chunks)) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return real(self, rows, chunks, *args)

    monkeypatch.setattr(Run, "step", step)
    outcome, interventions = train_within_memory(job, train)
    assert [one["values"]["micro_batch"] for one in interventions] == [[8, 4], [4, 2]]
    assert all("out of memory" in one["why"] for one in interventions)
    assert outcome.ended == "complete" and outcome.conditions["micro_batch"] == 2
    assert outcome.loss == pytest.approx(whole.loss, abs=1e-5) and outcome.tokens == whole.tokens


def test_a_trial_whose_adapter_was_deleted_is_promoted_by_its_retraining(tmp_path):
    study = hpo.run({
        "name": "small", "storage": str(tmp_path), "recipe": {"max_length": 128, "steps": 40, "learning_rate": 0.01},
        "data": DATA, "evaluation": {"rows": 16, "test_rows": 40, "reports": 1}, "space": {"rank": [8, 16]},
        "algorithm": "random", "budget": {"trials": 1}, "resources": {"mode": "local"}, "keep": "none", "certify": {"extra": 0},
    })  # fmt: skip
    assert study.winner().outcome.checkpoint is None and study.certificate.scores, "it was compared before it was deleted"
    model = study.promote()
    assert model.kept == "retrained" and "the trial's own was deleted (keep: none)" in model.why and model.interventions == ()
    assert [score.who for score in model.scores] == ["untuned", "retrained"]
