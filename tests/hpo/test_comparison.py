"""Models compared on the same rows: intervals of pairs, flags of what became worse, groups of rows, what was forgotten."""

from __future__ import annotations

import math
import random

import pytest

from hpo import comparison
from hpo.certificate import Certificate, Interval
from hpo.certify import interval
from hpo.promote import refusal
from hpo.report_comparison import said, tables
from hpo.spec import Promote
from training.metrics import METRICS, perplexity

ROWS = 120


def model(who: str, share: float, *, nats: float = 1.0, seed: int = 0, **more) -> dict:
    rng = random.Random(seed)
    right = [float(i < share * ROWS) for i in range(ROWS)]
    stats = {
        "perplexity_response": [[nats * 4 + rng.gauss(0, 0.1), 4.0] for _ in right],
        "rouge_l": [[r, 1.0] if i % 2 else [] for i, r in enumerate(right)],
        "own": [[nats, 1.0] for _ in right],
    }
    return {"who": who, "right": right, "metrics": stats, **more}


MODELS = [model("untuned", 0.2, nats=3.0), model("defaults", 0.6, nats=0.5, seed=1), model("winner", 0.8, nats=1.0, seed=2)]


def test_every_metric_has_a_value_for_each_model_and_a_paired_difference_to_the_winner():
    found = {one.name: one for one in comparison.metrics_of(MODELS, {"own": "minimize"})}
    assert list(found) == ["accuracy", "perplexity_response", "rouge_l", "own"]
    accuracy = found["accuracy"]
    assert accuracy.values["winner"].value == 0.8 and set(accuracy.differences) == {"untuned", "defaults"}
    assert accuracy.differences["untuned"].value == pytest.approx(0.6)
    assert found["perplexity_response"].values["untuned"].value == pytest.approx(math.exp(3), rel=0.1)
    assert found["rouge_l"].rows == ROWS / 2  # the others were not answered in words
    assert found["own"].goal == "minimize"


def test_what_the_winner_lost_is_flagged_in_the_direction_of_its_metric():
    found = {one.name: one.worse for one in comparison.metrics_of(MODELS, {"own": "minimize"})}
    assert found == {"accuracy": (), "perplexity_response": ("defaults",), "rouge_l": (), "own": ("defaults",)}
    assert {one.name: one.worse for one in comparison.metrics_of(MODELS, {})}["own"] == ("untuned",)


def test_no_flag_where_the_interval_includes_no_difference():
    rng = random.Random(3)
    a, b = ({"who": who, "right": [float(rng.random() < 0.5) for _ in range(60)]} for who in ("untuned", "winner"))
    (accuracy,) = comparison.metrics_of([a, b], {})
    low, high = accuracy.differences["untuned"].low, accuracy.differences["untuned"].high
    assert low < 0 < high and accuracy.worse == ()


def test_the_interval_of_a_mean_is_that_of_the_certificate_and_pairs_are_narrower():
    one = [float(i % 10 < 6) for i in range(200)]
    other = [1 - v for v in one[:5]] + one[5:]
    found = comparison.compare("x", "maximize", lambda s: s[0] / s[1], {
        "other": [[v, 1.0] for v in other], "winner": [[v, 1.0] for v in one]}, "winner")  # fmt: skip
    plain = interval(one)
    own = found.values["winner"]
    assert (own.value, own.low, own.high) == pytest.approx((plain.value, plain.low, plain.high), abs=0.02)
    assert found.differences["other"].high - found.differences["other"].low < (own.high - own.low) / 2


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_that_there_is_can_be_compared(name):
    metric, rng = METRICS[name], random.Random(0)
    texts = [("a b c d", "a b c e", ""), ("a b c d e", "a b c d e", ""), ("x", "y z", "")]
    rows = [(rng.random(), 3, rng.random(), 2) for _ in range(3)] if metric.needs == "likelihood" else texts
    stats = [metric.row(*row) for row in rows]
    found = comparison.compare(name, metric.goal, metric.of, {"untuned": stats[::-1], "winner": stats}, "winner")
    assert found.differences["untuned"].value == pytest.approx(0) and found.values["winner"].low <= found.values["winner"].high


