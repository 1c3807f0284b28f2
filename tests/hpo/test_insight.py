"""Sentences about hyperparameters: right where the truth is known, and none where the trials cannot tell."""

from __future__ import annotations

import math
from random import Random

import pytest
from contracts import command, one_object, simulated

import hpo
from hpo.insight import insights
from hpo.objectives import named
from hpo.space import Space
from hpo.trial import Trial
from training.recipe import Outcome, Recipe

OBJECTIVES = named(["accuracy", "seconds", "peak_bytes"])
SPACE = Space.model_validate({
    "learning_rate": {"type": "float", "low": 1e-5, "high": 1e-2, "log": True},
    "rank": {"type": "choice", "values": [2, 4, 8, 16, 32]},
    "batch_size": {"type": "choice", "values": [4, 8, 16, 32]},
    "dropout": {"type": "float", "low": 0.0, "high": 0.3},
})  # fmt: skip


def study(count: int, accuracy, *, seed: int = 0, seconds=lambda p: 1.0, peak=lambda p: 100.0) -> list[Trial]:
    rng, trials = Random(seed), []
    for number in range(count):
        p = SPACE.sample(rng)
        outcome = Outcome(scores={"accuracy": accuracy(p) + rng.gauss(0, 0.005)}, seconds=seconds(p) * rng.uniform(0.97, 1.03),
                          peak_bytes=int(peak(p) * rng.uniform(0.99, 1.01)))  # fmt: skip
        trials.append(Trial(number=number, params=p, recipe=Recipe(), state="complete", outcome=outcome))
    return trials


def place(p) -> float:
    return math.log(p["learning_rate"] / 1e-5) / math.log(1e3)


def said(trials, objectives=OBJECTIVES[:1]) -> list[str]:
    return [one.text for one in insights(SPACE, trials, objectives)]


def test_a_rate_that_is_best_at_the_end_of_its_range_is_to_be_raised():
    texts = said(study(50, lambda p: 0.3 + 0.6 * place(p)))
    assert texts[0].startswith("Raise learning_rate: for accuracy the best points lie at the upper end of its range")
    assert "A wider range may hold better ones." in texts[0]


def test_a_rate_that_is_best_inside_is_named_with_its_interval():
    texts = said(study(60, lambda p: 0.9 - 2 * (place(p) - 0.5) ** 2))
    assert texts[0].startswith("learning_rate is best near 0.000") and "in 95% of the resamples between" in texts[0]


def test_a_rank_that_stops_to_matter_is_said_to_and_from_which_value_on():
    texts = said(study(80, lambda p: 0.3 if p["rank"] == 2 else 0.6 if p["rank"] == 4 else 0.9))
    assert texts[0].startswith("rank hardly matters above 8 for accuracy")


def test_what_trades_one_objective_for_another_is_said_with_both_changes():
    costs = {"seconds": lambda p: 40 / p["batch_size"], "peak": lambda p: 1000 * p["batch_size"]}
    trials = study(60, lambda p: 0.3 + 0.6 * place(p), **costs)
    text = next(text for text in said(trials, OBJECTIVES) if "trades" in text)
    assert text.startswith("batch_size trades peak_bytes for seconds: from 4 to 32 seconds -")
    assert "peak_bytes +" in text
    assert any(text.startswith("batch_size decides seconds: it explains") for text in said(trials, OBJECTIVES))


def test_what_has_no_effect_is_said_only_where_the_rest_is_understood():
    texts = said(study(80, lambda p: 0.3 + 0.6 * place(p)))
    assert any(text.startswith("No effect of") and "dropout" in text for text in texts)
    assert not any("learning_rate" in text for text in texts if text.startswith("No effect of"))


@pytest.mark.parametrize("seed", range(3))
def test_of_noise_nothing_is_said(seed):
    assert said(study(40, lambda p: 0.5, seed=seed)) == []


def test_of_too_few_trials_nothing_is_said():
    assert said(study(7, lambda p: 0.3 + 0.6 * place(p))) == []


def test_the_sentences_are_in_show_its_record_and_the_report(tmp_path, capsys):
    study = hpo.run(simulated(tmp_path, space="tiny", budget={"trials": 24}))
    texts = study.insights()
    assert texts and texts == list(study.certificate.insights)
    code, out, _ = command(capsys, "show", "small", "--storage", tmp_path)
    assert code == 0 and texts[0] in " ".join(out.split())
    assert one_object(command(capsys, "show", "small", "--storage", tmp_path, "--json")[1])["insights"] == texts
    assert texts[0].split(";")[0] in (study.spec.folder / "report.html").read_text()
