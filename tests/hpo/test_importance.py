"""Importance finds what matters, gives noise nothing, and says when it cannot tell."""

from __future__ import annotations

import math
import time
from random import Random

import pytest

from hpo.importance import MINIMUM, importance, position, reason
from hpo.objectives import named
from hpo.space import Choice, Float, Int, Space
from hpo.trial import Trial
from training.recipe import Outcome, Recipe

ACCURACY = named(["accuracy"])[0]
SPACE = Space.model_validate(
    {
        "learning_rate": {"type": "float", "low": 1e-5, "high": 1e-2, "log": True},
        "rank": {"type": "int", "low": 4, "high": 64, "log": True},
        "targets": {"type": "choice", "values": ["all-linear", "attention", "mlp"]},
        "bits": {"type": "choice", "values": [32, 4]},
        "gradient_checkpointing": {"type": "choice", "values": [False, True], "when": {"bits": 32}},
        "dropout": {"type": "float", "low": 0.0, "high": 0.3},
    }
)


def place(params) -> float:
    return position(SPACE["learning_rate"], params["learning_rate"])


def study(count: int, response, seed: int = 0, state: str = "complete") -> list[Trial]:
    rng = Random(seed)
    trials = []
    for number in range(count):
        params = SPACE.sample(rng)
        outcome = Outcome(scores={"accuracy": response(params) + rng.gauss(0, 0.005)})
        trials.append(Trial(number=number, params=params, recipe=Recipe(), state=state, outcome=outcome))
    return trials


def shares(trials) -> dict[str, float]:
    return {item.name: item.share for item in importance(SPACE, trials, ACCURACY)}


def test_dimension_that_matters_is_first_and_noise_gets_nothing():
    trials = study(60, lambda params: 0.9 - 0.5 * (place(params) - 0.7) ** 2)
    found = importance(SPACE, trials, ACCURACY)
    assert found[0].name == "learning_rate" and found[0].share > 0.5 and found[0].low > 0.2
    assert all(item.share < 0.03 and item.low == 0 for item in found[1:])
    assert all(0 <= item.low <= item.share <= item.high <= 1 for item in found)


def test_pure_noise_has_no_lower_end_above_zero():
    trials = study(60, lambda params: 0.5)
    assert all(item.low == 0 and item.share < 0.1 for item in importance(SPACE, trials, ACCURACY))


def test_unordered_choice_counts_as_one_dimension():
    found = shares(study(60, lambda params: {"all-linear": 0.9, "attention": 0.5, "mlp": 0.8}[params["targets"]]))
    assert max(found, key=found.get) == "targets" and found["targets"] > 0.6


def test_shares_agree_with_the_known_parts_of_the_variance():
    # Two independent parts with 4/5 and 1/5 of the variance.
    found = shares(study(200, lambda params: 0.2 * place(params) + 0.1 * params["dropout"] / 0.3))
    assert found["learning_rate"] == pytest.approx(0.8, abs=0.15)
    assert found["dropout"] == pytest.approx(0.2, abs=0.08)


def test_conditional_dimension_does_not_hide_the_choice_that_controls_it():
    found = shares(study(80, lambda params: 0.9 if params["bits"] == 32 else 0.5))
    assert found["bits"] > 0.7 and found["gradient_checkpointing"] < 0.05


def test_conditional_dimension_is_found_where_it_exists():
    found = shares(study(100, lambda params: 0.9 if params.get("gradient_checkpointing") else 0.5))
    assert found["gradient_checkpointing"] > 0.3


def test_same_seed_gives_the_same_answer_and_another_a_close_one():
    trials = study(30, place)
    assert importance(SPACE, trials, ACCURACY, seed=1) == importance(SPACE, trials, ACCURACY, seed=1)
    other = {item.name: item.share for item in importance(SPACE, trials, ACCURACY, seed=2)}
    assert other["learning_rate"] == pytest.approx(shares(trials)["learning_rate"], abs=0.15)


def test_only_complete_trials_inside_the_space_count():
    good = study(MINIMUM, place)
    stopped = study(30, place, state="stopped")
    outside = good[0].model_copy(update={"params": {"learning_rate": 1.0}})
    assert reason(SPACE, good, ACCURACY) is None
    assert importance(SPACE, good + stopped + [outside], ACCURACY) == importance(SPACE, good, ACCURACY)


@pytest.mark.parametrize("count", [0, 1, MINIMUM - 1])
def test_too_few_trials_give_a_reason(count):
    trials = study(count, place)
    assert importance(SPACE, trials, ACCURACY) == []
    assert reason(SPACE, trials, ACCURACY).startswith(f"Too few trials: {count} complete")


def test_constant_values_or_points_give_a_reason():
    trials = study(12, place)
    same = [t.model_copy(update={"outcome": trials[0].outcome}) for t in trials]
    assert reason(SPACE, same, ACCURACY) == "All 12 complete trials have the same value."
    fixed = [t.model_copy(update={"params": trials[0].params}) for t in trials]
    assert reason(SPACE, fixed, ACCURACY).startswith("No hyperparameter took two values")
    assert importance(SPACE, same, ACCURACY) == importance(SPACE, fixed, ACCURACY) == []


def test_dimension_that_never_varied_is_left_out():
    trials = [t.model_copy(update={"params": t.params | {"rank": 8}}) for t in study(20, place)]
    assert "rank" not in shares(trials)


def test_position_is_linear_in_the_coordinates_of_the_dimension():
    assert position(Float(low=1e-4, high=1e-2, log=True), 1e-3) == pytest.approx(0.5)
    assert position(Int(low=0, high=10), 5) == 0.5
    assert position(Choice(values=(32, 4, 8)), 8) == 0.5
    assert position(Choice(values=("b", "a")), "a") == 1
    assert position(Choice(values=("only",)), "only") == 0
    assert math.isclose(position(Int(low=4, high=64, log=True), 16), 0.5)


def test_sixty_trials_take_under_three_seconds():
    trials = study(60, place)
    importance(SPACE, trials[:10], ACCURACY)  # the import of scikit-learn is not part of it
    began = time.process_time()
    importance(SPACE, trials, ACCURACY)
    assert time.process_time() - began < 3
