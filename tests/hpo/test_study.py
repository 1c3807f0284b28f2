"""The facade: run, start, stop, continue; what a study may change on the way and what it may not."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas
import pytest
from contracts import SPACE, simulated

import hpo
from hpo.check import inspect
from hpo.entry import enter
from hpo.errors import NotFound, SpecError, StoreError, StudyBusy, StudyChanged
from hpo.spec import load
from hpo.store import open_store
from hpo.study import Status, open_study, run, start
from training import simulate
from training.recipe import Outcome

ROWS = [{"instruction": f"say {n}", "response": f"word {n}"} for n in range(40)]


@pytest.fixture
def written(tmp_path):
    return simulated(tmp_path / "store")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished study, to be looked at only."""
    return run(simulated(tmp_path_factory.mktemp("done"), budget={"trials": 8}))


def test_a_run_ends_with_trials_front_winner_and_report(written):
    study = run(written)
    history = study.history(curves=True)
    assert [(t.number, t.state, len(t.curve)) for t in history] == [(n, "complete", 4) for n in range(4)]
    front = study.front()
    assert front
    assert {t.number for t in front} <= set(range(4))
    assert study.winner().number == study.certificate.winner
    assert study.winner() in front
    report = study.spec.folder / "report.html"
    assert report.is_file()
    assert "small" in report.read_text()
    assert not study.running()


def test_a_table_of_trials_has_what_varied_and_what_was_measured(done):
    table = done.trials()
    assert isinstance(table, pandas.DataFrame)
    expected = ["number", "state", "origin", *SPACE, "accuracy", "seconds", "peak_bytes", "share", "attempts", "error"]
    assert list(table.columns) == expected
    assert list(table.number) == list(range(8))
    assert table.accuracy.between(0, 1).all()
    assert (table["rank"][0], table["origin"][0]) == (16, "defaults")


@pytest.mark.parametrize("kind", ["front", "trials", "parallel", "curves"])
def test_a_study_can_be_plotted(done, kind):
    assert done.plot(kind).to_dict()["data"]


def test_a_figure_that_does_not_exist_names_those_that_do(done):
    with pytest.raises(NotFound, match="No figure 'pie'.*front"):
        done.plot("pie")


def test_a_report_goes_where_it_is_wanted(done, tmp_path):
    target = tmp_path / "a" / "b.html"
    assert done.report(target) == target
    assert target.is_file()


def test_a_study_is_opened_by_name_without_writing(written, tmp_path):
    run(written)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")}
    study = open_study("small", storage=written["storage"])
    assert len(study.trials()) == 4
    assert study.winner() is not None
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")} == before
    with pytest.raises(NotFound, match="'other'.*small"):
        open_study("other", storage=written["storage"])
    with pytest.raises(StoreError, match="no study record"):
        open_study("small", storage=str(tmp_path / "elsewhere"))
    assert not (tmp_path / "elsewhere").exists()


def test_a_bundled_study_runs_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = run("simulated", [f"storage={tmp_path}/s", "budget.trials=2", "algorithm=random"])
    assert study.name == "simulated"
    assert len(study.history()) == 2


def test_the_same_functions_are_at_the_top_of_the_package(written):
    assert hpo.run is run
    assert hpo.open_study is open_study
    assert "small" in repr(hpo.run(written))


def test_a_password_is_not_in_what_a_notebook_shows(written):
    study = run(written)
    study.store.url = study.store.url.set(drivername="postgresql", username="me", password="secret", host="h")
    assert "secret" not in repr(study)


def test_progress_is_told_from_the_check_to_the_end(written):
    seen = []
    run(written, on_status=lambda status: seen.append((status.phase, status.finished, status.trials)))
    phases = list(dict.fromkeys(phase for phase, _, _ in seen))
    assert phases == ["starting", "training", "writing the report", "done"]
    assert [n for phase, n, _ in seen if phase == "training"] == sorted(n for phase, n, _ in seen if phase == "training")
    assert seen[-1] == ("done", 4, 4)
    assert Status().phase == "checking"


# In the background


def slow(job, report):
    def wait(progress):
        time.sleep(0.02)
        return report(progress)

    return simulate.train(job, wait)


def test_a_study_started_in_the_background_is_there_at_once_and_can_be_waited_for(written):
    study = start(written, train=slow)
    assert study.running()
    assert study.name == "small"
    assert study.wait() is study
    assert not study.running()
    assert len(study.history()) == 4
    assert study.certificate is not None


