"""Which model and which algorithm are asked, what they are told of memory, and how random search fills a space."""

from __future__ import annotations

from random import Random

import pytest

from hpo.algorithms import auto, bayes, load
from hpo.algorithms._lesson import fewer, lessons
from hpo.algorithms.random import draw
from hpo.objectives import named
from hpo.space import Space, key
from hpo.trial import Trial
from training.recipe import Outcome, Recipe

RECIPE = Recipe()
OBJECTIVES = named(["accuracy", "seconds"])
SPACE = Space({"dropout": {"type": "float", "low": 0.0, "high": 0.9}, "batch_size": {"type": "int", "low": 1, "high": 64}})


def trial(number: int, params: dict, peak: int | None, state: str = "complete", accuracy: float = 0.5) -> Trial:
    outcome = Outcome(scores={"accuracy": accuracy}, seconds=1.0 + number, peak_bytes=peak)
    return Trial(number=number, params=params, recipe=RECIPE, state=state, outcome=outcome)


def test_bytes_say_how_far_a_point_is_from_the_limit_on_either_side():
    gb = 2**30
    history = [trial(i, {"dropout": 0.1, "batch_size": i + 1}, size, state) for i, (size, state) in enumerate([
        (1 * gb, "complete"), (4 * gb, "complete"), (16 * gb, "infeasible"), (64 * gb, "infeasible"), (None, "infeasible"),
        (2 * gb, "infeasible"),
    ])]  # fmt: skip
    found = lessons(SPACE, OBJECTIVES, history)
    assert [lesson.excess for lesson in found[:4]] == pytest.approx([-3, -1, 1, 3])  # the limit is taken for 8 GB
    assert [lesson.excess for lesson in found[4:]] == [None, None]  # with 2 GB it is infeasible for another reason
    near = [trial(6, {"dropout": 0.2, "batch_size": 9}, 5 * gb, "infeasible")]
    milder = lessons(SPACE, OBJECTIVES, history + near)
    assert 0 < milder[-1].violation < milder[2].violation <= 1
    assert [lesson.violation for lesson in milder[4:6]] == [1.0, 1.0]


def test_no_limit_is_made_up_where_none_was_met():
    history = [trial(i, {"dropout": 0.1, "batch_size": i + 1}, 10**9) for i in range(3)]
    assert {lesson.excess for lesson in lessons(SPACE, OBJECTIVES, history)} == {None}


def test_the_front_survives_when_a_history_is_thinned_out():
    rng = Random(0)
    history = [trial(i, SPACE.sample(rng), 1, accuracy=rng.random() * i / 100) for i in range(100)]
    learned = lessons(SPACE, OBJECTIVES, history)
    kept = fewer(learned, 40, Random(1))
    assert len(kept) == 40 and kept == [lesson for lesson in learned if lesson in kept]
    best = max(learned, key=lambda lesson: -lesson.vector[0])
    assert best in kept and fewer(learned, 100, rng) == learned


def test_a_process_is_asked_early_by_turns_where_dimensions_are_conditional_and_estimators_otherwise():
    def told(count: int, space: Space = SPACE):
        rng = Random(0)
        return space, lessons(space, OBJECTIVES, [trial(i, space.sample(rng), 1, accuracy=i / 1000) for i in range(count)])

    conditional = Space({"targets": {"type": "choice", "values": ["mlp", "attention"]},
                         "rank": {"type": "int", "low": 1, "high": 64, "when": {"targets": "mlp"}}})  # fmt: skip
    assert [bayes.choose(*told(20), "auto", turn) for turn in (20, 21)] == ["gp", "gp"]
    assert bayes.choose(*told(151), "auto", 151) == "tpe"
    assert [bayes.choose(*told(20, conditional), "auto", turn) for turn in (20, 21)] == ["tpe", "gp"]
    assert bayes.choose(*told(20, conditional), "gp", 20) == "gp"
    assert bayes.choose(*told(1), "gp", 1) == "tpe"


@pytest.mark.parametrize("model", ["gp", "tpe"])
def test_both_models_keep_off_a_wall_of_memory(model):
    rng, history = Random(0), []
    for number in range(30):
        point = SPACE.sample(rng)
        size = point["batch_size"] * 10**8
        state = "infeasible" if size > 2.5e9 else "complete"
        history.append(trial(number, point, size, state, accuracy=point["batch_size"] / 100))
    named_points = [load("bayes")(SPACE, OBJECTIVES, history, Random(seed), model=model) for seed in range(8)]
    assert sum(point["batch_size"] > 25 for point in named_points) <= 2  # 61 % of the space is beyond


def test_auto_tries_a_small_space_out_and_says_why_it_chose():
    small = Space({"bits": {"type": "choice", "values": [32, 4]}, "rank": {"type": "choice", "values": [4, 8]}})
    assert auto.choose(small, 2, 0) == ("grid", "the space has 4 points, so all of them are tried.")
    assert auto.choose(SPACE, 2, 0)[0] == "bayes"
    assert auto.choose(SPACE, 2, 500)[0] == "nsga2"
    assert auto.choose(SPACE, 1, 500)[0] == "bayes"


def test_random_search_fills_a_space_more_evenly_than_independent_draws():
    def gaps(next_point, seed: int) -> float:
        history: list[Trial] = []
        for number in range(33):
            point = next_point(history, Random(f"{seed}:{number}"))
            history.append(Trial(number=number, params=point, recipe=RECIPE, origin="random"))
        places = sorted(t.params["dropout"] for t in history[1:])
        return max(b - a for a, b in zip([0.0, *places], [*places, 0.9], strict=True))

    sobol = [gaps(lambda history, rng: load("random")(SPACE, OBJECTIVES, history, rng), seed) for seed in range(5)]
    apart = [gaps(lambda history, rng: draw(SPACE, history, rng), seed) for seed in range(5)]
    assert max(sobol) < min(apart)


def test_each_seed_has_a_sequence_of_its_own_and_defaults_do_not_decide_it():
    def points(seed: int) -> list:
        history = [Trial(number=0, params={"dropout": 0.1, "batch_size": 8}, recipe=RECIPE, origin="defaults")]
        for number in range(1, 6):
            point = load("random")(SPACE, OBJECTIVES, history, Random(f"{seed}:{number}"))
            history.append(Trial(number=number, params=point, recipe=RECIPE, origin="random"))
        return [key(t.params) for t in history[1:]]

    assert points(0) == points(0)
    assert not set(points(0)) & set(points(1))
