"""Orders from outside: followed by a running search, kept, refused with a reason, and the same again in a replay."""

from __future__ import annotations

import threading

import pytest
from contracts import SPACE, command, one_object, searching, simulated

import hpo
from hpo import steer
from hpo.errors import InputError, NotFound
from hpo.local import run_search
from hpo.steer import Steer
from hpo.store import Store
from training import simulate
from training.recipe import Outcome, Progress

GOOD = Outcome(scores={"accuracy": 0.5}, loss=1.0, seconds=2.0, peak_bytes=3)
PROGRESS = Progress(step=1, steps=4, tokens=10, share=0.25, seconds=0.5, metrics={"accuracy": 0.1})
POINT = {"rank": 32, "learning_rate": 0.003, "batch_size": 4}


@pytest.fixture
def store(tmp_path):
    store = Store(f"sqlite:///{tmp_path}/hpo.db")
    yield store
    store.close()


def rules(raised) -> str:
    return " ".join(str(problem) for problem in raised.value.problems)


# Trials


def test_an_added_trial_is_next_and_its_order_says_which_it_became(store):
    with searching(store, simulated("/x", budget={"trials": 5})) as search:
        search.tell(search.ask().number, GOOD)
        orders = Steer(store, search.study)
        given = orders.add(**POINT)
        assert given.waits
        added, after = search.ask(), search.ask()
    assert (added.number, added.params, added.recipe.rank, added.origin) == (1, POINT, 32, "steered")
    assert after.origin == "random"
    assert [(o.do, o.trial, o.refused) for o in orders.orders()] == [("add", 1, "")]


def test_what_is_left_out_of_an_added_point_is_the_defaults(store):
    with searching(store, simulated("/x")) as search:
        order = Steer(store, search.study).add(rank=4)
    assert order.data["params"] == {"rank": 4, "learning_rate": 2e-4, "batch_size": 8}


def test_a_clone_is_the_trial_but_for_the_edit(store):
    with searching(store, simulated("/x", start=[POINT])) as search:
        for _ in range(2):
            search.tell(search.ask().number, GOOD)
        Steer(store, search.study).clone(1, rank=8)
        clone = search.ask()
    assert (clone.params, clone.origin) == (POINT | {"rank": 8}, "steered")


def test_an_added_trial_is_run_though_the_budget_is_spent_and_counts_against_it(store):
    with searching(store, simulated("/x", budget={"trials": 2})) as search:
        run_search(search, simulate.train, search.spec.data)
        Steer(store, search.study).add(**POINT)
        assert search.ask().params == POINT
        assert search.ask() is None
        assert search.launched == 3


def test_a_value_outside_the_range_is_tried_and_the_search_does_not_learn_from_it(store):
    with searching(store, simulated("/x")) as search:
        search.tell(search.ask().number, GOOD)
        Steer(store, search.study).add(rank=64)
        assert search.ask().recipe.rank == 64
        assert not search.spec.space.contains(search.trials[1].params)


def test_a_stopped_trial_ends_at_its_next_report_as_cancelled_and_no_other_does(store):
    with searching(store, simulated("/x")) as search:
        one, other = search.ask(), search.ask()
        Steer(store, search.study).stop(one.number)
        assert search.report(other.number, PROGRESS) is None
        reason = search.report(one.number, PROGRESS)
        assert reason == "stopped by the user"
        told = search.tell(one.number, Outcome(ended="stopped", reason=reason, share=0.25))
        assert (told.state, told.error) == ("cancelled", reason)
        assert search.launched == 1


def test_a_stopped_trial_whose_process_died_first_is_not_launched_again(store):
    written = simulated("/x")
    with searching(store, written) as search:
        trial = search.ask()
        Steer(store, search.study).stop(trial.number)
        search.report(trial.number, PROGRESS)
    with searching(store, written) as search:
        assert search.ask().number == 1
        assert search.trials[0].state == "cancelled"


