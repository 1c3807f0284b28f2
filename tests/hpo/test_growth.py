"""How a study's hypervolume grew: against a reference that does not move, until it no longer does."""

from __future__ import annotations

import random

import pytest
from contracts import searching, simulated

from hpo import growth
from hpo.objectives import named
from hpo.simulator import closed_form, simulate
from hpo.spec import load
from hpo.store import Store
from hpo.trial import Trial
from training import simulate as training
from training.recipe import Outcome, Recipe

RECIPE = Recipe()
TWO = named(["accuracy", "seconds"])


def trials(*values: tuple[float, float], state: str = "complete") -> list[Trial]:
    return [
        Trial(number=n, params={}, recipe=RECIPE, state=state, finished=float(n),
              outcome=Outcome(scores={"accuracy": a}, seconds=s))
        for n, (a, s) in enumerate(values)
    ]  # fmt: skip


FLAT = [(0.5, 10.0)] * 8


def test_the_reference_is_a_limit_or_a_tenth_beyond_the_worst_of_the_first_trials():
    values = [(0.1 * n, 10.0 + n) for n in range(1, 9)]
    assert growth.reference(trials(*values[:7]), TWO, {}) is None
    assert growth.reference(trials(*values), TWO, {}) == pytest.approx([-0.1 + 0.07, 18.7])
    assert growth.reference(trials(*values), TWO, {"seconds": 12.5}) == pytest.approx([-0.03, 12.5])
    assert growth.reference(trials(*values, (0.0, 99.0)), TWO, {}) == pytest.approx([-0.03, 18.7]), "later ones do not move it"


def test_volumes_count_complete_trials_alone_in_the_order_in_which_they_ended():
    made = trials((0.5, 4.0), (0.9, 1.0), (0.8, 2.0))
    made[1] = made[1].model_copy(update={"state": "stopped"})
    assert growth.volumes(made, TWO, [0.0, 10.0]) == pytest.approx([3.0, 3.0, 6.4])
    late = [t.model_copy(update={"finished": 10.0 - t.number}) for t in made]
    assert growth.volumes(late, TWO, [0.0, 10.0]) == pytest.approx([6.4, 6.4, 6.4])


def test_a_search_has_stalled_when_the_last_trials_together_added_too_little():
    grown = [1.0] * 8 + [2.0, 2.0, 2.01]
    assert growth.stalled(grown, trials=2, gain=0.01)
    assert not growth.stalled(grown, trials=2, gain=0.004)
    assert not growth.stalled(grown, trials=3, gain=0.01), "the jump is among them"
    assert not growth.stalled(grown[:9], trials=2, gain=0.01), "too few to say"


def test_what_ten_more_trials_bring_is_foretold_about_right_for_a_search_at_random():
    inside, errors = 0, []
    for seed in range(40):
        chance = random.Random(seed)
        values = [(chance.random(), chance.random()) for _ in range(70)]
        grown = growth.volumes(trials(*values), TWO, [0.0, 1.0])
        told = growth.forecast(grown[:60])
        came = grown[69] / grown[59] - 1
        errors.append(told.gain - came)
        inside += told.low - 1e-9 <= came <= told.high + 1e-9
    assert abs(sum(errors) / len(errors)) < 0.02, "no bias to speak of"
    assert inside >= 26, f"an 80 % interval, by chance and by its simplicity: {inside} of 40"
    assert growth.forecast(grown[:10]) is None


def test_a_stalled_study_starts_no_more_trials_and_its_reference_is_kept():
    written = simulated("/x", budget={"trials": 400, "stall": {"trials": 15, "gain": 0.02}})
    spec = load(written).spec
    made = simulate(spec, closed_form(spec, training.train), slots=2)
    assert 23 <= len(made.trials) < 300
    assert all(t.state == "complete" or t.state == "diverged" for t in made.trials)
    kinds = [event["kind"] for event in made.search.store.events(1)]
    assert kinds == ["reference", "stalled"]
    point = made.search.store.events(1)[0]["point"]
    assert point == growth.reference(made.trials, spec.targets, {})


