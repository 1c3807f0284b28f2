"""A study file: what ships loads, overrides, defaults, and what counts as a change."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from contracts import SPACE, simulated

from hpo.errors import NotFound, SpecError
from hpo.spec import FIXED, Spec, build, bundled, changes, load
from hpo.written import parse
from training.model import EMBEDDED

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "examples" / "studies").rglob("*.yaml"))
SPACES = sorted((ROOT / "search_spaces").rglob("*.yaml"))


def named(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", STUDIES, ids=named)
def test_every_study_that_ships_loads_and_is_named_after_its_file(path):
    assert load(path).spec.name == path.stem


@pytest.mark.parametrize("path", SPACES, ids=named)
def test_every_space_that_ships_fits_a_recipe_and_holds_nothing_but_ranges(path, tmp_path):
    space = parse(path.read_text())
    spec = load(simulated(tmp_path, space=space, recipe={"precision": "bf16"})).spec
    assert list(spec.space) == list(space)
    assert not {"model", "data", "seed"} & set(space)


def test_what_ships_is_found_by_name():
    assert set(bundled("studies")) == {path.stem for path in STUDIES}
    assert set(bundled("spaces")) == {path.stem for path in SPACES}
    assert load("quickstart").source == "quickstart"


def test_a_file_in_the_folder_goes_before_a_bundled_study_of_no_suffix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").write_text(json.dumps(simulated(tmp_path, name="mine")))
    assert load("quickstart").spec.name == "mine"


def test_no_such_study_names_those_that_ship():
    with pytest.raises(NotFound, match="Did you mean simulated.*quickstart"):
        load("simulate")


def test_defaults(tmp_path, monkeypatch):
    monkeypatch.setenv("HPO_STORAGE", str(tmp_path / "here"))
    spec = load({"name": "s", "data": {"train": "embedded:train.jsonl"}, "space": "tiny"}).spec
    assert spec.storage == str(tmp_path / "here")
    assert spec.folder == tmp_path / "here" / "s"
    assert spec.objectives == ("accuracy", "seconds", "peak_bytes")
    assert (spec.algorithm.name, spec.train, spec.seed, spec.database) == ("bayes", "loop", 0, None)
    assert (spec.budget.trials, spec.budget.retries, spec.resources.workers) == (20, 2, 1)
    assert (spec.recipe.rank, spec.recipe.alpha, spec.recipe.learning_rate) == (16, 32, 2e-4)


def test_the_home_folder_is_where_studies_go_by_default(monkeypatch):
    monkeypatch.delenv("HPO_STORAGE", raising=False)
    spec = load({"name": "s", "data": {"train": "embedded:train.jsonl"}, "space": "tiny"}).spec
    assert spec.storage == str(Path.home() / "paretune")


# Overrides


def test_overrides_reach_nested_and_named_things_and_the_last_one_counts(tmp_path):
    given = simulated(tmp_path, space="tiny", algorithm="grid")
    before = copy.deepcopy(given)
    loaded = load(given, [
        "budget.trials=999999", "budget.trials=2000", "recipe.model=my/model", "evaluation.rows=7", "algorithm.levels=2",
        "space.rank={type: choice, values: [8]}", "space.learning_rate.high=1.0e-3", "objectives=[accuracy, seconds]",
        "description=a=b", "limits={seconds: 5}", "seed=3",
    ])  # fmt: skip
    spec = loaded.spec
    assert spec.budget.trials == 2000
    assert spec.recipe.model == "my/model"
    assert spec.evaluation.rows == 7
    assert (spec.algorithm.name, spec.algorithm.options) == ("grid", {"levels": 2})
    assert spec.space["rank"].values == (8,)
    assert spec.space["learning_rate"].high == 1e-3
    assert "batch_size" in spec.space.root, "the rest of the named space stays"
    assert spec.objectives == ("accuracy", "seconds")
    assert (spec.description, spec.limits.seconds, spec.seed) == ("a=b", 5, 3)
    assert given == before, "what was given is not changed"
    assert loaded.written["algorithm"] == {"name": "grid", "levels": 2}


def test_a_named_space_is_replaced_by_another_name(tmp_path):
    spec = load(simulated(tmp_path, recipe={"precision": "bf16"}), ["space=lora"]).spec
    assert list(spec.space) == list(parse((ROOT / "search_spaces" / "lora.yaml").read_text()))


# What was written


def test_what_was_written_is_kept_and_nothing_else(tmp_path):
    given = simulated(tmp_path, space="tiny")
    assert load(given).written == given
    assert load(given, ["seed=4"]).written == given | {"seed": 4}


def test_what_was_written_loads_to_the_same_study(tmp_path):
    for path in STUDIES:
        first = load(path, [f"storage={tmp_path}"])
        assert load(first.written).spec.model_copy(update={"data": first.spec.data, "recipe": first.spec.recipe}) == first.spec


@pytest.mark.parametrize("path", STUDIES, ids=named)
def test_a_study_survives_json(path):
    spec = load(path).spec
    assert Spec.model_validate_json(spec.model_dump_json()) == spec


def test_a_list_is_short_for_a_choice_and_a_name_for_an_algorithm(tmp_path):
    long = simulated(
        tmp_path, space={"rank": {"type": "choice", "values": [4, 8]}}, algorithm={"name": "grid", "options": {"levels": 3}}
    )
    short = simulated(tmp_path, space={"rank": [4, 8]}, algorithm={"name": "grid", "levels": 3})
    assert load(long).spec == load(short).spec


def test_relative_paths_are_taken_from_the_folder_of_the_file(tmp_path, monkeypatch):
    (tmp_path / "here" / "m").mkdir(parents=True)
    file = tmp_path / "here" / "s.yaml"
    file.write_text(
        "name: s\ndata: {train: rows/a.jsonl, test: /t.csv, validation: $ROWS/v.csv}\nrecipe: {model: m}\nspace: tiny\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ROWS", "/rows")
    loaded = load("here/s.yaml")
    assert loaded.spec.data.train == str(tmp_path / "here" / "rows" / "a.jsonl")
    assert (loaded.spec.data.test, loaded.spec.data.validation) == ("/t.csv", "/rows/v.csv")
    assert loaded.spec.recipe.model == str(tmp_path / "here" / "m")
    assert loaded.written["data"]["train"] == "rows/a.jsonl"
    raw = {"name": "s", "data": {"train": "a.jsonl"}, "space": "tiny", "recipe": {"model": "org/model"}}
    assert build(raw, tmp_path).recipe.model == "org/model", "no such folder: a Hugging Face id"
    assert build(raw | {"recipe": {"model": "embedded"}}, EMBEDDED.parent).recipe.model == "embedded"


def test_the_home_folder_and_variables_in_storage_are_replaced(monkeypatch):
    monkeypatch.setenv("WHERE", "/somewhere")
    assert load(simulated("$WHERE/x")).spec.storage == "/somewhere/x"
    assert load(simulated("~/x")).spec.storage == str(Path.home() / "x")


# What may not change


def test_changes_are_listed_with_their_path_and_both_values(tmp_path):
    old = simulated(tmp_path, recipe={"rank": 8, "model": "embedded"})
    new = simulated(tmp_path, recipe={"rank": 16, "epochs": 2}, seed=1)
    new["space"] = SPACE | {"rank": {"type": "choice", "values": [4]}}
    found = {problem.where: problem.rule for problem in changes(old, new)}
    assert found == {
        "recipe.rank": "was 8 and is now 16.",
        "recipe.model": "was 'embedded' and is now not written.",
        "recipe.epochs": "was not written and is now 2.",
        "space.rank.values": "was [4, 8, 16, 32] and is now [4].",
        "seed": "was not written and is now 1.",
    }


def test_a_section_that_was_not_written_is_compared_by_its_fields():
    assert [(p.where, p.rule) for p in changes({}, {"recipe": {"rank": 4}, "start": [1]})] == [
        ("recipe.rank", "was not written and is now 4."),
        ("start", "was not written and is now [1]."),
    ]
    assert changes({"limits": {}}, {}) == []


@pytest.mark.parametrize("name", FIXED)
def test_each_fixed_part_is_compared(name):
    assert [problem.where for problem in changes({name: 1}, {name: 2})] == [name]


def test_budget_resources_and_order_may_change(tmp_path):
    old = simulated(tmp_path)
    new = {name: old[name] for name in reversed(old)} | {
        "budget": {"trials": 50}, "resources": {"mode": "local", "cpus": 2}, "description": "x", "algorithm": "bayes",
    }  # fmt: skip
    new["space"] = {name: dict(reversed(dimension.items())) for name, dimension in SPACE.items()}
    assert changes(old, new) == []


def test_an_unknown_option_of_a_good_algorithm_is_found_when_the_study_loads(tmp_path):
    with pytest.raises(SpecError, match="algorithm.level: is not an option of grid. Did you mean levels"):
        load(simulated(tmp_path, algorithm={"name": "grid", "level": 3}))


def test_a_length_that_is_set_takes_the_place_of_the_files_own(tmp_path):
    written = simulated(tmp_path, recipe={"epochs": 2})
    assert (recipe := load(written, ["recipe.steps=5"]).spec.recipe).steps == 5 and recipe.epochs is None