# Ranges and budgets


def test_a_narrowed_range_holds_from_the_next_trial_on_and_what_was_tried_stays(store):
    with searching(store, simulated("/x", budget={"trials": 30})) as search:
        for _ in range(8):
            search.tell(search.ask().number, GOOD)
        orders = Steer(store, search.study)
        orders.range("rank", 4, 8)
        orders.range("learning_rate", 1e-3, 3e-3)
        later = [search.ask() for _ in range(8)]
        assert {t.recipe.rank for t in later} <= {4, 8}
        assert all(1e-3 <= t.recipe.learning_rate <= 3e-3 for t in later)
        assert {t.recipe.rank for t in search.trials[:8]} - {4, 8}
        assert len(search.trials) == 16
        assert {o.trial for o in orders.orders()} == {8}


def test_a_range_can_be_widened_and_every_trial_has_a_place_in_the_hull(store):
    with searching(store, simulated("/x", budget={"trials": 12})) as search:
        orders = Steer(store, search.study)
        orders.range("rank", 64, 128)
        orders.range("learning_rate", 1e-5, 1e-3)
        run_search(search, simulate.train, search.spec.data)
        tried = search.trials
        wide = steer.hull(search.study.spec, orders.orders())
    assert {t.recipe.rank for t in tried[1:]} == {64, 128}
    assert list(wide["rank"].values) == [4, 8, 16, 32, 64, 128]
    assert (wide["learning_rate"].low, wide["learning_rate"].high) == (1e-5, 3e-2)
    assert all(wide.contains(t.params) for t in tried if t.params)


def test_a_larger_budget_is_followed_and_a_study_file_that_asks_for_more_gets_it(store):
    with searching(store, simulated("/x", budget={"trials": 2})) as search:
        Steer(store, search.study).budget(trials=5)
        run_search(search, simulate.train, search.spec.data)
        assert search.launched == 5
    with searching(store, simulated("/x", budget={"trials": 9})) as search:
        assert search.spec.budget.trials == 9
    with searching(store, simulated("/x", budget={"trials": 2})) as search:
        assert search.spec.budget.trials == 5


def test_the_study_at_any_earlier_trial_can_be_worked_out_again(store):
    with searching(store, simulated("/x", budget={"trials": 20})) as search:
        orders = Steer(store, search.study)
        for number in range(9):
            if number in (3, 6):
                orders.range("rank", 4, 8) if number == 3 else orders.range("rank", 16, 64)
            search.tell(search.ask().number, GOOD)
        kept = orders.orders()
        spaces = [steer.steered(search.study.spec, kept, number).space["rank"].values for number in range(9)]
    assert spaces == [(4, 8, 16, 32)] * 3 + [(4, 8)] * 3 + [(16, 64)] * 3


def test_orders_survive_the_search_and_are_followed_by_the_next_one(store):
    written = simulated("/x", budget={"trials": 6})
    with searching(store, written) as search:
        search.tell(search.ask().number, GOOD)
        study = search.study
    orders = Steer(store, study)
    orders.range("rank", 4, 8)
    orders.add(**POINT)
    with searching(store, written) as search:
        assert search.ask().params == POINT
        assert search.ask().recipe.rank in (4, 8)
    with searching(store, written) as search:  # and not once more
        assert search.spec.space["rank"].values == (4, 8)
        assert [search.ask().origin for _ in range(3)] == ["steered", "random", "random"]  # two of them launched again
        assert len(search.trials) == 4


# What is refused


