"""A study is derived again from its record: with trials side by side, interruptions, orders; and what was changed is found."""

from __future__ import annotations

import json

import pytest
from contracts import command, one_object, searching, simulated

from hpo.local import run_search
from hpo.replay import replay
from hpo.simulator import closed_form, simulate
from hpo.spec import load
from hpo.steer import Steer
from hpo.store import Store
from training import simulate as training


def told(trials) -> list[tuple]:
    return [(t.params, t.state, t.outcome and t.outcome.model_dump()) for t in trials]


@pytest.mark.parametrize("order", ["finished", "number"])
@pytest.mark.parametrize("algorithm, rule", [("bayes", "front"), ("nsga2", "asha"), ("random", "fixed")])
def test_a_study_with_trials_side_by_side_is_derived_again(algorithm, rule, order):
    budget = {"trials": 30, "parallel": 4, "order": order}
    spec = load(simulated("/x", algorithm=algorithm, budget=budget, stopping=rule, evaluation={"reports": 8})).spec
    made = simulate(spec, closed_form(spec, training.train), slots=4)
    again = replay(made.search.store, made.search.study)
    assert (again.difference, again.suggestions, again.unknown) == (None, 30, 0)
    assert again.decisions == sum(row["kind"] == "report" for row in made.search.store.order)
    assert any(t.state == "stopped" for t in made.trials)


@pytest.mark.parametrize("rule", ["none", "front", "fixed"])
def test_by_number_the_same_seed_gives_the_same_study_with_one_slot_and_with_many(rule):
    budget = {"trials": 30, "parallel": 5, "order": "number", "stall": {"trials": 10, "gain": 0.05}}
    spec = load(simulated("/x", algorithm="bayes", budget=budget, stopping=rule, evaluation={"reports": 8})).spec
    one, many = (simulate(spec, closed_form(spec, training.train), slots=slots) for slots in (1, 5))
    assert told(one.trials) == told(many.trials)
    assert many.seconds < one.seconds / 2
    free = load(simulated("/x", algorithm="bayes", budget={"trials": 30}, stopping=rule, evaluation={"reports": 8})).spec
    one, many = (simulate(free, closed_form(free, training.train), slots=slots) for slots in (1, 5))
    assert told(one.trials) != told(many.trials), "as things end, it matters what ended first"


def study_in(store: Store, *, trials: int, **changes) -> None:
    written = simulated("/x", algorithm="bayes", stopping="fixed", evaluation={"reports": 6}, **changes)
    with searching(store, written | {"budget": {"trials": trials}}) as search:
        run_search(search, training.train, search.spec.data)


def test_a_study_that_was_interrupted_changed_its_rule_and_was_steered_is_derived_again():
    store = Store("sqlite://")
    study_in(store, trials=12)
    record = store.study("small")
    written = simulated("/x", algorithm="bayes", stopping={"name": "fixed", "share": 0.6}, evaluation={"reports": 6})
    with searching(store, written | {"budget": {"trials": 18}}) as search:
        hanging = search.ask()
        reports = closed_form(search.spec, training.train)(hanging).reports
        search.report(hanging.number, reports[0])
    Steer(store, record).range("learning_rate", 5e-4, 5e-3)
    Steer(store, record).add(rank=32, batch_size=16, learning_rate=1e-3)
    with searching(store, written | {"budget": {"trials": 22}}) as search:
        run_search(search, training.train, search.spec.data)
    trials = store.trials(record.id)
    assert [t.attempts for t in trials].count(2) == 1
    assert any(t.origin == "steered" for t in trials)
    again = replay(store, store.study("small"))
    assert (again.difference, again.ordered, again.suggestions) == (None, 1, len(trials) - 1)


def test_what_was_changed_in_the_record_is_found_where_it_was_changed():
    from hpo import store as tables

    store = Store("sqlite://")
    study_in(store, trials=16)
    record = store.study("small")
    assert replay(store, record).difference is None
    trials = store.trials(record.id)
    other = trials[13].model_copy(update={"params": trials[13].params | {"rank": 16 if trials[13].params["rank"] != 16 else 8}})

    def write(trial):
        chosen = tables._trials.c.number == trial.number
        with store._begin() as db:
            db.execute(tables._trials.update().where(chosen).values(trial=trial.model_dump_json(exclude={"curve"})))

    write(other)
    parted = replay(store, record).difference
    assert (parted.trial, parted.step, parted.recorded["params"]) == (13, None, other.params)
    assert parted.derived["params"] == trials[13].params
    write(trials[13])
    scores = trials[3].outcome.model_copy(update={"scores": {"accuracy": 0.999}})
    write(trials[3].model_copy(update={"outcome": scores}))
    assert replay(store, record).difference.trial >= 10, "what was learned from it is no longer what was proposed"


def test_a_decision_that_the_rule_would_not_have_taken_is_found():
    spec = load(simulated("/x", budget={"trials": 20}, stopping="fixed", evaluation={"reports": 8})).spec
    made = simulate(spec, closed_form(spec, training.train))
    row = next(row for row in made.search.store.order if row["kind"] == "report" and row["said"])
    row["said"] = None
    parted = replay(made.search.store, made.search.study).difference
    assert (parted.trial, parted.step, parted.recorded) == (row["number"], row["step"], "go on")
    assert parted.derived.startswith("beaten by trial")


def test_the_command_says_that_all_is_as_recorded_or_what_differs(tmp_path, capsys):
    import hpo
    from hpo.store import open_store

    hpo.run(simulated(tmp_path, budget={"trials": 3}))
    code, out, _ = command(capsys, "replay", "small", "--storage", tmp_path)
    assert code == 0 and "3 suggestions and 12 decisions on reports derived again; all as recorded." in out
    found = one_object(command(capsys, "replay", "small", "--storage", tmp_path, "--json")[1])
    assert found["difference"] is None and found["suggestions"] == 3
    store = open_store(str(tmp_path))
    with store._begin() as db:
        db.exec_driver_sql("UPDATE trials SET trial = json_set(trial, '$.params.rank', 999) WHERE number = 2")
    code, out, _ = command(capsys, "replay", "small", "--storage", tmp_path)
    assert code == 1 and "then trial 2 differs" in out and "999" in out


def test_versions_that_differ_are_named():
    spec = load(simulated("/x")).spec
    made = simulate(spec, closed_form(spec, training.train))
    begun = made.search.store.order[0]
    begun["said"] = json.dumps(json.loads(begun["said"]) | {"versions": {"optuna": "1.0", "numpy": "0.1"}})
    assert [name for name, _, _ in replay(made.search.store, made.search.study).versions] == ["optuna", "numpy"]
