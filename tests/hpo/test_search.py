"""The order of trials, what becomes of each, and that a search that dies is continued as if it had not."""

from __future__ import annotations

import pytest
from contracts import SPACE, searching, simulated

from hpo import algorithms
from hpo.errors import StudyBusy
from hpo.local import run_search
from hpo.search import Search, job_of
from hpo.spec import load
from hpo.store import Store
from training import simulate
from training.model import describe
from training.recipe import Outcome, Progress


@pytest.fixture
def store(tmp_path):
    store = Store(f"sqlite:///{tmp_path}/hpo.db")
    yield store
    store.close()


GOOD = Outcome(scores={"accuracy": 0.5}, loss=1.0, seconds=2.0, peak_bytes=3)
PROGRESS = Progress(step=1, steps=4, tokens=10, share=0.25, seconds=0.5, metrics={"accuracy": 0.1})


def finish(search: Search, outcome: Outcome = GOOD) -> list[int]:
    """Tells every trial that is asked for the same outcome; returns their numbers."""
    numbers = []
    while (trial := search.ask()) is not None:
        search.tell(trial.number, outcome)
        numbers.append(trial.number)
    return numbers


def history(store: Store, study: int) -> list[tuple]:
    return [(t.number, t.params, t.recipe, t.state, t.origin) for t in store.trials(study)]


# Which trial is next


def test_the_defaults_are_first_then_the_start_points_in_order_then_the_algorithm(store):
    points = [{"rank": 32, "learning_rate": 0.003, "batch_size": 4}, {"rank": 4, "learning_rate": 0.001, "batch_size": 16}]
    with searching(store, simulated("/x", start=points, recipe={"rank": 16, "learning_rate": 0.02})) as search:
        finish(search)
        trials = search.trials
    assert [t.origin for t in trials] == ["defaults", "start", "start", "random"]
    assert trials[0].params == {"rank": 16, "learning_rate": 0.02, "batch_size": 8}
    assert [t.params for t in trials[1:3]] == points
    assert [t.recipe.rank for t in trials[:3]] == [16, 32, 4]


def test_defaults_outside_the_space_are_tried_all_the_same(store):
    with searching(store, simulated("/x", recipe={"batch_size": 2})) as search:
        first = search.ask()
    assert (first.params, first.recipe.batch_size, first.origin) == ({}, 2, "defaults")


def test_a_start_point_that_is_the_defaults_is_not_tried_twice(store):
    point = {"rank": 16, "learning_rate": 0.02, "batch_size": 8}
    with searching(store, simulated("/x", start=[point], recipe={"learning_rate": 0.02})) as search:
        finish(search)
        assert [t.origin for t in search.trials] == ["defaults", "random", "random", "random"]


def test_a_trial_is_on_the_record_before_it_is_handed_out(store):
    with searching(store, simulated("/x")) as search:
        trial = search.ask()
        assert store.trials(search.study.id) == [trial]
        assert (trial.state, trial.attempts) == ("running", 1)


def test_the_same_seed_gives_the_same_trials_and_another_seed_others(tmp_path):
    def points(seed, name):
        store = Store(f"sqlite:///{tmp_path}/{name}.db")
        with searching(store, simulated("/x", seed=seed)) as search:
            finish(search)
            return [t.params for t in search.trials]

    assert points(1, "a") == points(1, "b") != points(2, "c")


def test_a_job_holds_the_trial_and_the_rows_of_the_study_with_a_folder_of_its_own():
    spec = load(simulated("/x", limits={"seconds": 5}, evaluation={"rows": 3})).spec
    store = Store("sqlite://")
    with searching(store, simulated("/x", limits={"seconds": 5}, evaluation={"rows": 3})) as search:
        trial = search.ask()
    rows = spec.data.model_copy(update={"train": "/copy.jsonl"})
    moved = spec.model_copy(update={"recipe": spec.recipe.model_copy(update={"model": "/elsewhere"})})
    job = job_of(trial, moved, rows)
    assert job.recipe == trial.recipe.model_copy(update={"model": "/elsewhere"}), "a submitted job finds its model anew"
    assert (job.data, job.limits.seconds, job.evaluation.rows) == (rows, 5, 3)
    assert (job.output, job.cache) == ("/x/small/trials/00000", "/x/small/cache")


