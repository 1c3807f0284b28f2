"""A study in Optuna's storage: every trial with what it was, and only what is new the second time."""

from __future__ import annotations

import optuna
import pytest
from contracts import SPACE, command, simulated

import hpo
from hpo.errors import InputError


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    space = SPACE | {"learning_rate": {"type": "float", "low": 1e-4, "high": 0.9, "log": True},
                     "gradient_checkpointing": [False, True]}  # fmt: skip
    return hpo.run(simulated(tmp_path_factory.mktemp("optuna"), space=space, budget={"trials": 7}, seed=1))


def test_in_memory_the_study_has_all_trials_with_values_in_their_own_direction(study):
    made = study.to_optuna()
    assert [d.name for d in made.directions] == ["MAXIMIZE", "MINIMIZE", "MINIMIZE"]
    ours, theirs = study.history(), made.trials
    assert [t.user_attrs["number"] for t in theirs] == [t.number for t in ours]
    for one, other in zip(ours, theirs, strict=True):
        assert other.state.name == {"complete": "COMPLETE", "diverged": "FAIL"}[one.state]
        assert other.params == one.params
        if one.state == "complete":
            assert other.values == [o.of(one.outcome) for o in study.spec.targets]
    assert {t.user_attrs["number"] for t in made.best_trials} == {t.number for t in study.front()}
    assert optuna.importance.get_param_importances(made, target=lambda t: t.values[1])


def test_a_storage_is_written_and_the_second_time_only_what_is_new(study, tmp_path, capsys):
    url = f"sqlite:///{tmp_path}/optuna.db"
    for _ in range(2):
        code, _, err = command(capsys, "export", "small", "--format", "optuna", "--output", url, "--storage", study.spec.storage)
        assert code == 0 and "7 trials" in err
    loaded = optuna.load_study(study_name="small", storage=url)
    assert len(loaded.trials) == 7


def test_a_storage_that_cannot_be_used_is_named(study, tmp_path):
    with pytest.raises(InputError, match="cannot be used"):
        study.to_optuna("nonsense")
    with pytest.raises(InputError, match="cannot be used"):
        study.to_optuna(f"sqlite:///{tmp_path}/no/such/folder.db")
    url = f"sqlite:///{tmp_path}/other.db"
    optuna.create_study(storage=url, study_name="small", directions=["minimize"])
    with pytest.raises(InputError, match="other goals"):
        study.to_optuna(url)
