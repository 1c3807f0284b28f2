"""The record: first result wins, nothing is lost, a damaged or foreign file is left alone, one process at a time runs a study.

PARETUNE_TEST_DATABASE names further databases (SQLAlchemy URLs, divided by spaces) that the contract is tried on; their
tables are dropped before each test.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager

import pytest
import sqlalchemy as sa
from contracts import simulated
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hpo import store as store_module
from hpo.certificate import Certificate
from hpo.errors import NotFound, StoreError, StudyBusy
from hpo.spec import load
from hpo.store import VERSION, Store, open_store, with_state
from hpo.trial import FINAL, CurvePoint, Trial
from training.recipe import Outcome, Recipe

DATABASES = ["sqlite", *os.environ.get("PARETUNE_TEST_DATABASE", "").split()]


@pytest.fixture(params=DATABASES, ids=lambda url: url.split(":")[0])
def url(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/hpo.db"
    engine = sa.create_engine(request.param)
    store_module._meta.drop_all(engine)
    engine.dispose()
    return request.param


@pytest.fixture
def store(url):
    store = Store(url)
    yield store
    store.close()


def add(store: Store, name: str = "small", **changes):
    loaded = load(simulated("/nowhere", name=name, **changes))
    return store.add_study(loaded.spec, loaded.written, "digest")


def trial(number: int = 0, **changes) -> Trial:
    return Trial(number=number, params={"rank": 8, "learning_rate": 0.1}, recipe=Recipe(rank=8, learning_rate=0.1), **changes)


def point(step: int, share: float = 0.5) -> CurvePoint:
    return CurvePoint(share=share, step=step, tokens=step * 10, seconds=0.1 * step, metrics={"loss": 1 / 3})


# Studies


def test_a_study_comes_back_as_it_went_in(store):
    before = time.time()
    record = add(store)
    assert record == store.study("small")
    assert record.spec == load(simulated("/nowhere")).spec
    assert record.written == simulated("/nowhere")
    assert (record.name, record.digest, record.spent, record.certificate) == ("small", "digest", 0.0, None)
    assert before <= record.created <= time.time()


def test_a_study_of_the_same_name_is_the_same_study_with_what_changed(store):
    first = add(store)
    store.start_trial(first.id, trial())
    second = add(store, budget={"trials": 99})
    assert (second.id, second.created) == (first.id, first.created)
    assert second.spec.budget.trials == 99
    assert len(store.trials(second.id)) == 1


def test_an_unknown_study_names_those_that_exist(store):
    with pytest.raises(NotFound, match="'other'.*none"):
        store.study("other")
    add(store, "b")
    add(store, "a")
    with pytest.raises(NotFound, match="There are: b, a"):
        store.study("other")


def test_studies_are_listed_oldest_first_with_their_trials_by_state(store):
    first, second = add(store, "b"), add(store, "a")
    for number, state in enumerate(("complete", "complete", "failed")):
        store.start_trial(first.id, trial(number))
        store.finish_trial(first.id, with_state(trial(number), state))
    store.start_trial(second.id, trial())
    found = store.studies()
    assert [(record.name, counts) for record, counts in found] == [("b", {"complete": 2, "failed": 1}), ("a", {"running": 1})]


def test_a_certificate_is_kept_and_can_be_taken_back(store):
    record = add(store)
    made = Certificate(winner=3, reason="best", made=1.5)
    store.set_certificate(record.id, made)
    assert store.study("small").certificate == made
    store.set_certificate(record.id, None)
    assert store.study("small").certificate is None


def test_seconds_spent_add_up(store):
    record = add(store)
    for seconds in (1.5, 2.25):
        store.add_spent(record.id, seconds)
    assert store.study("small").spent == 3.75


# Trials


@pytest.mark.parametrize("state", FINAL)
def test_the_first_final_state_wins(store, state):
    record = add(store)
    store.start_trial(record.id, trial())
    first = with_state(trial(), state, Outcome(loss=1.0), "because")
    assert store.finish_trial(record.id, first)
    for late in FINAL:
        assert not store.finish_trial(record.id, with_state(trial(), late, Outcome(loss=2.0)))
    assert store.trials(record.id) == [first]


def test_a_trial_that_was_never_started_cannot_be_finished(store):
    record = add(store)
    assert not store.finish_trial(record.id, with_state(trial(7), "complete"))
    assert store.trials(record.id) == []


def test_a_finished_trial_cannot_be_started_again(store):
    record = add(store)
    store.start_trial(record.id, trial())
    done = with_state(trial(), "complete")
    store.finish_trial(record.id, done)
    with pytest.raises(StoreError):
        store.start_trial(record.id, trial(attempts=2))
    assert store.trials(record.id) == [done]


def test_a_running_trial_is_started_again_as_another_attempt(store):
    record = add(store)
    store.start_trial(record.id, trial())
    store.start_trial(record.id, trial(attempts=2))
    assert store.trials(record.id) == [trial(attempts=2)]


def test_numbers_come_back_to_the_last_bit(store):
    record = add(store)
    exact = Outcome(loss=1 / 3, seconds=0.1 + 0.2, peak_bytes=2**53 + 1, scores={"accuracy": 2 / 3})
    store.start_trial(record.id, trial())
    store.finish_trial(record.id, with_state(trial(), "complete", exact))
    assert store.trials(record.id)[0].outcome == exact


def test_values_go_in_and_come_out_by_value(store):
    record = add(store)
    given = trial()
    store.start_trial(record.id, given)
    given.params["rank"] = 4096
    store.trials(record.id)[0].params["rank"] = 1
    assert store.trials(record.id)[0].params["rank"] == 8


def test_curves_are_those_of_the_last_attempt_in_order(store):
    record = add(store)
    store.start_trial(record.id, trial())
    store.add_point(record.id, 0, 1, point(1))
    store.start_trial(record.id, trial(attempts=2))
    for step in (3, 1, 2):
        store.add_point(record.id, 0, 2, point(step))
    store.add_point(record.id, 0, 2, point(2, share=0.9))
    assert store.trials(record.id, curves=True)[0].curve == (point(1), point(2, share=0.9), point(3))
    assert store.trials(record.id)[0].curve == ()


def test_a_curve_is_not_stored_twice(store):
    record = add(store)
    store.start_trial(record.id, trial(curve=(point(1),)))
    assert store.trials(record.id, curves=True)[0].curve == ()


def test_studies_do_not_see_each_other(store):
    first, second = add(store, "a"), add(store, "b")
    store.start_trial(first.id, trial())
    store.add_point(first.id, 0, 1, point(1))
    store.add_event(first.id, "stopping", reason="x")
    assert store.trials(second.id) == [] == store.events(second.id)


def test_events_are_a_log(store):
    record = add(store)
    for number in range(3):
        store.add_event(record.id, "relaunched", number=number, error="died")
    events = store.events(record.id)
    assert [event["number"] for event in events] == [0, 1, 2]
    assert {(event["kind"], event["error"]) for event in events} == {("relaunched", "died")}
    assert events == sorted(events, key=lambda event: event["at"])


def test_everything_is_there_after_reopening(url):
    store = Store(url)
    record = add(store)
    store.start_trial(record.id, trial())
    store.add_point(record.id, 0, 1, point(1))
    store.add_event(record.id, "x")
    before = (store.study("small"), store.trials(record.id, curves=True), store.events(record.id))
    store.close()
    again = Store(url, create=False)
    assert (again.study("small"), again.trials(record.id, curves=True), again.events(record.id)) == before
    again.close()


def test_a_store_pickles_to_its_url(store):
    record = add(store)
    copy = pickle.loads(pickle.dumps(store))
    assert copy.url == store.url
    assert copy.study("small") == record
    copy.close()


def test_a_password_is_in_no_message(tmp_path):
    with pytest.raises(StoreError) as raised:
        Store("postgresql+nothing://me:secret@localhost/x")
    assert "secret" not in str(raised.value)


# Against a dictionary


class Model(RuleBasedStateMachine):
    """Any order of calls leaves the same in the store as in a dictionary."""

    numbers = st.integers(0, 3)
    names = st.sampled_from(["a", "b"])

    @initialize()
    def begin(self):
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.store = Store(f"sqlite:///{self.folder.name}/hpo.db")
        self.ids = {name: add(self.store, name).id for name in ("a", "b")}
        self.trials: dict = {"a": {}, "b": {}}
        self.points: dict = {}
        self.spent = {"a": 0.0, "b": 0.0}

    @rule(name=names, number=numbers, attempts=st.integers(1, 3))
    def start(self, name, number, attempts):
        given = trial(number, attempts=attempts)
        if (old := self.trials[name].get(number)) is not None and old.final:
            with pytest.raises(StoreError):
                self.store.start_trial(self.ids[name], given)
            return
        self.store.start_trial(self.ids[name], given)
        self.trials[name][number] = given

    @rule(name=names, number=numbers, state=st.sampled_from(FINAL), loss=st.none() | st.floats(-1e9, 1e9))
    def finish(self, name, number, state, loss):
        old = self.trials[name].get(number)
        done = with_state(old or trial(number), state, Outcome(loss=loss), "why")
        open_before = old is not None and not old.final
        assert self.store.finish_trial(self.ids[name], done) == open_before
        if open_before:
            self.trials[name][number] = done

    @rule(name=names, number=numbers, attempt=st.integers(1, 3), step=st.integers(1, 4), share=st.floats(0, 1))
    def report(self, name, number, attempt, step, share):
        self.store.add_point(self.ids[name], number, attempt, point(step, share))
        self.points[name, number, attempt, step] = point(step, share)

    @rule(name=names, seconds=st.integers(0, 100))
    def spend(self, name, seconds):
        self.store.add_spent(self.ids[name], seconds)
        self.spent[name] += seconds

    @rule()
    def reopen(self):
        self.store.close()
        self.store = pickle.loads(pickle.dumps(self.store))

    @invariant()
    def equal(self):
        for name, known in self.trials.items():
            expected = [
                t.model_copy(update={"curve": tuple(
                    self.points[key] for key in sorted(self.points) if key[:3] == (name, t.number, t.attempts))})
                for _, t in sorted(known.items())
            ]  # fmt: skip
            assert self.store.trials(self.ids[name], curves=True) == expected
            assert self.store.study(name).spent == self.spent[name]

    def teardown(self):
        self.store.close()
        self.folder.cleanup()


TestAgainstADictionary = Model.TestCase
TestAgainstADictionary.settings = settings(
    max_examples=12, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)


# Several processes


def python(script: str, *arguments: object, **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], text=True, **options)


PIPES = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}


def at_once(processes: list[subprocess.Popen]) -> list[str]:
    """Lets processes that wait for a line go on together; returns what each of them printed."""
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    return said


WRITER = """
import sys
from hpo.store import Store, with_state
from hpo.trial import CurvePoint, Trial
from training.recipe import Recipe
url, study, me = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
store = Store(url)
print("ready", flush=True)
sys.stdin.readline()
for i in range(5):
    trial = Trial(number=me * 100 + i, params={"rank": 8}, recipe=Recipe())
    store.start_trial(study, trial)
    for step in range(3):
        store.add_point(study, trial.number, 1, CurvePoint(share=0.5, step=step, tokens=1, seconds=1.0, metrics={}))
    assert store.finish_trial(study, with_state(trial, "complete"))
    store.add_event(study, "wrote", number=trial.number)
    store.add_spent(study, 1)
