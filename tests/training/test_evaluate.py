"""Scores equal plain computation, row by row, and do not depend on batches; reading does not change the model."""

from __future__ import annotations

import math

import pytest
import torch

from training import evaluate, metrics, schedule
from training.data import Prepared, Tokenized, prepare, read
from training.model import describe, load_model, load_tokenizer
from training.recipe import EvaluationConfig, Recipe
from training.run import set_up
from training.world import World


@pytest.fixture(scope="module")
def held_out(make_job, tokenizer) -> Tokenized:
    data = make_job().data
    return prepare(read(data), data, tokenizer, 128).validation


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(Recipe())


@pytest.fixture(scope="module")
def model(make_job, tokenizer):
    """The embedded model after learning some rows by heart, so that it is right about a part of them."""
    job = make_job(model="embedded", rank=32, steps=30, batch_size=8)
    rows = prepare(read(job.data), job.data, tokenizer, 128).validation
    some = Tokenized(rows.ids[:8], rows.prompt_lengths[:8])
    planned = schedule.plan(job.recipe, some, workers=1)
    run = set_up(job, describe(job.recipe.model), planned, World(), "cpu")
    for step in range(planned.steps):
        run.step(some, planned.micro_batches(step, 0, 1), schedule.supervised(some, planned, step), 1e-2)
    return run.inner


def scored(model, rows: Tokenized, batch_size: int):
    return evaluate.response_scores(model, rows.ids, rows.prompt_lengths, batch_size=batch_size)


def by_hand(model, ids: list[int], length: int) -> tuple[float, int, float]:
    model.eval()
    with torch.no_grad():
        predicted = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    places = range(max(length, 1), len(ids))
    nll = -sum(predicted[place - 1, ids[place]].item() for place in places)
    return nll, len(places), float(all(predicted[place - 1].argmax() == ids[place] for place in places))


def test_scores_equal_a_plain_computation_without_batches(model, held_out):
    nll, tokens, right = scored(model, held_out, 5)
    expected = [by_hand(model, ids, length) for ids, length in zip(held_out.ids, held_out.prompt_lengths, strict=True)]
    assert nll == pytest.approx([row[0] for row in expected], abs=1e-3)
    assert tokens == [row[1] for row in expected] and right == [row[2] for row in expected]


@pytest.mark.parametrize("batch_size", [1, 3, 16, 100])
def test_the_batch_size_does_not_matter(model, held_out, batch_size):
    nll, tokens, right = scored(model, held_out, batch_size)
    reference = scored(model, held_out, 7)
    assert nll == pytest.approx(reference[0], abs=1e-3) and (tokens, right) == reference[1:]


def test_a_row_without_prompt_is_scored_from_its_second_token(model, held_out):
    rows = Tokenized([held_out.ids[0], held_out.ids[1]], [0, 1])
    nll, tokens, _ = scored(model, rows, 2)
    assert tokens == [len(rows.ids[0]) - 1, len(rows.ids[1]) - 1]
    assert nll[0] == pytest.approx(by_hand(model, rows.ids[0], 0)[0], abs=1e-3)


def test_exact_match_is_what_greedy_generation_gives(model, held_out, tokenizer):
    _, _, right = scored(model, held_out, 8)
    answers = evaluate.greedy_answers(model, held_out, tokenizer)
    expected = [
        tokenizer.decode(ids[length:], skip_special_tokens=True).strip()
        for ids, length in zip(held_out.ids, held_out.prompt_lengths, strict=True)
    ]
    assert [answer == wanted for answer, wanted in zip(answers, expected, strict=True)] == [value == 1 for value in right]
    assert 0 < sum(right) < len(right)  # else this test would say nothing


def test_one_wrong_token_makes_a_row_wrong_and_the_end_counts(model, held_out):
    _, _, right = scored(model, held_out, 8)
    at = right.index(1.0)
    ids = held_out.ids[at]
    for place in (held_out.prompt_lengths[at], len(ids) - 1):
        changed = [*ids[:place], (ids[place] + 1) % 900, *ids[place + 1 :]]
        assert scored(model, Tokenized([changed], [held_out.prompt_lengths[at]]), 1)[2] == [0.0]


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_comes_back_even_after_an_error(llama, training):
    model = load_model(Recipe(model=llama)).train(training)
    with evaluate.evaluating(model):
        assert not model.training and not torch.is_grad_enabled()
    with pytest.raises(ZeroDivisionError), evaluate.evaluating(model):
        raise ZeroDivisionError
    assert model.training == training and torch.is_grad_enabled()


