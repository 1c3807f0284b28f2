"""The register: numbers that are never given twice, stages that follow from what is made live, steps that stay done."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing

import pytest
from contracts import simulated

from hpo.certificate import Interval, Scored
from hpo.errors import NotFound
from hpo.model import Lineage, Model
from hpo.spec import load
from hpo.store import VERSION, open_store
from training.recipe import Recipe


def model(key: str, name: str = "bot", **changes) -> Model:
    lineage = Lineage(study="small", trial=0, recipe=Recipe(), rows="all", data={"train": "x.jsonl"}, digest="d", base="embedded")
    score = Scored(who="retrained", number=0, rows=10, accuracy=Interval(value=0.9, low=0.8, high=1.0), loss=0.1)
    return Model(name=name, version=0, key=key, folder="/nowhere", digest="x", created=1.0, lineage=lineage, kept="retrained",
                 why="better", scores=(score,), prompts=(("a", "b"),), **changes)  # fmt: skip


@pytest.fixture
def store(tmp_path):
    store = open_store(str(tmp_path))
    yield store
    store.close()


def stages(store) -> dict[int, str]:
    return {m.version: m.stage for m in store.models("bot")}


def test_a_model_comes_back_as_it_went_in_with_the_next_number_of_its_name(store):
    made = [store.add_model(model(key)) for key in ("a", "b")] + [store.add_model(model("c", "other"))]
    assert [(m.name, m.version, m.stage) for m in made] == [
        ("bot", 1, "candidate"), ("bot", 2, "candidate"), ("other", 1, "candidate"),
    ]  # fmt: skip
    assert store.model("bot", 2) == made[1] == model("b").model_copy(update={"version": 2})
    assert [m.label for m in store.models()] == ["bot@v1", "bot@v2", "other@v1"]


def test_the_same_promotion_registers_one_model_whoever_asks_at_the_same_time(store, tmp_path):
    found = []

    def register():
        with closing(open_store(str(tmp_path))) as own:
            found.append(own.add_model(model("same")).version)

    threads = [threading.Thread(target=register) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1] * 8
    assert len(store.models()) == 1


def test_what_becomes_live_makes_the_live_one_previous_and_the_previous_one_retired(store):
    for key in "abc":
        store.add_model(model(key))
    store.set_live("bot", 1)
    assert stages(store) == {1: "live", 2: "candidate", 3: "candidate"}
    store.set_live("bot", 2)
    store.set_live("bot", 2)  # again changes nothing
    assert stages(store) == {1: "previous", 2: "live", 3: "candidate"}
    store.set_live("bot", 3)
    assert stages(store) == {1: "retired", 2: "previous", 3: "live"}
    store.set_live("bot", 2)  # a rollback
    assert stages(store) == {1: "retired", 2: "live", 3: "previous"}


def test_a_name_alone_is_its_live_version_else_the_newest(store):
    for key in "abc":
        store.add_model(model(key))
    assert store.model("bot").version == 3
    store.set_live("bot", 1)
    assert store.model("bot").version == 1


def test_a_removed_version_is_gone_and_its_number_is_not_given_again(store):
    store.add_model(model("a"))
    store.set_stage("bot", 1, "removed")
    assert store.models() == []
    assert store.add_model(model("b")).version == 2
    with pytest.raises(NotFound, match=r"bot@v1.*There are: bot@v2"):
        store.model("bot", 1)
    with pytest.raises(NotFound, match=r"'nothing'.*There are: bot"):
        store.model("nothing")


def test_the_steps_of_a_promotion_stay_in_their_order(store):
    loaded = load(simulated("/nowhere"))
    study = store.add_study(loaded.spec, loaded.written, "").id
    assert store.steps("k") == {}
    for name in ("retrain", "merge", "again"):
        store.add_step("k", study, name, {"name": name})
    store.add_step("k", study, "merge", {"name": "anew"})
    assert list(store.steps("k").items()) == [
        ("retrain", {"name": "retrain"}), ("merge", {"name": "anew"}), ("again", {"name": "again"}),
    ]  # fmt: skip


def test_a_record_of_the_first_version_is_read_as_it_is_and_brought_up_to_date_by_what_writes(tmp_path):
    store = open_store(str(tmp_path))
    loaded = load(simulated("/nowhere"))
    record = store.add_study(loaded.spec, loaded.written, "")
    store.close()
    with closing(sqlite3.connect(tmp_path / "hpo.db")) as db, db:
        db.executescript("DROP TABLE models; DROP TABLE promotions; UPDATE paretune SET version = 1;")
    before = (tmp_path / "hpo.db").read_bytes()
    reader = open_store(str(tmp_path), create=False)
    assert reader.study("small") == record and reader.models() == []
    assert (tmp_path / "hpo.db").read_bytes() == before
    reader.upgrade()
    assert reader.add_model(model("a")).version == 1
    reader.close()
    with closing(sqlite3.connect(tmp_path / "hpo.db")) as db:
        assert db.execute("SELECT version FROM paretune").fetchall() == [(VERSION,)]
    writer = open_store(str(tmp_path))
    assert writer.study("small") == record and len(writer.models()) == 1
    writer.close()
