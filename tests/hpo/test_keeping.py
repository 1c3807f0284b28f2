"""Which adapters stay: those that may be wanted, whatever `keep` says; the rest goes, on the record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from contracts import searching, simulated
from hypothesis import given, settings
from hypothesis import strategies as st

import hpo
from hpo import local
from hpo.keeping import bytes_kept, given_up, why_gone
from hpo.objectives import named
from hpo.pareto import front
from hpo.store import Store
from hpo.trial import Trial
from serving.endpoint import TABLE
from training import artifact
from training.recipe import Outcome, Recipe

OBJECTIVES = named(("accuracy", "seconds", "peak_bytes"))


def trial(number: int, accuracy: float, seconds: float, peak_bytes: int, **changes) -> Trial:
    outcome = Outcome(scores={"accuracy": accuracy}, loss=1.0, seconds=seconds, peak_bytes=peak_bytes, checkpoint=f"/{number}")
    given = {"state": "complete", "origin": "random"} | changes
    return Trial(number=number, params={}, recipe=Recipe(), outcome=outcome, **given)


def test_what_no_other_beats_stays_and_so_do_the_defaults():
    trials = [trial(0, 0.5, 10, 100, origin="defaults"), trial(1, 0.9, 10, 100), trial(2, 0.8, 20, 100), trial(3, 0.95, 30, 50)]
    assert given_up("front", trials, OBJECTIVES) == {2: "keep: front; trial 1 is better"}
    assert given_up("front", trials, OBJECTIVES, winner=2) == {} == given_up("all", trials, OBJECTIVES)


def test_a_trial_that_was_only_slower_beside_others_stays_until_it_is_slower_by_far():
    trials = [trial(1, 0.9, 10, 100), trial(2, 0.9, 14, 100), trial(3, 0.9, 16, 100)]
    assert set(given_up("front", trials, OBJECTIVES)) == {3}


def test_best_and_none_keep_what_may_win_until_the_winner_is_known():
    trials = [trial(0, 0.5, 10, 100, origin="defaults"), trial(1, 0.9, 10, 100), trial(2, 0.95, 30, 100)]
    for keep in ("best", "none"):
        assert given_up(keep, trials, OBJECTIVES) == {}
    assert set(given_up("best", trials, OBJECTIVES, winner=2, settled=True)) == {0, 1}
    assert set(given_up("none", trials, OBJECTIVES, winner=2, settled=True)) == {0, 1, 2}


def test_what_was_not_trained_to_its_end_is_not_kept():
    assert set(given_up("front", [trial(0, 0.9, 1, 1, state="failed")], OBJECTIVES)) == {0}


values = st.tuples(st.integers(0, 4), st.integers(1, 6), st.integers(1, 4))


@given(st.lists(values, min_size=1, max_size=12), st.lists(st.floats(1.0, 1.49), min_size=12, max_size=12))
@settings(max_examples=200, deadline=None)
def test_the_front_is_kept_also_where_times_turn_out_shorter_and_repeating_it_gives_up_no_more(given_values, slower):
    trials = [trial(n, a / 4, s * slower[n], p) for n, (a, s, p) in enumerate(given_values)]
    gone = given_up("front", trials, OBJECTIVES)
    assert not {t.number for t in front(trials, OBJECTIVES)} & set(gone)
    alone = [trial(n, a / 4, s, p) for n, (a, s, p) in enumerate(given_values)]
    assert not {t.number for t in front(alone, OBJECTIVES)} & set(gone)
    left = [t if t.number not in gone else t.model_copy(update={"outcome": t.outcome.model_copy(update={"checkpoint": None})})
            for t in trials]  # fmt: skip
    assert given_up("front", left, OBJECTIVES) == {}


# On disk and on the record

SCORES = [(0.5, 100), (0.6, 90), (0.7, 80), (0.4, 120), (0.9, 200)]  # accuracy and bytes: 2 beats 1, 3 and the defaults


def trains(job, report):
    number = int(Path(job.output).name)
    artifact.write(job.output, lambda folder: (folder / "adapter.safetensors").write_text("x" * 1000) and {})
    accuracy, size = SCORES[number]
    return Outcome(scores={"accuracy": accuracy}, loss=1.0, seconds=1.0, peak_bytes=size, checkpoint=job.output)


def study(tmp_path, **changes) -> dict:
    return simulated(tmp_path, budget={"trials": len(SCORES)}, objectives=["accuracy", "peak_bytes"]) | changes


def there(tmp_path) -> set[int]:
    return {int(path.name) for path in (tmp_path / "small" / "trials").glob("[0-9]*")}


@pytest.mark.parametrize(("keep", "stay"), [("front", {0, 2, 4}), ("all", {0, 1, 2, 3, 4}), ("best", {4}), ("none", set())])
def test_adapters_that_are_not_wanted_are_deleted_and_the_record_says_so(tmp_path, keep, stay):
    made = hpo.run(study(tmp_path, keep=keep), train=trains)
    assert there(tmp_path) == stay
    for one in made.history():
        assert (one.outcome.checkpoint is not None) == (one.number in stay) == (why_gone(one) is None)
        assert one.state == "complete" and one.outcome.scores["accuracy"] == SCORES[one.number][0], "the result stays"
    assert bytes_kept(made.spec)[0] == len(stay)


def test_another_keep_may_be_asked_for_when_the_study_has_ended(tmp_path):
    hpo.run(study(tmp_path, keep="all"), train=trains)
    assert there(tmp_path) == {0, 1, 2, 3, 4}
    again = hpo.run(study(tmp_path, keep="best"), train=trains)
    assert there(tmp_path) == {4} and again.winner().outcome.checkpoint is not None


def test_what_an_endpoint_serves_stays_until_it_serves_it_no_more(tmp_path):
    hpo.run(study(tmp_path, keep="all"), train=trains)
    table = tmp_path / "endpoints" / "small" / TABLE
    table.parent.mkdir(parents=True)
    table.write_text(json.dumps({"adapters": [{"folder": str(tmp_path / "small" / "trials" / "00001")}]}))
    hpo.run(study(tmp_path), train=trains)
    assert there(tmp_path) == {0, 1, 2, 4}
    table.unlink()
    hpo.run(study(tmp_path), train=trains)
    assert there(tmp_path) == {0, 2, 4}


def test_what_a_process_that_died_left_is_deleted_by_the_next_one(tmp_path, monkeypatch):
    store = Store(f"sqlite:///{tmp_path}/hpo.db")
    with searching(store, study(tmp_path)) as search, monkeypatch.context() as patch:
        patch.setattr(artifact, "remove", lambda folder: None)  # the record is written, and then nothing more happens
        local.run_search(search, trains, search.spec.data)
        assert there(tmp_path) == {0, 1, 2, 3, 4} and why_gone(search.trials[1])
    with searching(store, study(tmp_path)) as search:
        search.retain(winner=None)
        assert there(tmp_path) == {0, 2, 4}
    store.close()


def test_an_adapter_of_the_users_own_elsewhere_is_not_touched(tmp_path):
    (tmp_path / "mine").mkdir()

    def elsewhere(job, report):
        return trains(job, report).model_copy(update={"checkpoint": str(tmp_path / "mine")})

    made = hpo.run(study(tmp_path, keep="none"), train=elsewhere)
    assert (tmp_path / "mine").is_dir() and all(t.outcome.checkpoint for t in made.history())