def test_dropout_is_off_while_scoring(make_job, held_out):
    job = make_job(dropout=0.9)
    planned = schedule.plan(job.recipe, held_out, workers=1)
    run = set_up(job, describe(job.recipe.model), planned, World(), "cpu")
    for parameter in run.parameters:
        parameter.data.fill_(0.01)
    assert scored(run.inner, held_out, 8) == scored(run.inner, held_out, 8)


def test_a_batch_is_aligned_at_its_right_end():
    batch = evaluate.batch_of([[5, 6, 7, 8], [9, 10]], [2, 1], pad=0, device="cpu")
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [0, 0, 9, 10]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]
    assert batch["labels"].tolist() == [[7, 8], [-100, 10]] and batch["keep"] == 3


def test_the_summary_weighs_tokens_and_rows():
    found = evaluate.summary({"right": [1.0, 0.0], "nll": [math.log(2), 3 * math.log(2)], "tokens": [1, 3]})
    assert found == {"accuracy": 0.5, "loss": pytest.approx(math.log(2))}
    assert evaluate.pack_bits([1.0, 0.0, 1.0]) == "101"


def test_prompts_are_scored_as_a_plain_computation_does(model, held_out):
    nll, tokens = evaluate.prompt_scores(model, held_out, batch_size=5)
    for i in (0, 3, 9):
        length = held_out.prompt_lengths[i]
        expected = by_hand(model, held_out.ids[i][:length], 0)
        assert (nll[i], tokens[i]) == (pytest.approx(expected[0], abs=1e-3), expected[1])
    bare = Tokenized([held_out.ids[0], held_out.ids[1]], [0, 1])
    assert evaluate.prompt_scores(model, bare, batch_size=2) == ([0.0, 0.0], [0, 0])


def test_prompt_and_response_together_are_the_whole_row(model, held_out, make_job, tokenizer):
    job = make_job(evaluation=EvaluationConfig(metrics=("perplexity", "perplexity_prompt", "perplexity_response")))
    found = evaluate.summary(
        evaluate.score_rows(model, held_out, Prepared(held_out, held_out, held_out), job), metrics.chosen(job.evaluation.metrics)
    )
    rows = [by_hand(model, ids, 0) for ids in held_out.ids]
    assert found["perplexity"] == pytest.approx(math.exp(sum(r[0] for r in rows) / sum(r[1] for r in rows)), rel=1e-4)
    assert found["perplexity_response"] == pytest.approx(math.exp(found["loss"]))


@pytest.mark.parametrize("batch_size", [1, 5, 16])
def test_answers_do_not_depend_on_the_batch_and_stop_at_the_limit(model, held_out, tokenizer, batch_size):
    found = evaluate.greedy_answers(model, held_out, tokenizer, limit=12, batch_size=batch_size)
    assert found == evaluate.greedy_answers(model, held_out, tokenizer, limit=12, batch_size=3)
    assert len(set(map(len, found))) > 1
    short = evaluate.greedy_answers(model, held_out, tokenizer, limit=2, batch_size=batch_size)
    assert all(whole.startswith(text) for whole, text in zip(found, short, strict=True)) and short != found


def test_only_the_chosen_rows_are_answered_and_the_choice_is_the_same_each_time(model, held_out, make_job, tokenizer):
    job = make_job(evaluation=EvaluationConfig(metrics=("rouge_l", "accuracy_generated"), answers=5))
    answered = evaluate.chosen_rows(len(held_out), 5)
    assert sum(answered) == 5 and answered == evaluate.chosen_rows(len(held_out), 5)
    limit = evaluate.answer_limit(job.evaluation, held_out)
    scores = evaluate.score_rows(
        model, held_out, Prepared(held_out, held_out, held_out), job, tokenizer=tokenizer, answered=answered, limit=limit
    )
    assert [bool(row) for row in scores["rouge_l"]] == answered
    # What is right by likelihood is right when it is written out.
    said = [row[0] for row in scores["accuracy_generated"] if row]
    assert said == [right for right, asked in zip(scores["right"], answered, strict=True) if asked]


def test_scoring_leaves_every_part_of_a_model_and_the_random_numbers_as_they_were(llama):
    model = load_model(Recipe(model=llama)).train()
    still = next(model.children()).eval()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    with evaluate.evaluating(model):
        torch.rand(5)
    assert model.training and not still.training and torch.rand(1) == expected
