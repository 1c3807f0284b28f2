"""What bayes and nsga2 make of what they are told, against random search on a problem in closed form.

The figures are medians over seeds and fixed by them; they say that learning happens, not which algorithm is better.
"""

from __future__ import annotations

import functools
import math
import statistics
from random import Random

import pytest

from hpo.algorithms import load
from hpo.algorithms.random import draw
from hpo.objectives import named
from hpo.pareto import hypervolume
from hpo.space import Space, key
from hpo.trial import Trial
from training.recipe import Outcome, Recipe

RECIPE = Recipe(precision="bf16")
OBJECTIVES = named(["accuracy", "seconds"])
SEEDS = range(7)

SPACE = Space(
    {
        "learning_rate": {"type": "float", "low": 1e-5, "high": 1e-1, "log": True},
        "rank": {"type": "int", "low": 1, "high": 64, "log": True},
        "targets": {"type": "choice", "values": ["attention", "mlp", "all-linear"]},
        "dropout": {"type": "float", "low": 0.0, "high": 0.5, "when": {"targets": "mlp"}},
        "batch_size": {"type": "int", "low": 1, "high": 64, "log": True},
        "epochs": {"type": "float", "low": 0.25, "high": 4.0, "log": True},
    }
)


def measure(params: dict) -> tuple[str, Outcome | None]:
    """Score against time, with a wall of memory and one of divergence; the best rate grows with the batch's root."""
    width = {"attention": 1, "mlp": 2, "all-linear": 3}[params["targets"]]
    if params["batch_size"] * (1 + width * params["rank"] / 64) > 24:
        return "infeasible", None
    rate = math.log10(params["learning_rate"]) - 0.5 * math.log10(params["batch_size"] / 8)
    if rate > -1.7:
        return "diverged", Outcome(ended="diverged", share=0.1)
    learned = (1 - math.exp(-params["epochs"] * (0.5 + 0.2 * width))) * math.exp(-0.8 * (rate + 3) ** 2)
    shape = 0.05 * (math.log2(params["rank"]) - 4 - width / 2) ** 2 / 9
    accuracy = 0.5 + 0.4 * learned - shape - 0.3 * (params.get("dropout", 0.1) - 0.1) ** 2
    seconds = 100 * params["epochs"] * (1 + 0.1 * width) * (1 + 4 / params["batch_size"])
    return "complete", Outcome(scores={"accuracy": accuracy}, seconds=seconds)


@functools.cache
def search(name: str, seed: int, length: int = 100) -> tuple[Trial, ...]:
    history: list[Trial] = []
    for number in range(length):
        rng = Random(f"{seed}:{number}")
        point = draw(SPACE, history, rng) if name == "draws" else load(name)(SPACE, OBJECTIVES, history, rng)
        state, outcome = measure(point)
        history.append(Trial(number=number, params=point, recipe=RECIPE, state=state, outcome=outcome))
    return tuple(history)


def volume(history) -> float:
    done = [trial.outcome for trial in history if trial.state == "complete"]
    return hypervolume([(-outcome.scores["accuracy"], outcome.seconds / 500) for outcome in done], [-0.3, 1.0])


def refused(history) -> int:
    return sum(trial.state != "complete" for trial in history[40:])


@pytest.mark.parametrize("name", ["bayes", "nsga2"])
def test_what_cannot_be_trained_is_avoided_after_forty_trials(name):
    found = [refused(search(name, seed)) for seed in SEEDS]
    chance = [refused(search("draws", seed)) for seed in SEEDS]
    assert statistics.median(found) < 0.6 * statistics.median(chance)
    assert sum(f < c for f, c in zip(found, chance, strict=True)) >= len(SEEDS) - 1


@pytest.mark.parametrize("name", ["bayes", "nsga2"])
def test_the_front_is_better_than_that_of_random_search(name):
    found = [volume(search(name, seed)) for seed in SEEDS]
    chance = [volume(search("draws", seed)) for seed in SEEDS]
    assert statistics.median(found) > statistics.median(chance)


def _line(states: dict, low: float = 0.0) -> tuple[Space, list[Trial]]:
    """A space of one range, with trials along it whose state is that of the first bound they lie below."""
    space = Space({"dropout": {"type": "float", "low": 0.0, "high": 0.9}})
    history = []
    for i in range(45):
        value = round(low + 0.02 * i, 4)
        state = next(state for bound, state in states.items() if value <= bound)
        outcome = Outcome(scores={"accuracy": 0.5 + value / 10}, seconds=10 - value) if state == "complete" else None
        if state == "stopped":
            # Better values than any complete trial's; they are of half a training and must not count.
            outcome = Outcome(ended="stopped", share=0.5, scores={"accuracy": 0.99}, seconds=0.1)
        history.append(Trial(number=i, params={"dropout": value}, recipe=RECIPE, state=state, outcome=outcome))
    return space, history


