"""How long a study takes is predicted from its own trials, and from a few short runs before it."""

from __future__ import annotations

import json

import pytest
from contracts import command, one_object

from hpo import check, forecast
from hpo.errors import SpecError
from hpo.forecast import Left
from hpo.spec import load
from hpo.study import run

SIMULATED = {"data": {"train": "embedded:train.jsonl"}, "space": "tiny", "algorithm": "random", "train": "simulated"}


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """Forty finished simulated trials, with clock times as if each had taken its seconds and two more."""
    written = SIMULATED | {"name": "s", "storage": str(tmp_path_factory.mktemp("s")), "budget": {"trials": 40}}
    study = run(written)
    trials, now = [], 0.0
    for trial in study.history():
        took = (trial.outcome.seconds or 0) + 2
        trials.append(trial.model_copy(update={"started": now, "finished": now + took}))
        now += took
    return study.spec, trials


def test_what_is_left_is_near_what_the_rest_took(simulated):
    spec, trials = simulated
    for known in (8, 16, 30):
        said = Left(spec, None, None).seconds(trials[:known], {}, len(trials) - known)
        truth = trials[-1].finished - trials[known - 1].finished
        assert said == pytest.approx(truth, rel=0.35)  # the trials to come are drawn by chance


def test_what_a_running_trial_has_done_is_not_left(simulated):
    spec, trials = simulated
    left = Left(spec, None, None)
    begun = trials[20].model_copy(update={"state": "running", "outcome": None, "finished": None})
    said = [left.seconds([*trials[:20], begun], {20: share}, 20) for share in (0.0, 0.5, 0.9)]
    assert said == sorted(said, reverse=True)
    assert said[0] - said[1] == pytest.approx(0.5 * (trials[20].outcome.seconds + 2), rel=0.3)
    # Two at a time take half as long.
    other = trials[21].model_copy(update={"state": "running", "outcome": None, "finished": None})
    assert left.seconds([*trials[:20], begun, other], {20: 0.0, 21: 0.0}, 20) == pytest.approx(said[0] / 2, rel=0.2)


def test_nothing_is_said_before_a_trial_has_finished(simulated):
    spec, trials = simulated
    assert Left(spec, None, None).seconds([], {}, 40) is None


def test_a_probe_predicts_trials_the_study_and_its_cost(tmp_path, capsys):
    rows = [{"instruction": f"word {n} " * (1 + n % 5), "response": f"answer {n}"} for n in range(80)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "s.yaml").write_text(json.dumps({
        "name": "p", "storage": str(tmp_path / "store"),
        "data": {"train": str(tmp_path / "rows.jsonl"), "template": "{instruction}"},
        "recipe": {"max_length": 32}, "space": {"batch_size": [4, 16], "epochs": [1, 2]}, "budget": {"trials": 10},
        "resources": {"price": 3.6},
    }))  # fmt: skip
    code, out, _ = command(capsys, "check", str(tmp_path / "s.yaml"), "--probe", "--json")
    found = one_object(out)["predicted_seconds"]
    assert code == 0 and 0 < found["least"] < found["trial"] < found["most"]
    assert found["study"] == pytest.approx(10 * found["trial"])
    assert found["cost"] == pytest.approx(found["study"] * 3.6 / 3600)
    assert found["probes"] == 2 and found["error"] > 0
    assert not (tmp_path / "store").exists()  # nothing was started or written


def test_what_trains_nothing_here_cannot_be_probed(tmp_path):
    findings = check.inspect(load(SIMULATED | {"name": "s", "storage": str(tmp_path)}).spec)
    with pytest.raises(SpecError, match="nothing is trained here"):
        forecast.probe(findings)
