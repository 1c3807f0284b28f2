"""From a winner to a registered model: killed after any step and run again, one model and nothing half made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hpo
from hpo import promote as promotion
from hpo.certificate import Interval, Scored
from hpo.errors import InputError, NotFound
from hpo.promote import better, refusal
from hpo.spec import Promote

STUDY = {
    "name": "small", "recipe": {"max_length": 128, "steps": 60, "learning_rate": 0.01},
    "data": {"train": "embedded:train.jsonl", "validation": "embedded:validation.jsonl", "test": "embedded:test.jsonl",
             "template": "{instruction}\nAnswer:"},
    "evaluation": {"rows": 50, "test_rows": 100, "reports": 1}, "space": {"rank": [8, 16], "bits": [32, 4]},
    "algorithm": "random", "budget": {"trials": 3}, "resources": {"mode": "local"},
}  # fmt: skip


def scored(who: str, accuracy: float, loss: float = 1.0) -> Scored:
    return Scored(who=who, number=0, rows=100, accuracy=Interval(value=accuracy, low=0, high=1), loss=loss)


# Which is kept, and which may be deployed


def test_the_more_accurate_of_trial_and_retrained_is_kept_and_of_equals_the_one_of_lower_loss():
    assert better(scored("trial", 0.8), scored("retrained", 0.9), {})[0] == "retrained"
    assert better(scored("trial", 0.9), scored("retrained", 0.8), {})[0] == "trial"
    kept, why = better(scored("trial", 0.9, 0.2), scored("retrained", 0.9, 0.1), {})
    assert kept == "retrained" and "lower loss" in why
    assert better(scored("trial", 0.9, 0.1), scored("retrained", 0.9, 0.1), {})[0] == "trial"
    kept, why = better(scored("trial", 0.1), None, {"ended": "diverged", "reason": "loss is nan"})
    assert kept == "trial" and "diverged (loss is nan)" in why


def test_a_model_below_its_thresholds_is_refused_with_the_numbers():
    scores = [scored("untuned", 0.2), scored("trial", 0.5), scored("retrained", 0.6)]
    assert refusal(Promote(), scores) == ""
    assert "accuracy 0.600" in refusal(Promote(accuracy=0.7), scores) and "0.7" in refusal(Promote(accuracy=0.7), scores)
    assert "+0.400" in refusal(Promote(gain=0.4), scores)
    assert "+0.000" in refusal(Promote(), [scored("untuned", 0.6), scored("retrained", 0.6)])


# The pipeline, really


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    storage = tmp_path_factory.mktemp("storage")
    hpo.run(STUDY | {"storage": str(storage)})
    return storage


KILLED = """
import os, sys
from hpo import promote as promotion, study
from hpo.store import Store
storage, step, when = sys.argv[1:]
kept = Store.add_step
def add_step(self, key, study_id, name, result):
    if name == step and when == "before":
        os._exit(9)
    kept(self, key, study_id, name, result)
    if name == step:
        os._exit(9)
