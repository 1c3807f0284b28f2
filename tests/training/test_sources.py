"""Every kind of file gives the same rows; what is wrong is told by file and line; a kept copy reads the same; no code runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pandas
import pyarrow
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from training import sources
from training.data import read
from training.errors import InputError
from training.recipe import DataConfig

RECORDS = [{"instruction": f'say "{i}", née\n☃', "response": f"word {i}"} for i in range(30)]


def written(folder, kind: str) -> str:
    table, path = pandas.DataFrame(RECORDS), folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    elif kind == "json":
        path.write_text(json.dumps(RECORDS, indent=1))
    elif kind == "nested.json":
        path.write_text(json.dumps({"version": {"list": [1]}, "about": "[", "data": RECORDS, "more": 3}))
    elif kind == "lines.json":
        path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    elif kind == "csv":
        table.to_csv(path, index=False)
    elif kind == "parquet":
        table.to_parquet(path)
    elif kind == "feather":
        table.to_feather(path)
    elif kind == "arrow":
        arrow = pyarrow.Table.from_pylist(RECORDS)
        with pyarrow.ipc.new_stream(str(path), arrow.schema) as stream:
            stream.write_table(arrow)
    elif kind == "saved":
        Dataset.from_list(RECORDS).save_to_disk(path)
    elif kind == "splits":
        other = Dataset.from_list(RECORDS[:3])
        DatasetDict({"test": other, "train": Dataset.from_list(RECORDS)}).save_to_disk(path)
    elif kind == "files":
        path.mkdir()
        table.to_parquet(path / "train-00000-of-00001.parquet")
        table[:3].to_parquet(path / "test-00000-of-00001.parquet")
    return str(path)


KINDS = ("jsonl", "json", "nested.json", "lines.json", "csv", "parquet", "feather", "arrow", "saved", "splits", "files")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_rows_and_a_kept_copy_the_same_digest(tmp_path, kind):
    name = written(tmp_path, kind)
    rows = read(DataConfig(train=name))
    assert sorted(map(str, rows.train + rows.validation + rows.test)) == sorted(map(str, RECORDS))
    kept = sources.keep(name, "train", "data.train", tmp_path / "kept")
    assert kept.is_file()
    assert read(DataConfig(train=str(kept))) == rows


def test_a_folder_gives_each_split_its_own_rows(tmp_path):
    name = written(tmp_path, "splits")
    rows = read(DataConfig(train=name, test=name))
    assert len(rows.test) == 3 and len(rows.train) + len(rows.validation) == 27
    with pytest.raises(InputError, match="no split for validation; it has test, train"):
        read(DataConfig(train=name, validation=name))


def test_what_the_hub_cannot_give_is_told_and_an_id_is_checked():
    with pytest.raises(InputError, match="no data set's id"):
        sources.load("hub:a/b/c/d", "train", None, "data.train")
    code = "from training import sources; sources.load('hub:nobody/nothing/main@v1', 'train', None, 'data.train')"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "training.errors.InputError: data.train: hub:nobody/nothing/main@v1 cannot be read as a data set" in done.stderr


def test_a_folder_that_brings_code_runs_none_of_it(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "set.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(InputError, match="folder without a data set"):
        read(DataConfig(train=str(folder)))
    (folder / "train.jsonl").write_text(json.dumps(RECORDS[0]) + "\n")
    with pytest.raises(InputError):
        read(DataConfig(train=str(folder)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "a.json",
            '[{"instruction": "a", "response": "b"},\n\n{"response": "c"}]',
            "a.json:3: the field 'instruction' is missing",
        ),
        ("a.json", '[{"instruction": "a", "response": "b"},\n 7]', "a.json:2: is not a JSON object"),
        ("a.json", '[{"instruction": "a", "response": "b"}\n{}]', "a.json:2: is not JSON"),
        ("a.json", '[{"instruction": "a"', "is not JSON"),
        ("a.json", "[" * 100_000, "is not JSON that can be read"),
        ("a.json", '{"a": [{"x": 1}], "b": [{"y": 1}]}', "2 lists of rows (a, b)"),
        ("a.json", "[]", "no row is left"),
        ("a.parquet", "PAR1 but not really", "is not Parquet"),
        ("a.arrow", "ARROW1 but not really", "is not Arrow"),
    ],
)
def test_what_is_wrong_is_told_by_file_and_line(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as caught:
        read(DataConfig(train=str(tmp_path / name)))
    assert said in str(caught.value)


def test_rows_of_a_table_are_told_by_their_number(tmp_path):
    pandas.DataFrame([*RECORDS, {"instruction": "x", "response": None}]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match="a.parquet row 31: the field 'response' is missing"):
        read(DataConfig(train=str(tmp_path / "a.parquet")))


def test_a_format_is_for_files(tmp_path):
    with pytest.raises(InputError, match="data.format: is for files"):
        read(DataConfig(train=written(tmp_path, "saved"), format="csv"))


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3), max_leaves=4
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.text(), plain, max_size=3)), st.sampled_from([None, 1]))
def test_an_array_is_read_as_json_reads_it_with_the_line_of_each_element(records, indent):
    text = "\n " + json.dumps(records, indent=indent) + "\n"
    found = sources._json(text, "a.json", "data.train")
    assert [record for _, record in found] == json.loads(text)
    lines = text.split("\n")
    assert all(lines[line - 1].lstrip()[:1] in ("{", "[") for line, _ in found)
