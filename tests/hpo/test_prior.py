"""What a study begins with because it was known before, how much of it, and that it stays on the record."""

from __future__ import annotations

import json

import pytest

from hpo import prior, run
from hpo.errors import NotFound
from hpo.objectives import named
from hpo.space import Space
from hpo.spec import load
from hpo.trial import Trial
from tests.contracts import command, simulated
from training.recipe import Outcome, Recipe

OBJECTIVES = named(["accuracy", "seconds"])
RECIPE = Recipe()
SPACE = Space(
    {
        "rank": {"type": "choice", "values": [4, 16, 64]},
        "alpha": {"type": "choice", "values": [1, 2, 4], "times": "rank"},
        "learning_rate": {"type": "float", "low": 1e-5, "high": 1e-2, "log": True},
    }
)


def trial(number: int, rate: float, accuracy: float, seconds: float, state: str = "complete") -> Trial:
    params = {"rank": 16, "alpha": 2, "learning_rate": rate}
    outcome = Outcome(scores={"accuracy": accuracy}, seconds=seconds)
    return Trial(number=number, params=params, recipe=SPACE.resolve(params, RECIPE), state=state, outcome=outcome)


def test_a_front_is_taken_from_its_ends_inwards_and_nothing_else_of_a_study_is():
    trials = [trial(0, 1e-4, 0.5, 1), trial(1, 6e-4, 0.7, 2), trial(2, 3e-4, 0.9, 9), trial(3, 4e-4, 0.4, 5),
              trial(4, 5e-4, 0.99, 0.1, "stopped")]  # fmt: skip
    found = prior.points(SPACE, OBJECTIVES, RECIPE, [trials], limit=10)
    assert [point["learning_rate"] for point in found] == [3e-4, 1e-4, 6e-4]
    assert prior.points(SPACE, OBJECTIVES, RECIPE, [trials], limit=2) == found[:2]


def test_studies_take_turns_and_a_point_is_named_once():
    first, second = [trial(0, 1e-4, 0.5, 1), trial(1, 6e-4, 0.9, 2)], [trial(0, 1e-4, 0.5, 1), trial(1, 7e-4, 0.8, 3)]
    found = prior.points(SPACE, OBJECTIVES, RECIPE, [first, second], limit=10)
    assert [point["learning_rate"] for point in found] == [6e-4, 7e-4, 1e-4]


def test_points_of_another_space_are_found_again_by_their_recipe_or_left_out():
    other = Space({"learning_rate": {"type": "float", "low": 1e-5, "high": 1.0, "log": True}})
    params = [{"learning_rate": 5e-4}, {"learning_rate": 0.5}]
    trials = [
        Trial(number=i, params=p, recipe=other.resolve(p, RECIPE), state="complete",
              outcome=Outcome(scores={"accuracy": i / 2}, seconds=1.0 + i))
        for i, p in enumerate(params)
    ]  # fmt: skip
    assert prior.points(SPACE, OBJECTIVES, RECIPE, [trials], limit=5) == [{"rank": 16, "alpha": 2, "learning_rate": 5e-4}]


def test_what_is_known_of_lora_is_a_rate_that_the_rank_does_not_move_and_twice_the_rank_as_alpha():
    found = prior.points(SPACE, OBJECTIVES, RECIPE, [], limit=5, lora=True, hidden=2000)
    assert [point["rank"] for point in found] == [16, 4, 64, 16, 4]
    assert {point["alpha"] for point in found} == {2}
    assert [point["learning_rate"] for point in found[:3]] == [pytest.approx(5e-4)] * 3
    wide = prior.points(SPACE, OBJECTIVES, RECIPE, [], limit=1, lora=True, hidden=8000)
    assert wide[0]["learning_rate"] < 2e-4
    full = Recipe(adapter="full")
    assert prior.points(SPACE, OBJECTIVES, full, [], limit=5, lora=True) == []


@pytest.mark.parametrize(("trials", "points"), [(1, 1), (19, 1), (20, 2), (100, 10)])
def test_a_prior_is_a_tenth_of_the_trials(trials, points):
    assert prior.count(trials) == points


def test_points_of_an_earlier_study_come_after_the_defaults_and_stay_on_the_record(tmp_path):
    run(simulated(tmp_path, name="earlier", budget={"trials": 3}))
    study = run(simulated(tmp_path, name="later", prior=["earlier", "lora"], budget={"trials": 8}))
    origins = [t.origin for t in study.store.trials(study.record.id)]
    assert origins[:2] == ["defaults", "prior"] and set(origins[2:]) == {"random"}
    assert len(study.record.spec.prior.points) == 1
    assert study.replay().difference is None
    again = run(simulated(tmp_path, name="later", prior="lora", budget={"trials": 9}))
    assert again.record.spec.prior == study.record.spec.prior
    assert again.replay().difference is None


def test_a_prior_may_be_a_name_a_list_or_none(tmp_path):
    assert load(simulated(tmp_path, prior="lora")).spec.prior.sources == ("lora",)
    assert load(simulated(tmp_path, prior=["a", "lora"])).spec.prior.sources == ("a", "lora")
    assert load(simulated(tmp_path, prior="none")).spec == load(simulated(tmp_path)).spec


def test_an_earlier_study_that_is_not_there_is_said_before_anything_is_written(tmp_path):
    run(simulated(tmp_path, name="earlier"))
    with pytest.raises(NotFound, match="earlyer"):
        run(simulated(tmp_path, name="later", prior="earlyer"))
    with pytest.raises(NotFound):
        run(simulated(tmp_path, name="third", prior="later"))


def test_why_an_algorithm_was_chosen_is_checked_kept_and_shown(tmp_path, capsys):
    code, out, _ = command(capsys, "check", _file(tmp_path, algorithm="nsga2"))
    assert code == 0 and "nsga2 needs about 300 trials" in " ".join(out.split())
    study = run(simulated(tmp_path, name="chosen", algorithm="auto", budget={"trials": 2}))
    assert study.advice == ["algorithm: auto takes bayes: a model learns most from few trials; a Gaussian process at first, "
                            "Parzen estimators beyond 150 results."]  # fmt: skip
    _, out, _ = command(capsys, "show", "chosen", "--storage", tmp_path)
    assert "auto takes bayes" in out
    again = run(simulated(tmp_path, name="chosen", algorithm="auto", budget={"trials": 3}))
    assert again.advice == study.advice


def _file(folder, **changes):
    path = folder / "study.yaml"
    path.write_text(json.dumps(simulated(folder, **changes)))
    return path