# How much


def test_the_budget_counts_every_launched_trial_but_the_cancelled(store):
    ended = ["complete", "infeasible", "diverged", "complete"]
    with searching(store, simulated("/x")) as search:
        for state in ended:
            trial = search.ask()
            search.tell(trial.number, GOOD.model_copy(update={"ended": state, "reason": "why"}))
        assert (search.launched, search.finished) == (4, 4)
        assert search.ask() is None
    with searching(store, simulated("/x", name="b")) as search:
        search.fail(search.ask().number, "broken", retry=False)
        first = search.ask()
        search.stop("enough")
        search.tell(first.number, GOOD.model_copy(update={"ended": "stopped"}))
        assert (search.launched, search.finished) == (1, 1)
    with searching(store, simulated("/x", name="b")) as search:
        assert len(finish(search)) == 3, "the cancelled one did not count, the failed one did"


def test_a_raised_budget_goes_on_with_the_next_number(store):
    with searching(store, simulated("/x")) as search:
        assert finish(search) == [0, 1, 2, 3]
    with searching(store, simulated("/x", budget={"trials": 6})) as search:
        assert finish(search) == [4, 5]
    with searching(store, simulated("/x", budget={"trials": 3})) as search:
        assert finish(search) == []


def test_a_search_ends_when_the_space_is_used_up(store):
    with searching(store, simulated("/x", space={"rank": [4, 16]}, budget={"trials": 9})) as search:
        assert finish(search) == [0, 1]


def test_hours_are_counted_over_all_sessions_and_end_the_running_trials(store):
    clock = [1000.0]
    written = simulated("/x", budget={"trials": 100, "hours": 1})
    with searching(store, written, clock=lambda: clock[0]) as search:
        first = search.ask()
        clock[0] += 2000
        assert search.report(first.number, PROGRESS) is None
        search.tell(first.number, GOOD)
        search.close()
    assert store.study("small").spent == 2000
    clock[0] += 1e6  # what passes between sessions does not count
    with searching(store, written, clock=lambda: clock[0]) as search:
        second = search.ask()
        clock[0] += 1500
        assert search.report(second.number, PROGRESS) is None
        clock[0] += 200
        assert "budget.hours (1.0) is spent" in search.report(second.number, PROGRESS)
        assert search.tell(second.number, GOOD.model_copy(update={"ended": "stopped"})).state == "cancelled"
        assert search.ask() is None
        search.close()
    assert store.study("small").spent == pytest.approx(3700)
    with searching(store, written, clock=lambda: clock[0]) as search:
        assert search.ask() is None


# What becomes of a trial


@pytest.mark.parametrize("ended", ["complete", "infeasible", "diverged", "stopped"])
def test_what_came_of_a_trial_is_kept_with_its_reason(store, ended):
    outcome = GOOD.model_copy(update={"ended": ended, "reason": "because"})
    with searching(store, simulated("/x")) as search:
        told = search.tell(search.ask().number, outcome)
        kept = store.trials(search.study.id)[0]
    assert told == kept
    assert (kept.state, kept.error, kept.outcome) == (ended, "because", outcome)
    assert kept.finished >= kept.started


BAD = {
    "missing score": {"scores": {}},
    "missing number": {"seconds": None},
    "infinite": {"seconds": float("inf")},
    "not a number": {"scores": {"accuracy": float("nan")}},
    "a boolean": {"peak_bytes": True},
}