def test_rows_are_told_apart_by_answer_and_by_quarters_of_a_length():
    answers, lengths = ["ab"[i % 2] for i in range(ROWS)], [i // 3 for i in range(ROWS)]
    found = comparison.breakdown(MODELS, {"answer": answers, "length": lengths})
    assert [(s.by, s.rows) for s in found] == [("answer", 60)] * 2 + [("length", 30)] * 4
    assert [s.accuracy["winner"] for s in found if s.by == "length"] == [1, 1, 1, pytest.approx(0.2, abs=0.01)]
    assert sum(s.rows for s in found if s.by == "length") == ROWS
    assert not any(s.worse for s in found)


def test_free_answers_and_equal_lengths_are_no_groups():
    assert comparison.breakdown(MODELS, {"answer": [str(i) for i in range(ROWS)], "length": [5] * ROWS}) == ()


def text(nats: float, tokens: int = 10) -> dict:
    return {"nll": [nats * tokens + 0.01 * i for i in range(50)], "tokens": [tokens] * 50}


def test_what_was_forgotten_is_the_rise_of_the_perplexity_on_general_text():
    models = [m | {"retention": text(n)} for m, n in zip(MODELS, (1.0, 1.0, 1.1), strict=True)]
    found = comparison.retained(models, "general.jsonl")
    assert (found.texts, found.tokens) == (50, 500)
    assert found.perplexity["untuned"] == pytest.approx(perplexity([sum(text(1.0)["nll"]), 500]))
    assert found.rise["winner"].value == pytest.approx(math.exp(0.1) - 1)
    assert found.rise["defaults"].value == pytest.approx(0)
    assert comparison.retained(MODELS, "") is None


def test_another_tokenizer_has_a_perplexity_but_no_rise():
    models = [MODELS[0] | {"retention": text(1.0)}, MODELS[2] | {"retention": text(1.0, tokens=12)}]
    found = comparison.retained(models, "x")
    assert set(found.perplexity) == {"untuned", "winner"} and found.rise == {}


def test_a_model_that_forgot_more_than_may_be_is_not_deployed():
    from hpo.certificate import Scored

    scores = [Scored(who=w, number=None, rows=9, accuracy=Interval(value=v, low=v, high=v), loss=1) for w, v in
              (("untuned", 0.1), ("retrained", 0.9))]  # fmt: skip
    forgot = comparison.retained([MODELS[0] | {"retention": text(1.0)}, MODELS[2] | {"retention": text(1.1)}], "general.jsonl")
    assert refusal(Promote(), scores, forgot) == "" == refusal(Promote(retention=0.2), scores, forgot)
    assert refusal(Promote(retention=0.05), scores, forgot) == (
        "its perplexity on general.jsonl is +10.5 % against the untuned base's, above promote.retention, 5 %"
    )
    assert "was not measured" in refusal(Promote(retention=0.05), scores, None)


def test_the_report_says_what_became_worse_and_what_stands_on_two_sides():
    made = Certificate(
        winner=1, reason="x", made=0, metrics=comparison.metrics_of(MODELS, {"own": "minimize"}),
        breakdown=comparison.breakdown(MODELS, {"answer": ["ab"[i % 2] for i in range(ROWS)]}),
        retained=comparison.retained([m | {"retention": text(1.0)} for m in MODELS], "g"), overlap={"removed": 3, "left": 0},
    )  # fmt: skip
    sentences = " ".join(said(made))
    assert "Worse than the defaults: perplexity_response, own." in sentences and "untuned:" not in sentences
    assert "The winner's is +0.0 %" in sentences and "3 rows on two sides were left out; no test row" in sentences
    shown = tables(made)
    assert [line[0] for line in shown["metrics"]] == ["accuracy", "perplexity_response", "rouge_l", "own"]
    assert len(shown["slices"]) == 2 and shown["against"] == "defaults"
    assert Certificate.model_validate_json(made.model_dump_json()) == made
    assert tables(Certificate(winner=1, reason="x", made=0)) is None