Store.add_step = add_step
study.open_study("small", storage=storage).promote()
"""


@pytest.fixture(scope="module")
def model(storage):
    """The winner promoted by processes that are killed around every step, then by one that is not."""
    steps = list(promotion.STEPS)
    for number, step in enumerate(steps):
        when = "before" if number % 2 else "after"
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(storage), step, when], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 9, done.stderr
        assert whole(storage), f"killed {when} the record of {step}"
    done = []
    study = hpo.open_study("small", storage=str(storage))
    model = study.promote(on_status=lambda status: done.append(status.phase))
    # What was on the record before the last kill is not done again.
    assert [phase for phase in done if phase in steps] == (["register"] if len(steps) % 2 == 0 else [])
    return model


def whole(storage: Path) -> bool:
    """Every folder that a manifest should prove is proven, and nothing registered lacks its folder."""
    from training.artifact import verify

    for folder in [*storage.glob("models/*/*"), *storage.glob("small/promotions/*/*")]:
        if not folder.name.startswith("."):
            verify(folder)
    study = hpo.open_study("small", storage=str(storage))
    return all(Path(m.folder).is_dir() for m in study.models())


def test_a_promotion_killed_after_every_step_registers_one_model_and_leaves_nothing_half_made(storage, model):
    study = hpo.open_study("small", storage=str(storage))
    assert study.models() == [model]
    assert (model.version, model.stage, model.name) == (1, "candidate", "small")
    assert [p.name for p in (storage / "models" / "small").iterdir()] == [model.key]
    assert not any((storage / "small" / "promotions").iterdir())


def test_the_model_says_where_it_came_from_and_how_it_did(storage, model):
    study = hpo.open_study("small", storage=str(storage))
    winner = study.winner()
    assert model.lineage.trial == winner.number and model.lineage.study == "small"
    assert model.lineage.recipe == winner.recipe and model.lineage.digest == study.record.digest
    assert [s.who for s in model.scores][0] == "untuned" and model.scores[-1].who == model.kept
    assert {s.rows for s in model.scores} == {100}
    assert model.gain.low <= model.gain.value <= model.gain.high
    assert len(model.prompts) == promotion.PROMPTS and all(prompt.endswith("Answer:") for prompt, _ in model.prompts)
    said = (Path(model.folder) / "README.md").read_text()
    for part in ("license", model.lineage.digest[:12], "untuned", "rank", "embedded"):
        assert part in said


def test_the_package_loads_without_peft_and_asks_as_the_rows_did(model):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.folder)
    prompt, answer = model.prompts[0]
    chat = [{"role": "user", "content": prompt.removesuffix("\nAnswer:")}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == prompt
    loaded = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt")
    out = loaded.generate(**ids, do_sample=False, max_new_tokens=32)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(out, skip_special_tokens=True).strip() == answer.strip()


def test_promoting_again_makes_nothing_and_another_trial_is_another_version(storage, model):
    study = hpo.open_study("small", storage=str(storage))
    phases: list[str] = []
    assert study.promote(on_status=lambda status: phases.append(status.phase)) == model
    assert not set(phases) & set(promotion.STEPS)
    other = next(t.number for t in study.history() if t.number != model.lineage.trial)
    second = study.promote(trial=other)
    assert (second.version, second.lineage.trial) == (2, other)
    study.store.set_stage("small", 2, "removed")


def test_a_model_is_reproduced_from_its_record_and_a_changed_one_is_noticed(storage, model):
    study = hpo.open_study("small", storage=str(storage))
    from hpo.study import reproduce

    said = reproduce(study.store, model)
    assert said["matches"] and said["largest"] <= said["tolerance"] and said["differs"] == {}
    other = model.lineage.recipe.model_copy(update={"seed": 7})
    changed = model.model_copy(update={"lineage": model.lineage.model_copy(update={"recipe": other})})
    said = reproduce(study.store, changed)
    assert not said["matches"] and said["largest"] > said["tolerance"] and said["tensor"]
    assert not any((storage / "small" / "promotions").iterdir())


def test_what_cannot_be_promoted_is_refused_with_the_reason(storage, model, tmp_path):
    study = hpo.open_study("small", storage=str(storage))
    with pytest.raises(NotFound, match="has no trial 99"):
        study.promote(trial=99)
    simulated = hpo.run(STUDY | {"storage": str(tmp_path), "train": "simulated"})
    with pytest.raises(InputError, match="left no adapter: it was simulated"):
        simulated.promote()
    with pytest.raises(InputError, match="has no registered model"):
        simulated.deploy()


def test_thresholds_that_are_edited_count_for_the_model_that_is_there(storage, model):
    written = STUDY | {"storage": str(storage), "promote": {"accuracy": 1.0}}
    study = hpo.run(written)  # nothing left to run
    refused = study.promote()
    assert refused.key == model.key and "below promote.accuracy" in refused.refused
    with pytest.raises(InputError, match=r"small@v1: is not deployed: accuracy .* is below promote.accuracy"):
        study.deploy()
    hpo.run(STUDY | {"storage": str(storage)})
    assert study.promote().refused == ""


def test_a_retraining_that_diverges_keeps_the_trials_own_adapter(storage, model, monkeypatch):
    study = hpo.open_study("small", storage=str(storage))
    from training.recipe import Outcome

    hpo.run(STUDY | {"storage": str(storage), "promote": {"model": "other"}})
    monkeypatch.setattr("training.loop.train", lambda job, report: Outcome(ended="diverged", reason="loss is nan"))
    kept = study.promote()
    assert kept.name == "other" and kept.kept == "trial" and "diverged" in kept.why
    assert kept.lineage.rows == "train"
    hpo.run(STUDY | {"storage": str(storage)})


def test_the_command_promotes_lists_shows_and_removes(storage, model, capsys):
    from contracts import command, one_object

    at = ("--storage", storage)
    code, out, _ = command(capsys, "model", "promote", "small", "--json", *at)
    assert code == 0 and one_object(out)["label"] == "small@v1"
    code, out, _ = command(capsys, "model", "list", "--json", *at)
    assert {"small@v1", "other@v1"} <= {m["label"] for m in json.loads(out)["models"]}
    code, out, _ = command(capsys, "model", "show", "small", *at)
    assert code == 0 and model.digest in out.replace("\n", "").replace(" ", "")
    code, out, err = command(capsys, "model", "show", "small@v9", *at)
    assert code == 2 and "There are: small@v1" in err
    code, _, err = command(capsys, "model", "rollback", "small", *at)
    assert code == 2 and "no previous version" in err
    code, _, err = command(capsys, "model", "remove", "other@v1", *at)
    assert code == 0 and not os.listdir(storage / "models" / "other")