def test_a_study_that_is_continued_keeps_its_reference():
    store = Store("sqlite://")
    written = simulated("/x", budget={"trials": 30, "stall": {"trials": 5, "gain": 1.0}})
    with searching(store, written) as search:
        while (trial := search.ask()) is not None:
            search.tell(trial.number, training.train(_job(trial, search), lambda progress: None))
        first = search._reference
    with searching(store, written) as search:
        assert search._reference == first is not None
        assert search.ask() is None
    assert len([e for e in store.events(1) if e["kind"] == "reference"]) == 1


def _job(trial, search):
    from hpo.search import job_of

    return job_of(trial, search.spec, search.spec.data)


# What it costs


def test_cost_is_training_seconds_of_all_devices_at_the_price():
    written = simulated("/x", objectives=["accuracy", "cost"], resources={"mode": "local", "price": 3.6, "gpus": 0})
    spec = load(written).spec
    made = simulate(spec, closed_form(spec, training.train))
    for trial in made.trials:
        assert spec.targets[1].of(trial.outcome) == pytest.approx(trial.outcome.seconds * 0.001)
    assert made.search.cost == pytest.approx(made.cost * 0.001)


def test_a_budget_of_cost_ends_the_search_when_it_is_spent():
    written = simulated("/x", budget={"trials": 100, "cost": 0.1}, resources={"mode": "local", "price": 3.6})
    spec = load(written).spec
    made = simulate(spec, closed_form(spec, training.train), slots=3)
    assert made.search.stopping == "budget.cost (0.1) is spent"
    assert 0.1 <= made.search.cost < 0.11
    assert 5 < len(made.trials) < 30
    again = load(written | {"budget": {"trials": 100}}).spec
    assert len(simulate(again, closed_form(again, training.train)).trials) == 100


def test_a_limit_of_cost_is_one_of_seconds_and_a_point_like_those_that_were_too_long_is_refused():
    limits, price = {"cost": 0.006}, {"mode": "local", "price": 3.6}
    written = simulated("/x", limits=limits, resources=price, budget={"trials": 30},
                        space={"learning_rate": {"type": "float", "low": 1e-3, "high": 1e-2, "log": True},
                               "epochs": {"type": "choice", "values": [0.5, 1.0, 2.0]}})  # fmt: skip
    spec = load(written).spec
    assert spec.seconds_limit == pytest.approx(6.0)
    made = simulate(spec, closed_form(spec, training.train))
    refused = [t for t in made.trials if not t.attempts]
    assert {t.recipe.epochs for t in refused} == {1.0, 2.0}, "half an epoch takes 4.2 s, a whole one 8.3"
    assert all("seconds predicted from other trials, over the limit of 6" in t.error and t.outcome.seconds > 6 for t in refused)
    assert {t.recipe.epochs for t in made.trials[5:] if t.attempts} == {0.5}


@pytest.mark.parametrize("part", [{"limits": {"cost": 1.0}}, {"budget": {"cost": 1.0}}, {"objectives": ["accuracy", "cost"]}])
def test_cost_without_a_price_is_refused(part):
    from hpo.errors import SpecError

    with pytest.raises(SpecError, match="resources.price"):
        load(simulated("/x", **part))


def test_show_says_what_ten_more_trials_would_probably_bring():
    from hpo.show import outlook_text
    from hpo.study import Study

    store = Store("sqlite://")
    with searching(store, simulated("/x", budget={"trials": 17})) as search:
        assert Study(store, "small").outlook() is None
        while (trial := search.ask()) is not None:
            search.tell(trial.number, training.train(_job(trial, search), lambda progress: None))
    told = Study(store, "small").outlook()
    assert told.more == 10 and 0 <= told.low <= told.gain <= told.high
    assert outlook_text(told).startswith("10 more trials would probably grow the hypervolume by ")
    assert outlook_text(None) == ""
