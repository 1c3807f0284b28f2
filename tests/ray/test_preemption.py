"""Trials that lose their workers on a real Ray cluster go on from their checkpoints."""

import os
import signal
from pathlib import Path

import psutil
import pytest

pytest.importorskip("ray")

from hpo import spec as specs  # noqa: E402
from hpo import tune  # noqa: E402
from hpo.search import Search, job_of  # noqa: E402
from hpo.store import open_store  # noqa: E402
from training.loop import train  # noqa: E402

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]
STEPS = 200
STUDY = {
    "data": {"train": "embedded:train.jsonl", "validation": "embedded:validation.jsonl", "test": "embedded:test.jsonl",
             "template": "{instruction}\nAnswer:"},
    "recipe": {"model": "embedded", "max_length": 128, "steps": STEPS, "batch_size": 4},
    "evaluation": {"rows": 16, "test_rows": 16, "reports": 2},
    "space": {"rank": {"type": "choice", "values": [4, 8, 16]}}, "algorithm": "random", "budget": {"trials": 1},
}  # fmt: skip


def workers() -> list[psutil.Process]:
    """The processes that train: those of Ray Train's worker actors."""
    return [p for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::RayTrainWor")]


def run(tmp_path, name: str, on_change, **changes):
    loaded = specs.load(STUDY | {"name": name, "storage": str(tmp_path)} | changes)
    store = open_store(loaded.spec.storage)
    record = store.add_study(loaded.spec, loaded.written, "")
    with store.hold(record.id) as holder:
        search = Search(store, record, holder)
        tune.run_search(search, loaded.spec.data, parallel=1, on_change=lambda _: on_change(search))
    return search, store.trials(record.id, curves=True), store.events(record.id)


def once(search, told: list, number: int) -> None:
    """Sends the workers a signal once a tenth of the trial is done."""
    if not told and search.shares.get(0, 0) >= 0.1:
        told.extend(process.pid for process in workers())
        for pid in told:
            os.kill(pid, number)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same trial, undisturbed, in this process."""
    loaded = specs.load(STUDY | {"name": "whole", "storage": str(tmp_path_factory.mktemp("whole"))})
    from hpo.trial import Trial

    job = job_of(Trial(number=0, params={}, recipe=loaded.spec.recipe), loaded.spec, loaded.spec.data)
    curve = []
    return train(job.model_copy(update={"output": None, "resume": None}), lambda progress: curve.append(progress)), curve


def same(trial, whole) -> None:
    outcome, curve = whole
    assert trial.state == "complete", trial.error
    assert (trial.outcome.loss, trial.outcome.tokens) == (outcome.loss, outcome.tokens)
    assert [(p.step, p.tokens, p.metrics) for p in trial.curve] == [(p.step, p.tokens, p.metrics) for p in curve]


def test_a_worker_that_gets_sigterm_leaves_a_checkpoint_and_its_trial_goes_on_from_it(tmp_path, whole):
    told = []
    search, (trial,), events = run(tmp_path, "told", lambda search: once(search, told, signal.SIGTERM))
    assert told
    same(trial, whole)
    assert trial.outcome.conditions["resumed_at"] > 0.1 * STEPS and trial.attempts == 1, "nothing was wrong with the trial"
    assert ["SIGTERM" in e["error"] for e in events if e["kind"] == "relaunched"] == [True]
    assert not Path(job_of(trial, search.spec, search.spec.data).resume).exists()


def test_a_worker_that_is_killed_goes_on_from_the_last_checkpoint_and_not_from_the_beginning(tmp_path, whole):
    told = []
    often = {"resources": {"save": 0.2}}
    _, (trial,), events = run(tmp_path, "killed", lambda search: once(search, told, signal.SIGKILL), **often)
    assert told
    same(trial, whole)
    assert 0 < trial.outcome.conditions["resumed_at"] < STEPS and trial.attempts == 2
    assert [e["attempt"] for e in events if e["kind"] == "relaunched"] == [2]


def test_trials_that_were_interrupted_go_on_when_the_study_is_continued(tmp_path, whole):
    def interrupt(search):
        if search.shares.get(0, 0) >= 0.1:
            search.interrupted = True  # as the handler of Ctrl-C does

    search, (trial,), _ = run(tmp_path, "again", interrupt)
    assert (trial.state, search.stopping) == ("running", "interrupted")
    (left,) = Path(job_of(trial, search.spec, search.spec.data).resume).iterdir()
    _, (trial,), _ = run(tmp_path, "again", lambda search: None)
    same(trial, whole)
    assert trial.outcome.conditions["resumed_at"] == int(left.name[-8:]) and trial.attempts == 1