@pytest.mark.parametrize("name", BAD)
def test_a_complete_trial_without_a_finite_objective_has_failed(store, name):
    with searching(store, simulated("/x")) as search:
        told = search.tell(search.ask().number, GOOD.model_copy(update=BAD[name]))
        assert told.state == "failed"
        assert told.error == "an objective is missing or not finite: accuracy, seconds, peak_bytes"
        assert store.trials(search.study.id)[0].state == "failed"


def test_an_outcome_that_could_not_be_read_again_does_not_spoil_the_record(store):
    with searching(store, simulated("/x")) as search:
        told = search.tell(search.ask().number, Outcome(ended="diverged").model_copy(update={"scores": {"f1": float("nan")}}))
        assert (told.state, told.error) == ("failed", "the outcome cannot be kept: scores.f1 must be a finite number")
        assert store.trials(search.study.id) == [told]


def test_an_infeasible_trial_needs_no_objectives(store):
    with searching(store, simulated("/x")) as search:
        assert search.tell(search.ask().number, Outcome(ended="infeasible", share=0)).state == "infeasible"


def test_the_first_result_wins_and_a_late_one_is_logged(store):
    with searching(store, simulated("/x")) as search:
        number = search.ask().number
        first = search.tell(number, GOOD)
        late = GOOD.model_copy(update={"loss": 9.0})
        assert search.tell(number, late) == first
        assert search.fail(number, "too late", retry=False) is None
        assert store.trials(search.study.id) == [first] == search.trials
        assert [(e["kind"], e["number"]) for e in store.events(search.study.id)] == [("late result refused", 0)] * 2


def test_reports_are_kept_as_the_curve_of_the_attempt(store):
    with searching(store, simulated("/x")) as search:
        number = search.ask().number
        search.report(number, PROGRESS)
        assert search.shares == {0: 0.25}
        search.fail(number, "the node died", retry=True)
        search.report(number, PROGRESS.model_copy(update={"step": 2}))
        curve = store.trials(search.study.id, curves=True)[0].curve
        assert [(p.step, p.share, p.metrics) for p in curve] == [(2, 0.25, {"accuracy": 0.1})]


def test_infeasible_and_diverged_trials_reach_the_algorithm(store, monkeypatch):
    seen = []

    def spy(space, objectives, history, rng):
        seen.append([(t.number, t.state) for t in history])
        return space.sample(rng)

    monkeypatch.setattr(algorithms, "load", lambda name: spy)
    with searching(store, simulated("/x", recipe={"learning_rate": 0.02}, budget={"trials": 5})) as search:
        for ended in ("infeasible", "diverged", "complete"):
            search.tell(search.ask().number, GOOD.model_copy(update={"ended": ended}))
        running = search.ask()
        search.ask()
    assert seen[-1] == [(0, "infeasible"), (1, "diverged"), (2, "complete"), (running.number, "running")]


def test_defaults_outside_the_space_are_not_shown_to_the_algorithm(store, monkeypatch):
    seen = []
    monkeypatch.setattr(algorithms, "load", lambda name: lambda s, o, history, rng: seen.append(history) or s.sample(rng))
    with searching(store, simulated("/x", recipe={"batch_size": 2})) as search:
        finish(search)
    assert [[t.number for t in history] for history in seen] == [[], [1], [1, 2]]


