"""The final retrain answers what goes wrong, on the record; a sound run knows nothing of it, and a trial only ends."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from training.card import card
from training.loop import train
from training.recipe import DataConfig, EvaluationConfig, Job
from training.stability import MOST, RETURN, Guard, Watch, diverged, wrong_with

USUAL = {"steps": 12, "batch_size": 4, "evaluation": EvaluationConfig(reports=2, rows=8)}


@pytest.fixture(scope="module")
def poisoned(llama, rows, tmp_path_factory) -> tuple[str, DataConfig]:
    """A model to which one word is infinite, and rows two of which have it: their loss is no number."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("poisoned")
    shutil.copytree(llama, folder / "model")
    texts = [json.loads(line) for line in Path(rows.train).read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(llama)
    used = {i for text in texts for value in text.values() for i in tokenizer(str(value))["input_ids"]}
    word, poison = next((w, i) for w, i in sorted(tokenizer.get_vocab().items()) if i not in used and w.isalpha() and len(w) > 2
                        and tokenizer(w, add_special_tokens=False)["input_ids"] == [i])  # fmt: skip
    weights = load_file(folder / "model" / "model.safetensors")
    weights["model.embed_tokens.weight"][poison] = math.inf
    save_file(weights, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    for number in (10, 30):
        texts[number]["instruction"] = word
    (folder / "train.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    return str(folder / "model"), rows.model_copy(update={"train": str(folder / "train.jsonl")})


@pytest.fixture
def job(make_job, tmp_path):
    def make(**given) -> Job:
        return make_job(**USUAL | {"resume": str(tmp_path / "running")} | given)

    return make


def told(outcome) -> list[str]:
    return [entry["did"] for entry in outcome.conditions.get("interventions", ())]


@pytest.mark.parametrize("fields", [{"dropout": 0.1}, {"adapter": "adalora", "steps": 16}, {"model": "embedded"}], ids=str)
def test_a_sound_run_has_no_intervention_and_is_the_same_to_the_bit_with_and_without_them(job, fields):
    plain, watched = train(job(resume=None, **fields)), train(job(interventions=True, **fields))
    assert (plain.loss, plain.scores, plain.tokens) == (watched.loss, watched.scores, watched.tokens)
    assert "interventions" not in watched.conditions


def test_a_batch_whose_loss_is_no_number_ends_a_trial_and_is_left_out_of_the_final_retrain(job, poisoned):
    model, data = poisoned
    ended = train(job(model=model, data=data))
    assert ended.ended == "diverged" and "loss became nan at step" in ended.reason
    outcome = train(job(model=model, data=data, interventions=True, resume=None))
    assert outcome.ended == "complete" and math.isfinite(outcome.loss)
    first = outcome.conditions["interventions"][0]
    assert first["did"] == "skip" and first["why"] == "the loss became nan" and f"at step {first['step']}" in ended.reason
    assert len(told(outcome)) <= 2, "two rows are poisoned, each in one batch at most"


def test_it_stays_on_the_record_and_is_not_met_again_after_an_interruption(job, poisoned):
    from training.recipe import Pause

    model, data = poisoned
    made = job(model=model, data=data, interventions=True)
    whole = train(made.model_copy(update={"resume": None}))
    last = whole.conditions["interventions"][-1]["step"]
    if last == 12:
        pytest.skip("the last batch is poisoned, after which there is nothing to go on with")
    half = train(made, lambda progress: Pause("wait") if progress.step >= last else None)
    outcome = train(made) if half.ended == "paused" else half
    assert outcome.loss == whole.loss and outcome.conditions["interventions"] == whole.conditions["interventions"]


def test_a_rate_that_is_far_too_large_is_lowered_and_the_run_goes_back_until_it_learns(job):
    wild = {"model": "embedded", "learning_rate": 0.5, "warmup": 0, "steps": 40, "schedule": "constant"}
    assert train(job(**wild, resume=None)).ended == "diverged"
    outcome = train(job(**wild, interventions=True))
    assert "restore" in told(outcome)
    if outcome.ended == "complete":
        assert len(told(outcome)) <= MOST
    else:
        assert outcome.ended == "diverged" and f"after {MOST} interventions" in outcome.reason


def test_a_hopeless_rate_is_given_up_after_so_many_interventions(job):
    outcome = train(job(model="embedded", learning_rate=1e4, warmup=0, steps=40, interventions=True))
    assert outcome.ended == "diverged" and outcome.checkpoint is None
    assert len(told(outcome)) == MOST and f"after {MOST} interventions" in outcome.reason


# What is decided


def watch(*losses: float, norm: float = 1.0) -> Watch:
    seen = Watch()
    for loss in losses:
        seen = seen.see(loss, norm)
    return seen


def test_a_jump_of_the_loss_is_seen_at_once_and_noise_is_not():
    seen = watch(2.0, 1.8, 1.5, 1.2, 1.1, 1.0, 0.9)
    assert "the loss jumped to 9.00" in wrong_with(seen, 9.0, 1.0)
    assert wrong_with(seen, 3.5, 1.0) is None, "no worse than an untuned model may be"
    assert wrong_with(watch(2.0, 9.0, 1.0, 8.0, 2.0, 7.0, 1.0), 10.0, 1.0) is None, "rows differ that much here"
    assert wrong_with(watch(2.0, 1.9), 50.0, 1.0) is None, "too early to say"


def test_an_exploding_norm_is_seen_at_once_and_ends_a_trial_where_it_stays():
    seen = watch(2.0, 1.9, 1.8, 1.7, 1.6)
    assert "norm rose to 500, after 1 on average" in wrong_with(seen, 1.6, 500.0)
    assert wrong_with(seen, 1.6, 99.0) is None
    for _ in range(2):
        seen = seen.see(1.6, 500.0)
        assert diverged(seen, 1.6, 500.0) is None
    assert "stayed there for 3 steps" in diverged(seen.see(1.6, 500.0), 1.6, 500.0)
    assert "norm rose to 2e+06" in diverged(watch(2.0, 2.0).see(2.0, 2e6), 2.0, 2e6)


def test_a_run_that_loses_all_that_it_learnt_has_diverged():
    learnt = watch(4.0, *[1.0] * 30)
    lost = learnt
    for _ in range(20):
        lost = lost.see(5.9, 1.0)
    assert "had come to" in diverged(lost, 5.9, 1.0)
    assert diverged(watch(4.0, *[3.9] * 30, *[5.5] * 20), 5.5, 1.0) is None, "it had learnt nothing yet"


def test_answers_grow_stronger_and_the_rate_comes_back_gradually():
    guard, answers = Guard(), []
    for step in (50, 53, 55):
        did, guard = guard.answer(step, "because", damaged=False)
        answers.append(did)
    assert answers == ["skip", "slow", "restore"] and guard.left_out == {50, 53, 55}
    rates = [guard.rate(step) for step in range(40, 140)]
    assert guard.rate(55) == pytest.approx(0.25, abs=0.03) and rates == sorted(rates)
    assert guard.rate(55 + RETURN) == pytest.approx(2 * guard.rate(55)) and rates[-1] == 1.0
    assert guard.answer(200, "because", damaged=False)[0] == "skip", "that is long ago"
    assert guard.answer(200, "because", damaged=True)[0] == "restore"
    assert guard.answer(200, "because", damaged=True, can_go_back=False)[0] == "end"


def test_interventions_stand_on_the_model_card():
    entry = {"step": 7, "did": "skip", "why": "the loss became nan", "values": {"rate_factor": 1.0}}
    record = {"name": "m", "lineage": {"recipe": {"model": "embedded"}}, "interventions": [entry]}
    assert "| 7 | skip | the loss became nan | rate\\_factor 1.0 |" in card(record)
    assert "Interventions" not in card(record | {"interventions": []})