@pytest.mark.parametrize(("order", "said"), [
    (lambda s: s.add(rnak=4), "rnak: is not varied by this study. Did you mean rank?"),
    (lambda s: s.add(rank=0), "rank: must be at least 1"),
    (lambda s: s.clone(0), "needs what is to differ"),
    (lambda s: s.stop(0), "trial 0 is complete already"),
    (lambda s: s.range("epochs", 1, 2), "is no dimension of the space"),
    (lambda s: s.range("learning_rate", 1e-2, 1e-3), "low must be below high"),
    (lambda s: s.range("learning_rate", 1e-4), "needs a low and a high end"),
    (lambda s: s.range("learning_rate", -1, 1), "low must be above 0"),
    (lambda s: s.range("rank", 8, 9999), "less than or equal to 4096"),
    (lambda s: s.range("rank"), "values must not be empty"),
    (lambda s: s.budget(trials=4), "must be a number above 4"),
    (lambda s: s.budget(hours=2), "has no limit"),
    (lambda s: s.budget(parallel=2), "cannot be extended while a study runs"),
    (lambda s: s.add(rank=16, learning_rate=2e-4, batch_size=8), "is that of trial 0"),
])  # fmt: skip
def test_an_order_that_cannot_be_followed_is_refused_with_the_reason_and_not_kept(store, order, said):
    with searching(store, simulated("/x")) as search:
        search.tell(search.ask().number, GOOD)
        orders = Steer(store, search.study)
        with pytest.raises(InputError) as raised:
            order(orders)
        assert said in rules(raised)
        assert orders.orders() == []


def test_an_unknown_trial_is_named(store):
    with searching(store, simulated("/x")) as search:
        with pytest.raises(NotFound, match="no trial 7"):
            Steer(store, search.study).stop(7)


def test_an_order_that_came_too_late_is_refused_on_the_record(store):
    with searching(store, simulated("/x")) as search:
        trial, orders = search.ask(), Steer(store, search.study)
        orders.stop(trial.number)
        search.tell(trial.number, GOOD)
        orders.add(**POINT)
        orders.add(**POINT)
        search.ask()
        assert [o.refused for o in orders.orders()] == ["it was complete by then", "", "it was ordered before"]
        assert search.trials[0].state == "complete"


# Doors


def test_a_study_that_runs_in_the_background_is_steered_from_the_notebook(tmp_path):
    reported, go_on = threading.Event(), threading.Event()

    def train(job, report):
        if job.recipe.learning_rate == 2e-4:  # the defaults wait for the orders
            reported.set()
            assert go_on.wait(30)
        return simulate.train(job, report)

    study = hpo.start(simulated(tmp_path, budget={"trials": 2}), train=train)
    assert reported.wait(30)
    study.steer.stop(0)
    study.steer.budget(trials=4)
    study.steer.add(**POINT)
    go_on.set()
    study.wait(60)
    trials = study.history()
    assert [t.state for t in trials] == ["cancelled", *["complete"] * 4]
    assert trials[1].params == POINT
    assert "budget trials=4" in study.view().settings["steered"]


def test_the_command_line_steers_and_lists_what_became_of_it(tmp_path, capsys):
    storage, written = tmp_path / "store", simulated(tmp_path / "store")
    hpo.run(written)
    for order in ("range learning_rate 1e-3 1e-2", "clone 0 rank=32", "budget trials=6"):
        code, _, err = command(capsys, "steer", "small", *order.split(), "--storage", storage)
        assert code == 0 and "its next run follows it" in err
    code, _, err = command(capsys, "steer", "small", "stop", "0", "--storage", storage)
    assert code == 2 and "complete already" in err
    study = hpo.run(written)
    assert len(study.history()) == 6 and study.history()[4].recipe.rank == 32
    code, out, _ = command(capsys, "steer", "small", "--storage", storage, "--json")
    assert [(o["do"], o["trial"]) for o in one_object(out)["orders"]] == [("range", 4), ("clone", 4), ("budget", 4)]
    assert command(capsys, "steer", "small", "jump", "--storage", storage)[0] == 2
    code, out, _ = command(capsys, "steer", "small", "--storage", storage)
    assert "clone 0 rank=32" in out and "trial 4" in out
    assert SPACE["rank"]["values"] == [4, 8, 16, 32]