@pytest.mark.parametrize("state", ["infeasible", "diverged", "stopped"])
@pytest.mark.parametrize("name", ["bayes", "nsga2"])
def test_points_are_sought_away_from_those_that_ended_badly(name, state):
    space, history = _line({0.45: "complete", 0.9: state})
    drawn = [load(name)(space, OBJECTIVES, history, Random(i))["dropout"] for i in range(20)]
    assert sum(value > 0.5 for value in drawn) <= 3


def test_without_any_feasible_trial_bayes_looks_where_nothing_was_tried():
    space, history = _line({0.9: "infeasible"})
    history = [trial for trial in history if trial.params["dropout"] < 0.6]
    drawn = [load("bayes")(space, OBJECTIVES, history, Random(i))["dropout"] for i in range(20)]
    assert sum(value > 0.6 for value in drawn) >= 18


def test_tpe_does_not_crowd_around_what_is_running():
    space, history = _line({0.9: "complete"})
    suggest = functools.partial(load("bayes"), model="tpe")
    alone = [suggest(space, OBJECTIVES, history, Random(i))["dropout"] for i in range(20)]
    centre = statistics.median(alone)
    running = [
        Trial(number=45 + i, params={"dropout": centre + (i - 10) / 1000}, recipe=RECIPE, state="running") for i in range(20)
    ]
    beside = [suggest(space, OBJECTIVES, history + running, Random(i))["dropout"] for i in range(20)]
    assert sum(abs(v - centre) < 0.02 for v in beside) < sum(abs(v - centre) < 0.02 for v in alone)


@pytest.mark.parametrize("name", ["bayes", "nsga2"])
def test_failed_and_cancelled_trials_say_nothing(name):
    space, history = _line({0.9: "complete"})
    said = [t.model_copy(update={"state": state}) for t, state in zip(history[::9], ["failed", "cancelled"] * 3)]  # noqa: B905
    rest = [t for t in history if t not in history[::9]]
    other = [t.model_copy(update={"params": {"dropout": t.params["dropout"] + 1e-5}}) for t in said]
    for seed in range(5):
        first = load(name)(space, OBJECTIVES, rest + said, Random(seed))
        assert first == load(name)(space, OBJECTIVES, rest + other, Random(seed))


@pytest.mark.parametrize("name", ["bayes", "nsga2"])
def test_units_do_not_matter(name):
    history = list(search("random", 1, 60))
    scaled = [
        t.model_copy(update={"outcome": t.outcome.model_copy(update={"seconds": t.outcome.seconds * 2.0**40})})
        if t.state == "complete"
        else t
        for t in history
    ]
    for seed in range(5):
        first = load(name)(SPACE, OBJECTIVES, history, Random(seed))
        assert key(first) == key(load(name)(SPACE, OBJECTIVES, scaled, Random(seed)))


@pytest.mark.parametrize(("name", "option"), [("bayes", "startup"), ("nsga2", "population")])
def test_the_first_points_are_random_for_as_long_as_the_option_says(name, option):
    history = list(search("random", 2, 30))
    for length, value, learning in ((12, 12, True), (11, 12, False), (30, 31, False), (30, 30, True)):
        point = load(name)(SPACE, OBJECTIVES, history[:length], Random(5), **{option: value})
        assert (point != draw(SPACE, history[:length], Random(5))) == learning


def test_bayes_learns_with_one_objective_too():
    accuracy, space = named(["accuracy"]), SPACE

    def best(name: str, seed: int) -> float:
        history: list[Trial] = []
        for number in range(50):
            point = load(name)(space, accuracy, history, Random(f"{seed}:{number}"))
            state, outcome = measure(point)
            history.append(Trial(number=number, params=point, recipe=RECIPE, state=state, outcome=outcome))
        return max(t.outcome.scores["accuracy"] for t in history if t.state == "complete")

    assert statistics.median(best("bayes", s) for s in SEEDS) > statistics.median(best("random", s) for s in SEEDS)


def test_nsga2_takes_values_from_its_parents():
    # With children of the best alone, choices and ranges that only the worst have become rare.
    history = [t for t in search("random", 3, 100) if t.state == "complete"]
    good = [
        t.model_copy(update={"outcome": Outcome(scores={"accuracy": 0.9 if t.params["targets"] == "mlp" else 0.1}, seconds=1.0)})
        for t in history
    ]
    children = [load("nsga2")(SPACE, OBJECTIVES, good, Random(i), population=8) for i in range(30)]
    assert sum(child["targets"] == "mlp" for child in children) >= 22
    assert len({key(child) for child in children}) == 30
