"""`hpo init`: from rows and a model to a study file that passes the check and runs."""

from __future__ import annotations

import csv
import json
import random

import pytest
from contracts import command, one_object

from hpo import check
from hpo.draft import draft
from hpo.errors import InputError
from hpo.spec import load
from hpo.study import run

WORDS = "invoice parcel camera password refund screen window bicycle letter garden".split()


def sentence(n: int) -> str:
    rng = random.Random(n)
    return f"{n} " + " ".join(rng.choice(WORDS) for _ in range(8))


ROWS = {
    "instruction": [{"instruction": sentence(n), "response": f"{WORDS[n % 10]} {n}"} for n in range(120)],
    "classification": [{"text": sentence(n), "label": WORDS[n % 4]} for n in range(120)],
    "completion": [{"text": sentence(n)} for n in range(120)],
}


def write(path, rows) -> None:
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("task", ROWS)
def test_a_drafted_study_knows_its_task_and_passes_the_check(tmp_path, task, kind):
    write(tmp_path / f"rows.{kind}", ROWS[task])
    made = draft(str(tmp_path / f"rows.{kind}"), "embedded", folder=tmp_path)
    (tmp_path / "s.yaml").write_text(made.text)
    spec = load(tmp_path / "s.yaml", [f"storage={tmp_path / 'store'}"]).spec
    assert (spec.name, spec.data.task, spec.recipe.model) == ("rows", task, "embedded")
    found = check.inspect(spec)
    assert found.tokens_per_row <= spec.recipe.max_length
    assert sum(map(len, (found.rows.train, found.rows.validation, found.rows.test))) == 120
    assert any(task in note for note in made.notes)


def test_a_drafted_study_really_runs(tmp_path):
    write(tmp_path / "rows.jsonl", ROWS["classification"])
    (tmp_path / "s.yaml").write_text(draft(str(tmp_path / "rows.jsonl"), "embedded", folder=tmp_path).text)
    sets = [
        f"storage={tmp_path / 'store'}", "budget.trials=2", "resources.mode=local", "algorithm=random",
        "space.epochs={type: choice, values: [1]}", "space.bits={type: choice, values: [32]}",
    ]  # fmt: skip
    study = run(tmp_path / "s.yaml", sets)
    assert [t.state for t in study.history()] == ["complete", "complete"]
    assert all(0 <= t.outcome.scores["accuracy"] <= 1 and t.outcome.seconds > 0 for t in study.history())
    assert study.certificate.scores[-1].who == "winner"
    assert (study.spec.folder / "report.html").is_file()


def test_paths_are_relative_to_where_the_file_will_lie(tmp_path, monkeypatch):
    (tmp_path / "rows").mkdir()
    (tmp_path / "studies").mkdir()
    write(tmp_path / "rows" / "a.jsonl", ROWS["classification"])
    monkeypatch.chdir(tmp_path / "rows")
    made = draft("a.jsonl", "embedded", folder=tmp_path / "studies")
    assert '"../rows/a.jsonl"' in made.text
    assert str(tmp_path) not in made.text


@pytest.mark.parametrize("name", ["données.jsonl", "😀.jsonl", 'a "b" #c.jsonl', "x: y.jsonl"])
def test_a_file_may_have_any_name(tmp_path, name):
    write(tmp_path / name, ROWS["classification"])
    (tmp_path / "s.yaml").write_text(draft(str(tmp_path / name), "embedded", folder=tmp_path).text, encoding="utf-8")
    assert load(tmp_path / "s.yaml").spec.data.train == str(tmp_path / name)


@pytest.mark.parametrize(
    ("given", "name"), [("My Rows (2).jsonl", "my-rows-2"), ("---.jsonl", "study"), ("x" * 90 + ".jsonl", "x" * 63)]
)
def test_the_study_is_named_after_the_file(tmp_path, given, name):
    write(tmp_path / given, ROWS["classification"])
    assert f"\nname: {name}\n" in draft(str(tmp_path / given), "embedded", folder=tmp_path).text
    assert "\nname: mine\n" in draft(str(tmp_path / given), "embedded", name="Mine!", folder=tmp_path).text


def test_rows_that_cannot_be_used_are_named_by_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"instruction": "a", "response": "b"}\n{"instruction": "c"}\nno json\n')
    with pytest.raises(InputError) as raised:
        draft(str(tmp_path / "a.jsonl"), "embedded", folder=tmp_path)
    assert "a.jsonl:2" in str(raised.value)
    assert "a.jsonl:3" in str(raised.value)


def test_columns_that_fit_no_task_are_named(tmp_path):
    write(tmp_path / "a.jsonl", [{"colour": "red", "shape": "round"}] * 20)
    with pytest.raises(InputError, match="colour, shape"):
        draft(str(tmp_path / "a.jsonl"), "embedded", folder=tmp_path)


def test_a_model_that_is_not_there_is_said(tmp_path):
    write(tmp_path / "a.jsonl", ROWS["completion"])
    with pytest.raises(InputError, match="no such folder"):
        draft(str(tmp_path / "a.jsonl"), "./nothing", folder=tmp_path)


# The command


def test_the_command_writes_a_file_that_the_next_command_accepts(tmp_path, monkeypatch, capsys):
    write(tmp_path / "rows.jsonl", ROWS["classification"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPO_STORAGE", str(tmp_path / "store"))
    code, out, _ = command(capsys, "init", "rows.jsonl", "--json")
    assert code == 0
    assert one_object(out)["path"] == "rows.yaml"
    code, out, _ = command(capsys, "check", "rows.yaml", "--json")
    assert code == 0
    assert sum(one_object(out)["rows"].values()) == 120
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "rows.yaml"]


def test_an_existing_file_is_not_overwritten(tmp_path, monkeypatch, capsys):
    write(tmp_path / "rows.jsonl", ROWS["classification"])
    monkeypatch.chdir(tmp_path)
    for arguments in ((), ("--out", "rows.yaml")):
        (tmp_path / "rows.yaml").write_text("mine")
        code, _, err = command(capsys, "init", "rows.jsonl", *arguments)
        assert (code, (tmp_path / "rows.yaml").read_text()) == (2, "mine")
        assert "rows.yaml exists" in err


def test_a_folder_that_is_not_there_is_said(tmp_path, monkeypatch, capsys):
    write(tmp_path / "rows.jsonl", ROWS["classification"])
    monkeypatch.chdir(tmp_path)
    code, _, err = command(capsys, "init", "rows.jsonl", "--out", "no/where.yaml")
    assert code == 2
    assert "no/where.yaml cannot be written" in err
