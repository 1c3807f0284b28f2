"""`hpo data`: the report of rows as text and JSON, with the exit code of what a study would do; a study keeps it."""

from __future__ import annotations

import json

import pytest
from contracts import command, one_object

from hpo.draft import draft
from hpo.study import run
from training.quality import Quality


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"{'abcdefghij'[i % 10] * 9} {i}", "label": "xyz"[i % 3]}) + "\n" for i in range(90))
    )
    return path


def test_sound_rows_are_reported_with_0(rows, capsys):
    code, out, _ = command(capsys, "data", rows, "--model", "embedded", "--json")
    found = one_object(out)
    assert code == 0 and found["task"] == "classification" and not found["refused"]
    assert found["splits"]["train"]["tokens"]["largest"] > 0
    code, out, _ = command(capsys, "data", rows)
    assert code == 0 and "classification" in out


def test_rows_that_a_study_refuses_are_reported_with_2(rows, capsys):
    with rows.open("a") as file:
        file.write("not json\n")
    code, out, _ = command(capsys, "data", rows, "--json")
    found = one_object(out)
    assert code == 2 and found["refused"]
    assert {"kind": "unreadable", "count": 1, "places": [f"{rows}:91"]}.items() <= found["findings"][0].items()
    assert command(capsys, "data", rows)[0] == 2
    assert command(capsys, "data", rows.with_name("none.jsonl"))[0] == 2


def test_a_study_file_gives_its_own_data(rows, tmp_path, capsys):
    (tmp_path / "s.yaml").write_text(draft(str(rows), "embedded", folder=tmp_path).text)
    code, out, _ = command(capsys, "data", tmp_path / "s.yaml", "--json")
    assert code == 0 and one_object(out)["splits"]["train"]["too_long"] == 0


def test_conversations_and_folders_are_drafted_run_kept_and_shown(tmp_path):
    from datasets import Dataset

    turns = [("human", "how much is {}"), ("gpt", "{}"), ("human", "sure"), ("gpt", "yes")]
    talks = [{"conversations": [{"from": who, "value": text.format(i)} for who, text in turns]} for i in range(60)]
    Dataset.from_list(talks).save_to_disk(tmp_path / "talks")
    (tmp_path / "s.yaml").write_text(draft(str(tmp_path / "talks"), "embedded", folder=tmp_path).text)
    assert "task: chat" in (tmp_path / "s.yaml").read_text()
    sets = [f"storage={tmp_path / 'store'}", "budget.trials=1", "resources.mode=local", "recipe.steps=1", "evaluation.rows=4",
            "evaluation.test_rows=4"]  # fmt: skip
    study = run(tmp_path / "s.yaml", sets)
    assert study.winner() is not None
    kept = Quality.model_validate_json((study.spec.folder / "quality.json").read_text())
    assert kept.digest == study.record.digest and kept.splits["train"].answers == 2 * kept.splits["train"].rows
    assert "<h2>Data</h2>" in (study.spec.folder / "report.html").read_text()
    assert run(tmp_path / "s.yaml", sets).record.digest == study.record.digest  # the folder reads as its copy does