def test_a_study_that_is_stopped_can_be_waited_for_and_continued(written):
    study = start(written | {"budget": {"trials": 50}}, train=slow)
    while len(study.history()) < 3:
        time.sleep(0.005)
    study.stop()
    study.wait()
    stopped = study.history()
    assert 3 <= len(stopped) < 50
    assert [t.state for t in stopped][:-1] == ["complete"] * (len(stopped) - 1)
    assert study.certificate is None
    assert study.winner() is not None, "by the same rule from the front so far"
    again = run(written | {"budget": {"trials": len(stopped) + 1}})
    assert [t.state for t in again.history()] == ["complete"] * (len(stopped) + 1)
    assert [t.params for t in again.history()][: len(stopped)] == [t.params for t in stopped]


def test_what_is_wrong_is_raised_before_a_background_run_begins(written):
    with pytest.raises(SpecError):
        start(written | {"storage": "relative"})


def test_what_ends_a_background_run_is_raised_when_it_is_waited_for(written, monkeypatch):
    def full(*_):
        raise StoreError("disk full")

    monkeypatch.setattr("hpo.store.Store.add_point", full)
    study = start(written)
    with pytest.raises(StoreError, match="disk full"):
        study.wait()


def test_a_second_run_of_the_same_study_is_refused_and_changes_nothing(written):
    study = start(written | {"budget": {"trials": 50}}, train=slow)
    with pytest.raises(StudyBusy, match="is being run by process"):
        run(written | {"budget": {"trials": 7}})
    assert study.spec.budget.trials == 50
    study.stop()
    study.wait()


# Interrupting


def test_an_interrupt_leaves_the_study_resumable(written):
    def interrupted(job, report):
        if job.output.endswith("00002"):
            raise KeyboardInterrupt
        return simulate.train(job, report)

    with pytest.raises(KeyboardInterrupt):
        run(written, train=interrupted)
    study = open_study("small", storage=written["storage"])
    assert [t.state for t in study.history()] == ["complete", "complete", "running"]
    assert not study.running()
    assert study.certificate is None
    run(written)
    assert [(t.state, t.attempts) for t in study.history()] == [
        ("complete", 1),
        ("complete", 1),
        ("complete", 1),
        ("complete", 1),
    ]
    assert study.certificate is not None


