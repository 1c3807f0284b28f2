"""What is optimised: each objective is read from the right place, in the right direction, or is missing."""

from __future__ import annotations

import math

import pytest

from hpo.objectives import BUILT_IN, losses, named
from hpo.trial import Trial
from training.metrics import METRICS
from training.recipe import Outcome, Recipe

OUTCOME = Outcome(
    scores={"accuracy": 0.75, "f1": 0.5}, loss=1.25, seconds=7200.0, peak_bytes=1000, tokens=14400, trainable=10,
    conditions={"workers": 3},
)  # fmt: skip
EXPECTED = {
    "accuracy": (0.75, -0.75), "loss": (1.25, 1.25), "seconds": (7200.0, 7200.0), "peak_bytes": (1000, 1000),
    "device_hours": (6.0, 6.0), "adapter_bytes": (40, 40), "tokens_per_second": (2.0, -2.0),
}  # fmt: skip


def test_every_built_in_objective_is_read_and_turned_into_something_to_minimise():
    known = {name: o for name, o in BUILT_IN.items() if name not in METRICS and name != "cost"}
    assert {name: (o.of(OUTCOME), o.loss(OUTCOME)) for name, o in known.items()} == EXPECTED
    assert [o.of(OUTCOME) for o in (BUILT_IN["cost"], *named(["cost"], price=2.5))] == [None, 15.0], "without a price, with one"
    assert all(objective.name == name for name, objective in BUILT_IN.items())


def test_every_metric_is_a_score_by_its_name_of_which_more_is_better_but_for_perplexities():
    outcome = OUTCOME.model_copy(update={"scores": dict.fromkeys(METRICS, 3.0)})
    signs = {name: BUILT_IN[name].loss(outcome) / 3 for name in METRICS}
    assert signs == {name: 1 if name.startswith("perplexity") else -1 for name in METRICS}


def test_what_was_never_measured_is_missing():
    assert {name: o.loss(Outcome()) for name, o in BUILT_IN.items()} == dict.fromkeys(BUILT_IN)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "0.5", None], ids=repr)
def test_a_value_that_is_no_finite_number_is_missing(value):
    outcome = OUTCOME.model_copy(update={"seconds": value, "scores": {"accuracy": value}})
    assert BUILT_IN["accuracy"].loss(outcome) is None
    if not isinstance(value, (bool, str)):
        assert BUILT_IN["device_hours"].loss(outcome) is None


def test_no_time_is_no_throughput():
    assert BUILT_IN["tokens_per_second"].loss(OUTCOME.model_copy(update={"seconds": 0.0})) is None


def test_a_name_that_is_not_built_in_is_a_score_to_maximise_unless_its_goal_is_told():
    outcome = OUTCOME.model_copy(update={"scores": {"own": 0.5}})
    (more,), (less,) = named(["own"]), named(["own"], {"own": "minimize"})
    assert (more.goal, more.loss(outcome), less.goal, less.loss(outcome)) == ("maximize", -0.5, "minimize", 0.5)


def test_a_trial_has_all_its_losses_or_none():
    trial = Trial(number=0, params={}, recipe=Recipe(), outcome=OUTCOME)
    assert losses(trial, named(["seconds", "accuracy"])) == [7200.0, -0.75]
    assert losses(trial, named(["seconds", "rouge"])) is None
    assert losses(trial.model_copy(update={"outcome": None}), named(["seconds"])) is None