"""


def test_nothing_is_lost_when_four_processes_write_at_once(url):
    store = Store(url)
    record = add(store)
    at_once([python(WRITER, url, record.id, me, **PIPES) for me in range(4)])
    expected = sorted(me * 100 + i for me in range(4) for i in range(5))
    trials = store.trials(record.id, curves=True)
    assert [t.number for t in trials] == expected
    assert all(t.state == "complete" and [p.step for p in t.curve] == [0, 1, 2] for t in trials)
    assert sorted(event["number"] for event in store.events(record.id)) == expected
    assert store.study("small").spent == 20
    store.close()


OPENER = """
import json, sys
from hpo.spec import load
from hpo.store import Store
spec = load(json.loads(sys.argv[2]))
print("ready", flush=True)
sys.stdin.readline()
print(Store(sys.argv[1]).add_study(spec.spec, spec.written, "").id)
"""


def test_processes_that_make_the_same_new_record_at_once_share_it(url):
    said = at_once([python(OPENER, url, json.dumps(simulated("/nowhere")), **PIPES) for _ in range(4)])
    assert set(said) == {"1\n"}


@contextmanager
def write_lock(path, seconds: float, statements: list[str] = ()):
    """Holds the write lock of a database from now on for so long, in another thread; then commits the statements."""
    locked = threading.Event()

    def hold():
        db = sqlite3.connect(path, isolation_level=None)
        db.execute("BEGIN IMMEDIATE")
        for statement in statements:
            db.execute(statement)
        locked.set()
        time.sleep(seconds)
        db.execute("COMMIT")
        db.close()

    thread = threading.Thread(target=hold)
    thread.start()
    locked.wait()
    yield
    thread.join()


def test_a_record_that_another_process_is_making_this_moment_is_waited_for_and_shared(tmp_path):
    open_store(str(tmp_path / "made")).close()
    with closing(sqlite3.connect(tmp_path / "made" / "hpo.db")) as db:
        making = [sql for (sql,) in db.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")]
    with write_lock(tmp_path / "hpo.db", 0.5, [*making, f"INSERT INTO paretune VALUES ({VERSION})"]):
        store = open_store(str(tmp_path))
    assert add(store).id == 1
    store.close()


def test_a_locked_database_is_waited_for_and_can_be_read_meanwhile(tmp_path):
    store = open_store(str(tmp_path))
    record = add(store)
    with write_lock(tmp_path / "hpo.db", 1.5):
        began = time.monotonic()
        assert open_store(str(tmp_path), create=False).study("small") == record
        assert time.monotonic() - began < 1
        store.add_event(record.id, "written")
        assert time.monotonic() - began > 1
    assert [event["kind"] for event in store.events(record.id)] == ["written"]
    store.close()


def test_a_database_that_stays_locked_is_said_to_be_locked_not_damaged(tmp_path, monkeypatch):
    store = open_store(str(tmp_path))
    store.close()
    db = sqlite3.connect(tmp_path / "hpo.db")
    db.execute("BEGIN EXCLUSIVE")
    monkeypatch.setattr(store_module, "BUSY", 0.05)
    with pytest.raises(StoreError, match="locked"):
        open_store(str(tmp_path))
    db.close()


# Files that are not what they should be


@pytest.fixture
def written(tmp_path):
    store = open_store(str(tmp_path))
    record = add(store)
    for number in range(20):
        store.start_trial(record.id, trial(number, error="x" * 3000))
    store.close()
    return tmp_path / "hpo.db"


DAMAGE = {
    "cut in half": lambda content: content[: len(content) // 2 // 4096 * 4096],
    "cut within a page": lambda content: content[:-100],
    "cut in the header": lambda content: content[:50],
    "scribbled on": lambda content: content[: len(content) // 2] + b"\xff" * 8192 + content[len(content) // 2 + 8192 :],
    "zeros": lambda content: b"\0" * len(content),
    "no database": lambda content: b"PK\3\4" + content,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("create", [True, False])
def test_a_damaged_record_is_refused_and_left_as_it_is(written, damage, create):
    damaged = DAMAGE[damage](written.read_bytes())
    written.write_bytes(damaged)
    with pytest.raises(StoreError, match="damaged.*left as it is"):
        open_store(str(written.parent), create=create)
    assert written.read_bytes() == damaged
    assert os.listdir(written.parent) == ["hpo.db"]


def test_a_database_of_another_program_is_refused_and_left_as_it_is(tmp_path):
    db = sqlite3.connect(tmp_path / "hpo.db")
    db.execute("CREATE TABLE customers (id)")
    db.close()
    before = (tmp_path / "hpo.db").read_bytes()
    with pytest.raises(StoreError, match="another program.*customers"):
        open_store(str(tmp_path))
    assert (tmp_path / "hpo.db").read_bytes() == before


def test_a_newer_record_is_refused_and_left_as_it_is(written):
    db = sqlite3.connect(written)
    db.execute("UPDATE paretune SET version = ?", (VERSION + 1,))
    db.execute("DROP TABLE events")  # a newer program may have other tables: ours must not be put next to them
    db.commit()
    db.close()
    before = written.read_bytes()
    with pytest.raises(StoreError, match=f"tables {VERSION + 1}, known {VERSION}.*Upgrade"):
        open_store(str(written.parent))
    assert written.read_bytes() == before


def test_reading_where_nothing_is_writes_nothing(tmp_path):
    with pytest.raises(StoreError, match="no study record.*--storage"):
        open_store(str(tmp_path / "a" / "b"), create=False)
    (tmp_path / "hpo.db").write_bytes(b"")
    with pytest.raises(StoreError, match="no study record"):
        open_store(str(tmp_path), create=False)
    assert os.listdir(tmp_path) == ["hpo.db"]
    assert (tmp_path / "hpo.db").read_bytes() == b""


@pytest.mark.parametrize("folder", ["a b", "a?b", "a#b", "a%20b", "é😀", "a+b&c=d", "a'b\"c"])
def test_a_folder_may_have_any_name(tmp_path, folder):
    store = open_store(str(tmp_path / folder))
    add(store)
    store.close()
    assert (tmp_path / folder / "hpo.db").stat().st_size > 0
    again = pickle.loads(pickle.dumps(open_store(str(tmp_path / folder), create=False)))
    assert again.study("small").name == "small"
    assert sorted(os.listdir(tmp_path)) == [folder]


KILLED_WHILE_WRITING = """
import os, sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("PRAGMA cache_size = 1")
db.execute("BEGIN IMMEDIATE")
db.execute("DELETE FROM trials")
db.executemany("INSERT INTO events (study, at, kind, data) VALUES (1, 0, 'half', ?)", [("x" * 3000,)] * 500)
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("create", [True, False])
def test_a_write_that_was_killed_half_way_is_taken_back_when_the_record_is_opened(written, create):
    assert python(KILLED_WHILE_WRITING, written).wait() == -signal.SIGKILL
    assert written.with_name("hpo.db-journal").stat().st_size > 0
    store = open_store(str(written.parent), create=create)
    record = store.study("small")
    assert len(store.trials(record.id)) == 20
    assert store.events(record.id) == []
    store.close()


