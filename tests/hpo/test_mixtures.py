"""A study on rows of several sources: checked by source, kept with the study, and continued only with the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpo import check, spec, study
from hpo.errors import SpecError, StudyChanged


def raw(tmp_path: Path, **given) -> dict:
    for name, size in (("a", 40), ("b", 60)):
        rows = [{"instruction": f"{name} says {i}", "response": f"word {i}"} for i in range(size)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "name": "mixed", "storage": str(tmp_path / "store"), "objectives": ["accuracy"], "algorithm": "random",
        "data": {"train": {"a": {"file": str(tmp_path / "a.jsonl"), "weight": 2}, "b": {"file": str(tmp_path / "b.jsonl")}}},
        "space": {"learning_rate": {"type": "float", "low": 1e-3, "high": 1e-2}},
        "recipe": {"steps": 1, "batch_size": 4, "mix": {"b": 3}}, "budget": {"trials": 1}, "resources": {"mode": "local"},
        "evaluation": {"rows": 4, "test_rows": 4, "reports": 1}, **given,
    }  # fmt: skip


@pytest.mark.parametrize(("given", "said"), [
    ({"recipe": {"mix": {"c": 1}}}, "recipe.mix.c: 'c' is no source of data.train. Sources: a, b."),
    ({"data": {"train": "x.jsonl"}}, "recipe.mix.b: 'b' is no source of data.train. Write data.train: "),
    ({"data": {"train": {"a": {"file": "x.jsonl", "weigh": 1}}}}, "data.train.a.weigh: unknown field. Did you mean weight?"),
    ({"data": {"train": {"a b": {"file": "x.jsonl"}}}}, "data.train.a b: must be a name of letters"),
    ({"data": {"train": {"a": {"file": "x.jsonl", "weight": -1}}}}, "data.train.a.weight: must be at least 0, got -1."),
    ({"data": {"train": {}}}, "data.train: must not be empty."),
    ({"data": {"train": 3}}, "data.train: must be text, got 3."),
])  # fmt: skip
def test_what_is_wrong_with_a_mixture_is_told_by_its_place(tmp_path, given, said):
    with pytest.raises(SpecError) as caught:
        spec.build(raw(tmp_path, **given), tmp_path)
    assert any(str(problem).startswith(said) for problem in caught.value.problems)


def test_files_of_a_mixture_are_relative_to_the_study_file(tmp_path):
    given = raw(tmp_path)
    given["data"]["train"]["a"]["file"] = "rows/a.jsonl"
    assert spec.build(given, tmp_path).data.train["a"].file == str(tmp_path / "rows" / "a.jsonl")


def test_a_study_runs_on_a_mixture_keeps_its_rows_and_refuses_other_weights(tmp_path):
    given = raw(tmp_path)
    _, findings = check.load(given)
    assert findings.rows.parts["train"] == (("a", 32), ("b", 49))
    done = study.run(given)
    (trial,) = done.history()
    assert trial.state == "complete" and trial.recipe.mix == {"b": 3}
    kept = sorted(path.name for path in done.spec.folder.glob("data/*/*"))
    assert kept == ["train-a.jsonl", "train-b.jsonl"]
    assert f"a: {tmp_path / 'a.jsonl'} (weight 2)" in done.view().settings["data"]
    quality = json.loads((done.spec.folder / "quality.json").read_text())
    assert quality["read"] == {"train": 100} and quality["splits"]["test"]["rows"] == 10
    given["data"]["train"]["a"]["weight"] = 5
    given["budget"]["trials"] = 2
    with pytest.raises(StudyChanged, match="the rows have changed"):
        study.run(given)