def test_an_algorithm_that_fails_ends_the_search_and_is_not_replaced_by_another(store, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("in the algorithm")

    monkeypatch.setattr(algorithms, "load", lambda name: broken)
    with searching(store, simulated("/x")) as search:
        search.tell(search.ask().number, GOOD)
        with pytest.raises(ZeroDivisionError):
            search.ask()
        assert len(store.trials(search.study.id)) == 1


# Dying workers


def test_a_failure_of_the_code_is_not_retried(store):
    with searching(store, simulated("/x")) as search:
        assert search.fail(search.ask().number, "ValueError: no", retry=False) is None
        assert [(t.state, t.error, t.attempts) for t in search.trials] == [("failed", "ValueError: no", 1)]


@pytest.mark.parametrize("retries", [0, 1, 2])
def test_a_trial_whose_worker_dies_is_launched_again_unchanged_as_often_as_the_budget_says(store, retries):
    with searching(store, simulated("/x", budget={"trials": 4, "retries": retries})) as search:
        first = search.ask()
        launches = [first]
        while (again := search.fail(first.number, "died", retry=True)) is not None:
            launches.append(again)
        assert [t.attempts for t in launches] == list(range(1, retries + 2))
        assert all((t.number, t.params, t.recipe) == (0, first.params, first.recipe) for t in launches)
        assert [(t.state, t.error) for t in search.trials] == [("failed", "died")]
        relaunched = [e["attempt"] for e in store.events(search.study.id) if e["kind"] == "relaunched"]
        assert relaunched == list(range(2, retries + 2))
        assert search.ask().number == 1


def test_trials_in_flight_when_the_process_died_are_launched_again_first(store):
    with searching(store, simulated("/x")) as search:
        first, second = search.ask(), search.ask()
        search.report(second.number, PROGRESS)
    with searching(store, simulated("/x")) as search:
        again = [search.ask(), search.ask()]
        assert [(t.number, t.params, t.attempts) for t in again] == [(0, first.params, 2), (1, second.params, 2)]
        assert search.launched == 2
        assert search.ask().number == 2


def test_a_trial_that_dies_with_every_process_fails_in_the_end(store):
    for attempt in (1, 2, 3):
        with searching(store, simulated("/x")) as search:
            assert search.ask().attempts == attempt
    with searching(store, simulated("/x")) as search:
        assert search.ask().number == 1
        assert search.trials[0].state == "failed"
        assert "launched 3 times" in search.trials[0].error


# Stopping


def test_stopping_to_resume_leaves_running_trials_running_on_the_record(store):
    with searching(store, simulated("/x")) as search:
        trial = search.ask()
        search.stop("interrupted", resume=True)
        search.stop("another reason")
        assert search.report(trial.number, PROGRESS) == "interrupted"
        assert search.ask() is None
        search.tell(trial.number, GOOD.model_copy(update={"ended": "stopped"}))
        assert store.trials(search.study.id)[0].state == "running"
        assert [(e["kind"], e["reason"]) for e in store.events(search.study.id)] == [("stopping", "interrupted")]
    with searching(store, simulated("/x")) as search:
        assert (search.ask().number, search.trials[0].attempts) == (0, 1)


def test_a_worker_that_dies_of_the_interrupt_itself_does_not_fail_its_trial(store):
    with searching(store, simulated("/x")) as search:
        trial = search.ask()
        search.stop("interrupted", resume=True)
        assert search.fail(trial.number, "killed", retry=True) is None
        assert store.trials(search.study.id)[0].state == "running"


def test_stopping_for_good_cancels_what_stops_and_keeps_what_was_complete_by_then(store):
    with searching(store, simulated("/x")) as search:
        first, second = search.ask(), search.ask()
        search.stop("enough")
        assert search.tell(first.number, GOOD.model_copy(update={"ended": "stopped"})).state == "cancelled"
        assert search.tell(second.number, GOOD).state == "complete"
        assert search.fail(search.trials[0].number, "x", retry=True) is None


def test_a_search_that_lost_its_hold_writes_no_more_trials(store):
    clock = [0.0]
    with searching(store, simulated("/x"), clock=lambda: clock[0]) as search:
        search.ask()
        with store._begin() as db:
            db.exec_driver_sql("UPDATE studies SET holder = NULL")
        clock[0] = 10
        with pytest.raises(StudyBusy):
            search.ask()
        assert len(store.trials(search.study.id)) == 1


# The gate


def test_what_cannot_fit_is_recorded_but_neither_launched_nor_counted(store):
    shape = describe("embedded")
    written = simulated("/x", space=SPACE | {"batch_size": [4, 512]}, recipe={"batch_size": 4}, limits={"peak_bytes": 40_000_000})
    with searching(store, written | {"space": SPACE | {"rank": [4, 1024]}}, shape=shape, tokens_per_row=128) as search:
        launched = finish(search)
        trials = search.trials
    refused = [t for t in trials if t.attempts == 0]
    assert refused, "with this seed some points are refused"
    assert {t.params["rank"] for t in refused} == {1024}
    for t in refused:
        assert (t.state, t.outcome.share) == ("infeasible", 0)
        assert t.outcome.peak_bytes > 40_000_000
        assert "refused before launch" in t.error
    assert len(launched) == 4
    assert [t.number for t in trials] == list(range(len(trials)))


def test_a_space_that_cannot_fit_at_all_ends_the_search(store, monkeypatch):
    monkeypatch.setattr("hpo.search.REFUSALS", 20)
    with searching(store, simulated("/x", limits={"peak_bytes": 1}), shape=describe("embedded"), tokens_per_row=128) as search:
        assert search.ask() is None
        assert len(search.trials) == 20
        assert search.launched == 0


# Killed between any two writes


class Killed(BaseException):
    """Stands for the end of the process."""


class Dying(Store):
    """A store whose process ends at its nth write: just before it, or just after it."""

    def arm(self, nth: int, *, written: bool) -> None:
        self.left, self.written = nth, written


def _dying(name: str):
    def method(self, *arguments, **options):
        self.left -= 1
        if self.left == 0 and not self.written:
            raise Killed
        result = getattr(Store, name)(self, *arguments, **options)
        if self.left == 0:
            raise Killed
        return result

    return method


for _name in ("start_trial", "finish_trial", "add_point", "add_event", "add_spent"):
    setattr(Dying, _name, _dying(_name))


def brief(job, report):
    """The closed form with one report instead of four."""
    outcome = simulate.train(job, lambda progress: None)
    report(Progress(step=1, steps=1, tokens=1, share=1, seconds=1, metrics={}))
    return outcome


def run(store: Store, written: dict) -> None:
    with searching(store, written) as search:
        run_search(search, brief, search.spec.data)
        search.close()


def test_a_search_that_is_killed_between_any_two_writes_ends_with_the_same_trials(tmp_path):
    written = simulated("/x", algorithm={"name": "bayes", "startup": 2}, budget={"trials": 4})
    store = Store(f"sqlite:///{tmp_path}/undisturbed.db")
    run(store, written)
    undisturbed = history(store, 1)
    writes = 0
    while True:
        writes += 1
        survived = []
        for kind in (False, True):
            url = f"sqlite:///{tmp_path}/{writes}{kind}.db"
            dying = Dying(url)
            dying.arm(writes, written=kind)
            try:
                run(dying, written)
                survived.append(True)
            except Killed:
                survived.append(False)
                finished = {t.number: t.finished for t in dying.trials(1) if t.final}
                run(Store(url), written)
                assert history(dying, 1) == undisturbed, f"killed {'after' if kind else 'before'} write {writes}"
                after = {t.number: t for t in dying.trials(1)}
                assert {n: after[n].finished for n in finished} == finished, "a finished trial was run again"
                assert max(t.attempts for t in after.values()) <= 2
            dying.close()
        if all(survived):
            break
    assert writes == 4 * 3 + 2, "every trial is started, reported on and finished, and the time is counted"


def test_a_run_that_is_interrupted_inside_a_trial_ends_with_the_same_trials(store, tmp_path):
    written = simulated("/x", algorithm={"name": "bayes", "startup": 2})
    other = Store(f"sqlite:///{tmp_path}/undisturbed.db")
    run(other, written)
    calls = []

    def interrupted(job, report):
        calls.append(job)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return brief(job, report)

    with searching(store, written) as search, pytest.raises(KeyboardInterrupt):
        run_search(search, interrupted, search.spec.data)
    assert [t.state for t in store.trials(1)] == ["complete", "complete", "running"]
    run(store, written)
    assert history(store, 1) == history(other, 1)
