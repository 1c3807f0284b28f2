"""A study whose process is interrupted, told to end, or killed inside a trial: the trial goes on from its checkpoint."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from contracts import searching, simulated

import hpo
from hpo import local
from hpo.search import resume_folder
from hpo.store import Store, open_store
from training.recipe import Outcome, Pause, Progress

STEPS = 400
STUDY = {
    "name": "small", "recipe": {"max_length": 128, "steps": STEPS, "batch_size": 4, "rank": 8},
    "data": {"train": "embedded:train.jsonl", "validation": "embedded:validation.jsonl", "test": "embedded:test.jsonl",
             "template": "{instruction}\nAnswer:"},
    "evaluation": {"rows": 16, "test_rows": 16, "reports": 2}, "space": {"rank": [8, 16]},
    "algorithm": "random", "budget": {"trials": 1}, "resources": {"mode": "local", "save": 0.3},
}  # fmt: skip


@pytest.fixture
def store(tmp_path):
    store = Store(f"sqlite:///{tmp_path}/hpo.db")
    yield store
    store.close()


def progress(step: int, since: int = 0) -> Progress:
    return Progress(step=step, steps=4, tokens=step, share=step / 4, seconds=step, since=since)


def test_a_trial_that_was_told_to_leave_is_launched_again_and_it_is_no_failed_attempt(store):
    with searching(store, simulated("/x", budget={"trials": 1, "retries": 0})) as search:
        first = search.ask()
        for _ in range(3):
            assert search.tell(0, Outcome(ended="paused", reason="told to leave", share=0.5)).state == "running"
            assert search.ask() == search.trials[0] and search.trials[0].params == first.params
        assert search.trials[0].attempts == 1
        assert [e["error"] for e in store.events(1) if e["kind"] == "relaunched"] == ["told to leave"] * 3


def test_a_pause_that_was_asked_for_leaves_the_trial_for_the_next_time_and_one_for_good_cancels_it(store):
    with searching(store, simulated("/x")) as search:
        search.ask()
        search.interrupted = True
        reason = search.report(0, progress(1))
        assert reason == "interrupted" and isinstance(reason, Pause)
        assert search.tell(0, Outcome(ended="paused", reason=reason, share=0.25)).state == "running"
        assert search.ask() is None
    with searching(store, simulated("/x")) as search:
        search.ask()
        search.stop("budget.hours is spent")
        assert not isinstance(search.report(0, progress(1)), Pause)
        assert search.tell(0, Outcome(ended="paused", reason="told to leave", share=0.5)).state == "cancelled"


def test_the_curve_has_what_was_reported_up_to_the_checkpoint_and_each_step_once(store):
    with searching(store, simulated("/x")) as search:
        search.ask()
        for step in (1, 2, 3):
            search.report(0, progress(step))
        search.fail(0, "the node died", retry=True)
        search.report(0, progress(3, since=2))
        assert [(p.step, p.since) for p in store.trials(1, curves=True)[0].curve] == [(1, 0), (2, 0), (3, 2)]
        search.fail(0, "the node died", retry=True)
        search.report(0, progress(2, since=1))
        assert [(p.step, p.since) for p in store.trials(1, curves=True)[0].curve] == [(1, 0), (2, 1)]


def test_what_a_trial_keeps_to_go_on_from_goes_when_it_has_ended(store, tmp_path):
    def train(job, report):
        (Path(job.resume) / "step-00000001").mkdir(parents=True)
        return Outcome(ended="complete", scores={"accuracy": 0.5}, seconds=1, peak_bytes=1)

    with searching(store, simulated(tmp_path, budget={"trials": 2})) as search:
        local.run_search(search, train, search.spec.data)
        assert not any(resume_folder(search.spec, number).exists() for number in (0, 1))


# Real processes

DRIVER = "import json, sys, hpo; hpo.run(json.loads(sys.argv[1]))"


def drive(written: dict) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", DRIVER, json.dumps(written)], stderr=subprocess.DEVNULL)


def checkpoints(storage: Path) -> list[int]:
    return sorted(int(path.name[-8:]) for path in (storage / "small" / "running" / "00000").glob("step-*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The study of a process that nothing happens to."""
    study = hpo.run(STUDY | {"storage": str(tmp_path_factory.mktemp("whole"))})
    return study.history(curves=True)[0]


def test_a_trial_of_a_process_that_is_killed_and_told_to_end_has_the_curve_of_one_that_was_not(tmp_path, whole):
    written = STUDY | {"storage": str(tmp_path)}
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
        before = max(checkpoints(tmp_path), default=0)
        with drive(written) as driver:
            until = time.monotonic() + 120
            while max(checkpoints(tmp_path), default=0) <= before:
                assert driver.poll() is None and time.monotonic() < until, "ended before it could be killed"
                time.sleep(0.01)
            driver.send_signal(number)
        assert driver.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 1)
        store = open_store(str(tmp_path), create=False)
        assert [t.state for t in store.trials(1)] == ["running"]
        store.close()
    last = checkpoints(tmp_path)[-1]
    trial = hpo.run(written).history(curves=True)[0]
    assert (trial.state, trial.attempts) == ("complete", 2), "the killed launch counts, those that were told to end do not"
    assert trial.outcome.conditions["resumed_at"] == last > 0
    assert [(p.step, p.tokens, p.metrics) for p in trial.curve] == [(p.step, p.tokens, p.metrics) for p in whole.curve]
    assert (trial.outcome.loss, trial.outcome.scores) == (whole.outcome.loss, whole.outcome.scores)
    assert checkpoints(tmp_path) == []
