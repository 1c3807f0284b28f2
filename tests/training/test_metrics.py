"""Metrics equal hand-made examples and the libraries' own; their statistics add up; a user's own are used, or refused."""

from __future__ import annotations

import math
import random

import pytest

from training import metrics, own
from training.errors import InputError
from training.recipe import OwnMetric

ANSWERS = [
    ("the cat sat on the mat today", "the cat sat on the mat", "p"),
    ("A dog, barking loudly at night.", "a dog barks loudly at night", "p"),
    ("nothing of it", "quite another sentence here", "p"),
    ("", "silence is no answer", "p"),
]


def score(name: str, rows=ANSWERS) -> float:
    metric = metrics.METRICS[name]
    return metric.of(metrics.total([metric.row(*row) for row in rows]))


def test_perplexity_weighs_tokens_not_rows_and_tells_prompt_from_response():
    rows = [(2.0, 4, 3.0, 1), (10.0, 6, 1.0, 3)]
    values = {name: score(name, rows) for name in ("perplexity", "perplexity_prompt", "perplexity_response")}
    assert values["perplexity_prompt"] == pytest.approx(math.exp(12 / 10))
    assert values["perplexity_response"] == pytest.approx(math.exp(4 / 4))
    assert values["perplexity"] == pytest.approx(math.exp(16 / 14))


def test_perplexity_never_overflows_and_is_one_where_there_is_nothing_to_predict():
    assert math.isfinite(score("perplexity_response", [(0.0, 0, 1e6, 1)]))
    assert score("perplexity_prompt", [(0.0, 0, 1.0, 1)]) == 1.0


def test_summing_many_small_losses_loses_nothing():
    rows = [(0.0, 0, 0.1, 1)] * 100_000 + [(0.0, 0, 1e12, 1)]
    assert metrics.total([metrics.METRICS["perplexity_response"].row(*row) for row in rows])[0] == 1e12 + 1e4


@pytest.mark.parametrize(("answer", "expected", "same"), [
    ("The Cat!", "cat", True), ("an  apple", "Apple", True), ("cat", "dog", False), ("theme", "me", False), ("", "the", True),
])  # fmt: skip
def test_exact_match_overlooks_case_punctuation_articles_and_space(answer, expected, same):
    assert score("exact_match", [(answer, expected, "")]) == float(same)
    assert score("accuracy_generated", [(answer, expected, "")]) == 0.0
    assert score("accuracy_generated", [(f" {expected}\n", expected, "")]) == 1.0


@pytest.mark.parametrize(("answer", "expected", "f1"), [
    ("a red car", "the red bus", 0.5), ("red red", "red", 2 / 3), ("", "x", 0.0), ("", "", 1.0), ("a b c", "c b", 1.0),
])  # fmt: skip
def test_f1_counts_shared_words(answer, expected, f1):
    assert score("f1", [(answer, expected, "")]) == pytest.approx(f1)


def test_rouge_is_the_librarys_and_knows_other_scripts_too():
    from rouge_score.rouge_scorer import RougeScorer

    for ours, theirs in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
        scorer = RougeScorer([theirs])
        expected = [scorer.score(wanted, said)[theirs].fmeasure for said, wanted, _ in ANSWERS]
        assert score(ours) == pytest.approx(sum(expected) / len(expected))
        assert score(ours, [("рыжая кошка спит", "рыжая кошка спит", "")]) == 1.0


def test_bleu_is_that_of_the_whole_corpus():
    import sacrebleu

    assert score("bleu") == pytest.approx(sacrebleu.corpus_bleu([a for a, _, _ in ANSWERS], [[e for _, e, _ in ANSWERS]]).score)
    assert score("bleu", [("one two three four five", "one two three four five", "")]) == pytest.approx(100)
    assert score("bleu", [("", "something", "")]) == 0.0


@pytest.mark.parametrize("name", metrics.METRICS)
def test_statistics_of_parts_add_up_to_the_whole_and_rows_not_looked_at_count_nothing(name):
    rng, metric = random.Random(0), metrics.METRICS[name]
    rows = ANSWERS if metric.needs == "answers" else [(rng.random() * 9, 5, rng.random(), 3) for _ in range(4)]
    found = [metric.row(*row) for row in rows]
    halves = [metrics.total(found[:2]), metrics.total([[], *found[2:], []])]
    assert metric.of(metrics.total(halves)) == pytest.approx(metric.of(metrics.total(found)))


def wordy(answer: str, expected: str, prompt: str) -> float:
    return len(answer.split()) / len(prompt)


def infinite(answer: str, expected: str, prompt: str) -> float:
    return math.inf


def test_a_users_metric_is_a_function_by_import_path_or_an_argument():
    there = f"{__name__}:wordy"
    with own.given({"brevity": wordy}):
        found = metrics.chosen([there, "given:brevity", OwnMetric(name="brief", function=there, goal="minimize"), "f1"])
    assert list(found) == ["wordy", "brevity", "brief", "f1"] and found["f1"] is metrics.METRICS["f1"]
    assert [metric.goal for metric in found.values()] == ["maximize", "maximize", "minimize", "maximize"]
    for name in ("wordy", "brevity", "brief"):
        assert found[name].of(metrics.total([found[name].row("two words", "", "four")])) == 0.5


@pytest.mark.parametrize(("entry", "said"), [
    ("no_such_module:f", "cannot be imported"), (f"{__name__}:nothing", "has no nothing"), ("given:gone", "was not given"),
])  # fmt: skip
def test_what_is_not_there_is_refused_with_the_reason(entry, said):
    with pytest.raises(InputError, match=said):
        metrics.chosen([entry])


def test_a_metric_that_returns_no_number_is_refused():
    for bad in (infinite, lambda a, e, p: None):
        with own.given({"bad": bad}), pytest.raises(InputError, match="must return a finite number"):
            metrics.chosen(["given:bad"])["bad"].row("a", "b", "c")