@pytest.mark.parametrize("url", ["hpo.db", "mongo://x/y", "postgresql+nothing://x/y"])
def test_a_url_that_cannot_be_used_is_an_error_of_the_store(url):
    with pytest.raises(StoreError, match="database URL"):
        Store(url)


# Who runs a study

HOLDER = """
import sys, time
from hpo.store import Store
store = Store(sys.argv[1])
with store.hold(int(sys.argv[2])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_a_killed_one_is_replaced_at_once(url):
    store = Store(url)
    record = add(store)
    assert not store.held(record.id)
    other = python(HOLDER, url, record.id, stdout=subprocess.PIPE)
    assert other.stdout.readline() == "held\n"
    assert store.held(record.id)
    with pytest.raises(StudyBusy, match=f"small is being run by process {other.pid}"), store.hold(record.id):
        pass
    assert other.poll() is None
    other.kill()
    other.wait()
    assert not store.held(record.id)
    with store.hold(record.id) as mine:
        mine.beat()
        assert store.held(record.id)
    assert not store.held(record.id)
    store.close()


def test_a_study_is_let_go_of_when_its_run_fails(store):
    record = add(store)
    with pytest.raises(ZeroDivisionError), store.hold(record.id):
        raise ZeroDivisionError
    assert not store.held(record.id)


def test_the_same_process_cannot_hold_a_study_twice(store):
    record = add(store)
    with store.hold(record.id), pytest.raises(StudyBusy), store.hold(record.id):
        pass


def test_a_run_on_another_machine_is_replaced_once_it_is_silent_and_then_stops(store, monkeypatch):
    record = add(store)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(store_module, "_machine", lambda: "elsewhere/1")
        silent = store.hold(record.id)
        theirs = silent.__enter__()
    with pytest.raises(StudyBusy, match="elsewhere"), store.hold(record.id):
        pass
    monkeypatch.setattr(store_module, "LEASE", 0.3)
    theirs.beat()
    with pytest.raises(StudyBusy), store.hold(record.id):
        pass
    time.sleep(0.4)
    with store.hold(record.id) as mine:
        with pytest.raises(StudyBusy, match="taken this study over"):
            theirs.beat()
        silent.__exit__(None, None, None)
        mine.beat()
        assert store.held(record.id), "the one that was replaced must not let go for the other"


def test_a_process_id_that_was_given_to_another_process_is_no_holder(store, monkeypatch):
    record = add(store)
    with monkeypatch.context() as earlier:
        earlier.setattr(store_module, "_started", lambda pid: "12345")
        store.hold(record.id).__enter__()
    with store.hold(record.id) as mine:
        mine.beat()