TERMINATED = """
import json, sys, time
import hpo
from training import simulate
def train(job, report):
    print("training", flush=True)
    time.sleep(1.0)
    return simulate.train(job, report)
hpo.run(json.loads(sys.argv[1]), train=train)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_so_that_it_can_be_continued(written, number):
    arguments = [sys.executable, "-c", TERMINATED, json.dumps(written)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "training\n"
    process.send_signal(number)
    _, said = process.communicate()
    assert "KeyboardInterrupt" in said
    study = open_study("small", storage=written["storage"])
    assert [t.state for t in study.history()] == ["running"]
    assert not study.running()
    assert {t.state for t in run(written).history()} == {"complete"}


def test_the_handler_of_sigterm_is_put_back(written):
    before = signal.getsignal(signal.SIGTERM)
    run(written)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_study_can_be_run_outside_the_main_thread(written):
    box = []
    thread = threading.Thread(target=lambda: box.append(run(written)))
    thread.start()
    thread.join()
    assert len(box[0].history()) == 4


# Continuing


def test_a_raised_budget_continues_and_claims_anew(written):
    first = run(written)
    made = first.certificate.made
    before = first.history()
    again = run(written | {"budget": {"trials": 6}})
    assert again.history()[:4] == before
    assert len(again.history()) == 6
    assert again.certificate.made > made


def test_running_a_finished_study_again_does_nothing_anew(written):
    first = run(written, train=simulate.train)
    before = (first.history(), first.certificate)
    again = run(written, train=lambda job, report: pytest.fail("trained again"))
    assert (again.history(), again.certificate) == before


def test_comments_and_layout_of_the_file_may_change(written, tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text(json.dumps(written))
    run(file)
    lines = [f"{name}: {json.dumps(value)}   # {name}" for name, value in reversed(written.items())]
    file.write_text("# the same study\n\n" + "\n\n".join(lines) + "\n")
    assert len(run(file, ["budget.trials=5"]).history()) == 5


HIGHER = SPACE["learning_rate"] | {"high": 0.1}
CHANGES = {
    "a range": ({"space": SPACE | {"learning_rate": HIGHER}}, "space.learning_rate.high", "was 0.03 and is now 0.1."),
    "choices": (
        {"space": SPACE | {"rank": SPACE["rank"] | {"values": [4]}}},
        "space.rank.values",
        "was [4, 8, 16, 32] and is now [4].",
    ),
    "a dimension less": ({"space": {n: SPACE[n] for n in ("rank", "batch_size")}}, "space.learning_rate", "is now not written."),
    "the seed": ({"seed": 1}, "seed", "was not written and is now 1."),
    "objectives": ({"objectives": ["loss", "seconds"]}, "objectives", "was not written and is now ['loss', 'seconds']."),
    "the model": ({"recipe": {"model": "org/m"}}, "recipe.model", "was not written and is now 'org/m'."),
    "a default": ({"recipe": {"rank": 4}}, "recipe.rank", "was not written and is now 4."),
    "a limit": ({"limits": {"seconds": 5}}, "limits.seconds", "was not written and is now 5."),
    "the template": ({"data": {"train": "embedded:train.jsonl", "template": "{input}"}}, "data.template", "is now '{input}'."),
    "start points": ({"start": [{"rank": 4, "learning_rate": 0.01, "batch_size": 4}]}, "start", "is now [{'rank': 4"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_may_not_change_is_refused_with_both_values_and_nothing_is_changed(written, name):
    change, where, rule = CHANGES[name]
    study = run(written)
    before = (study.record, study.history())
    with pytest.raises(StudyChanged) as raised:
        run(written | change | {"budget": {"trials": 9}})
    first, hint = raised.value.problems
    assert first.where == where
    assert rule in first.rule
    assert (hint.where, hint.remedy) == ("small", "Give it another name, or undo the change.")
    assert (study.record, study.history()) == before


def test_every_change_is_listed_at_once(written):
    run(written)
    with pytest.raises(StudyChanged) as raised:
        run(written | {"seed": 1, "objectives": ["accuracy", "seconds"], "recipe": {"rank": 4}})
    assert [p.where for p in raised.value.problems] == ["recipe.rank", "objectives", "seed", "small"]


def test_rows_that_changed_are_refused_and_the_studys_own_copy_is_kept(tmp_path, written):
    rows, moved = tmp_path / "rows.jsonl", tmp_path / "moved.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    given = written | {"data": {"train": str(rows)}, "train": "loop"}
    store = open_store(given["storage"])

    def entered(study):  # what `run` does between the check and the first trial
        loaded = load(study)
        return enter(store, loaded, inspect(loaded.spec).rows.digest)

    record, data = entered(given)
    assert Path(data.train).read_text() == rows.read_text()
    assert Path(data.train).is_relative_to(record.spec.folder)
    moved.write_text(rows.read_text())
    assert entered(given | {"data": {"train": str(moved)}})[0].id == record.id, "the same rows elsewhere are the same study"
    record = store.study("small")
    rows.write_text("\n".join(map(json.dumps, ROWS[1:])))
    with pytest.raises(StudyChanged, match=r"data: the rows have changed \(SHA-256 [0-9a-f]{12} is now [0-9a-f]{12}\)"):
        run(given)
    assert store.study("small") == record
    assert Path(data.train).read_text() == moved.read_text()
    store.close()


# A train function of the user's own


def test_a_train_function_of_the_users_own_gets_every_job_and_decides_the_outcome(written):
    jobs = []

    def train(job, report):
        jobs.append(job)
        return Outcome(scores={"accuracy": job.recipe.rank / 100}, loss=1.0, seconds=1.0, peak_bytes=job.recipe.rank)

    study = run(written, train=train)
    assert [job.recipe.rank for job in jobs] == [t.recipe.rank for t in study.history()]
    assert [t.outcome.scores["accuracy"] for t in study.history()] == [job.recipe.rank / 100 for job in jobs]


def test_a_train_function_that_always_fails_ends_without_a_winner_but_with_a_report(written):
    def train(job, report):
        raise RuntimeError("no [/such] thing")

    study = run(written, train=train)
    assert {(t.state, t.error) for t in study.history()} == {("failed", "RuntimeError: no [/such] thing")}
    assert study.winner() is None
    assert study.certificate is None
    assert study.front() == []
    assert (study.spec.folder / "report.html").is_file()


def test_a_finished_study_is_returned_without_training_again(written):
    run(written)

    def never(job, report):
        raise AssertionError("nothing is left to train")

    study = run(written, train=never)
    assert all(t.state == "complete" for t in study.history())


def test_writing_a_default_out_is_no_change_and_the_scoring_batch_may_change(written):
    run(written)
    before = open_study("small", storage=written["storage"]).trials()
    study = run(written | {"seed": 0, "evaluation": {"batch_size": 8}})
    assert study.trials().equals(before)
