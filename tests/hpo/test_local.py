"""A search in one process: the loop itself, and a process that is killed in the middle of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from contracts import searching, simulated

from hpo import local
from hpo.errors import InputError, StoreError, StudyBusy
from hpo.store import Store, open_store
from training import simulate
from training.errors import wrong
from training.recipe import Outcome, Resources


@pytest.fixture
def store(tmp_path):
    store = Store(f"sqlite:///{tmp_path}/hpo.db")
    yield store
    store.close()


def run(store, train, **changes):
    with searching(store, simulated("/x", **changes)) as search:
        local.run_search(search, train, search.spec.data)
    return store.trials(1, curves=True)


def test_trials_run_one_after_another_in_order_each_with_its_curve(store):
    running = []

    def train(job, report):
        running.append([t.state for t in store.trials(1)].count("running"))
        return simulate.train(job, report)

    trials = run(store, train)
    assert running == [1, 1, 1, 1]
    assert [(t.number, t.state) for t in trials] == [(n, "complete") for n in range(4)]
    assert all([p.share for p in t.curve] == [0.25, 0.5, 0.75, 1.0] for t in trials)


def test_whoever_watches_is_told_after_every_report_and_result(store):
    seen = []
    with searching(store, simulated("/x", budget={"trials": 2})) as search:
        local.run_search(search, simulate.train, search.spec.data, on_change=lambda s: seen.append((s.finished, dict(s.shares))))
    assert seen == [
        (0, {0: 0.25}), (0, {0: 0.5}), (0, {0: 0.75}), (0, {0: 1.0}), (1, {}),
        (1, {1: 0.25}), (1, {1: 0.5}), (1, {1: 0.75}), (1, {1: 1.0}), (2, {}),
    ]  # fmt: skip


def test_a_trial_that_raises_fails_with_type_and_message_and_the_study_goes_on(store):
    def train(job, report):
        if job.output.endswith("00001"):
            raise RuntimeError("shapes [3] and [4]")
        return simulate.train(job, report)

    trials = run(store, train)
    assert [t.state for t in trials] == ["complete", "failed", "complete", "complete"]
    assert trials[1].error == "RuntimeError: shapes [3] and [4]"


@pytest.mark.parametrize("returned", [None, {"loss": 1.0}, 0.5], ids=repr)
def test_a_train_function_that_returns_something_else_fails_its_trials(store, returned):
    trials = run(store, lambda job, report: returned)
    assert {t.state for t in trials} == {"failed"}
    assert f"must return an Outcome, got {type(returned).__name__}" in trials[0].error


def test_a_mistake_of_the_user_ends_the_run_because_every_trial_would_meet_it(store):
    def train(job, report):
        raise wrong("data.train", "no such file.")

    with pytest.raises(InputError):
        run(store, train)
    assert [t.state for t in store.trials(1)] == ["running"]


def test_a_record_that_cannot_be_written_ends_the_run_and_is_no_failure_of_the_trial(store, monkeypatch):
    def full(*_):
        raise StoreError("disk full")

    monkeypatch.setattr(store, "add_point", full)
    with pytest.raises(StoreError, match="disk full"):
        run(store, simulate.train)
    assert [t.state for t in store.trials(1)] == ["running"]


def test_a_run_that_lost_its_hold_leaves_the_trial_to_the_one_that_took_over(store):
    clock = [0.0]

    def train(job, report):
        with store._begin() as db:
            db.exec_driver_sql("UPDATE studies SET holder = NULL")
        clock[0] = 10
        return simulate.train(job, report)

    with searching(store, simulated("/x"), clock=lambda: clock[0]) as search, pytest.raises(StudyBusy):
        local.run_search(search, train, search.spec.data)
    assert [t.state for t in store.trials(1)] == ["running"]


def test_a_stop_reaches_the_training_at_its_next_report(store):
    with searching(store, simulated("/x")) as search:
        local.run_search(search, simulate.train, search.spec.data, on_change=lambda s: s.stop("enough"))
    assert [(t.state, t.outcome.share, t.error) for t in store.trials(1)] == [("cancelled", 0.5, "enough")]


def test_a_function_is_called_by_its_dotted_name():
    assert local.call("training.data.locate", {"name": "/a"}, Resources()).as_posix() == "/a"


# A driver that is killed

DRIVER = """
import json, sys, time
import hpo
from training import simulate

log = open(sys.argv[2], "a", buffering=1)

def train(job, report):
    number = int(job.output[-5:])
    print("start", number, file=log)
    def slow(progress):
        time.sleep(0.05)
        return report(progress)
    outcome = simulate.train(job, slow)
    print("end", number, file=log)
    return outcome

hpo.run(json.loads(sys.argv[1]), train=train)
"""


def test_a_driver_that_is_killed_again_and_again_ends_like_one_that_was_not(tmp_path):
    log = tmp_path / "log"
    written = simulated(tmp_path / "store", budget={"trials": 7}, algorithm={"name": "bayes", "startup": 3},
                        certify={"extra": 0})  # fmt: skip

    def drive():
        return subprocess.Popen([sys.executable, "-c", DRIVER, json.dumps(written), str(log)], stderr=subprocess.DEVNULL)

    def starts() -> Counter:
        lines = log.read_text().splitlines() if log.exists() else []
        return Counter(int(line.split()[1]) for line in lines if line.startswith("start"))

    finished: dict[int, float] = {}
    for moment in (2, 5):
        driver = drive()
        while len(starts()) < moment:
            assert driver.poll() is None, "ended before it could be killed"
            time.sleep(0.01)
        time.sleep(0.03)
        driver.send_signal(signal.SIGKILL)
        assert driver.wait() == -signal.SIGKILL
        store = open_store(str(tmp_path / "store"), create=False)
        trials = store.trials(1)
        now = {t.number: t.finished for t in trials if t.final}
        assert {number: now.get(number) for number in finished} == finished
        assert len(now) >= moment - 1
        assert [t.state for t in trials].count("running") <= 1
        finished = now
    done_before = dict(finished)
    assert drive().wait() == 0
    trials = store.trials(1)
    store.close()
    assert [(t.number, t.state) for t in trials] == [(n, "complete") for n in range(7)]
    assert {t.number: t.finished for t in trials if t.number in done_before} == done_before
    assert starts() == Counter({t.number: t.attempts for t in trials}), (
        "each launch is on the record, and no trial ran twice unsaid"
    )
    assert sum(t.attempts for t in trials) <= 7 + 2, "each kill costs at most the trial in flight"

    alone = simulated(tmp_path / "alone", budget={"trials": 7}, algorithm={"name": "bayes", "startup": 3},
                        certify={"extra": 0})  # fmt: skip
    with searching(open_store(alone["storage"]), alone) as search:
        local.run_search(search, simulate.train, search.spec.data)
        assert [(t.params, t.outcome) for t in search.trials] == [(t.params, t.outcome) for t in trials]
    assert os.path.isfile(tmp_path / "store" / "small" / "report.html")


def test_an_outcome_is_what_the_train_function_returned(store):
    given = Outcome(scores={"accuracy": 0.25}, loss=1.5, seconds=2.5, peak_bytes=7, conditions={"note": "mine"})
    assert all(t.outcome == given for t in run(store, lambda job, report: given))
