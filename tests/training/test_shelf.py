"""Rows that stay on disk: the same rows as in memory, on sides that share none, counted as exactly, read without holding them."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from training import quality
from training.data import prepare, read, tokenize
from training.errors import InputError
from training.model import load_tokenizer
from training.recipe import Clean, DataConfig, Recipe


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PARETUNE_CACHE", str(tmp_path / "home"))
    return tmp_path / "home"


def write(path: Path, rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


WORDS = [a + b for a in ("ka", "lo", "mi", "su", "te", "ro", "ny", "pa") for b in ("ban", "dor", "fel", "gim", "nup", "wex")]


def sentence(seed: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(12))


def row(seed: int) -> dict[str, str]:
    return {"instruction": sentence(seed), "response": sentence(10_000 + seed)}


def config(path: str, **given) -> DataConfig:
    return DataConfig(train=path, stream_above=0, **given)


def as_text(rows) -> list[str]:
    return sorted(json.dumps({k: v for k, v in one.items() if v}, sort_keys=True) for one in rows)


def test_the_rows_are_those_of_memory_in_parts_of_the_same_size(tmp_path):
    path = write(tmp_path / "a.jsonl", map(row, range(500)))
    disk, memory = read(config(path)), read(DataConfig(train=path))
    assert disk.large and not memory.large and disk.digest != memory.digest
    for name in ("train", "validation", "test"):
        assert len(getattr(disk, name)) == len(getattr(memory, name)) == len(list(getattr(disk, name)))
    whole = [*disk.train, *disk.validation, *disk.test]
    assert as_text(whole) == as_text([*memory.train, *memory.validation, *memory.test])
    assert disk.train[7] == list(disk.train)[7] and disk.train[-2:] == list(disk.train)[-2:]
    assert read(config(path)).train[7] == disk.train[7]  # from the shelf that is there
    assert list(read(config(path), seed=1).test) != list(disk.test)


def test_tokens_are_those_of_memory_and_lie_in_the_cache(tmp_path, cache):
    path, tokenizer = write(tmp_path / "a.jsonl", map(row, range(60))), load_tokenizer(Recipe())
    rows = read(config(path))
    found = prepare(rows, config(path), tokenizer, 80)
    assert found.train == tokenize(list(rows.train), config(path), tokenizer, 80)
    assert type(found.train.ids.flat).__name__ == "memmap" and (cache / "tokens").is_dir()
    assert found.train.lengths().tolist() == [len(ids) for ids in found.train.ids]


def test_faults_are_counted_and_placed_as_in_memory(tmp_path):
    rows = [*map(row, range(50)), row(1), row(1), {**row(5), "response": "other"}, "no json", {"instruction": "x"}, "[1]", "no"]
    train = write(tmp_path / "a.jsonl", rows)
    held = write(tmp_path / "b.jsonl", [row(3), *map(row, range(300, 310))])
    test = write(tmp_path / "c.jsonl", map(row, range(400, 410)))
    given = {"validation": held, "test": test}

    def seen(found):
        return sorted((one.kind, one.split, one.count, one.places) for one in found.findings if "near" not in one.kind)

    disk, memory = quality.examine(config(train, **given)), quality.examine(DataConfig(train=train, **given))
    assert seen(disk) == seen(memory) and disk.refused and disk.read == memory.read
    assert [disk.splits[name].rows for name in disk.splits] == [memory.splits[name].rows for name in disk.splits]
    assert disk.splits["train"].characters == memory.splits["train"].characters
    said = []
    for one in (config(train, **given), DataConfig(train=train, **given)):
        with pytest.raises(InputError) as caught:
            read(one)
        said.append(sorted(map(str, caught.value.problems)))
    assert said[0] == said[1]
    clean = Clean(unreadable="drop", missing="drop", repeated="drop")
    disk, memory = read(config(train, **given, clean=clean)), read(DataConfig(train=train, **given, clean=clean))
    assert list(disk.train) == [{"input": "", **one} | {"input": ""} for one in memory.train]
    assert {(f.kind, f.count, f.places) for f in disk.found} == {(f.kind, f.count, f.places) for f in memory.found}
    with pytest.raises(InputError, match="2 rows stand in the training rows before"):
        read(config(train, **given, clean=clean.model_copy(update={"repeated": "error"})))


def test_no_row_group_or_near_copy_crosses_and_strata_keep_their_shares(tmp_path):
    rows = [{**row(i % 80), "who": f"w{i % 20}", "kind": "rare" if i % 5 == 0 else "usual"} for i in range(400)]
    path = write(tmp_path / "a.jsonl", rows)

    def sides(**split):
        found = read(config(path, split=split))
        return [{one["instruction"] for one in part} for part in (found.train, found.validation, found.test)]

    for split in ({}, {"by": "group", "column": "who"}, {"by": "stratified", "column": "kind"}):
        train, validation, test = sides(**split)
        assert not train & validation and not train & test and not validation & test
        assert len(train | validation | test) == 80
    kind = {one["instruction"]: one["kind"] for one in rows}
    test = sides(by="stratified", column="kind", test=0.25)[2]
    assert sum(kind[one] == "rare" for one in test) == 4 and len(test) == 20
    copies = [{**row(i), "instruction": f"{sentence(i)}{'!' * (i % 2)}".upper()} for i in range(60)]
    near = read(config(write(tmp_path / "b.jsonl", [*map(row, range(60)), *copies]), split={"together": "near", "test": 0.3}))
    parts = [{one["response"] for one in part} for part in (near.train, near.validation, near.test)]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]


def test_near_copies_are_dropped_as_in_memory(tmp_path):
    copies = [{**row(i), "instruction": sentence(i).title() + "?"} for i in range(0, 40, 4)]
    train = write(tmp_path / "a.jsonl", [*map(row, range(60)), *copies])
    held = write(tmp_path / "b.jsonl", [{**row(i), "instruction": sentence(i) + "."} for i in (50, 51)])
    test = write(tmp_path / "c.jsonl", map(row, range(300, 305)))
    given = {"validation": held, "test": test, "clean": Clean(near_repeated="drop", near_leak="drop")}
    disk, memory = read(config(train, **given)), read(DataConfig(train=train, **given))
    assert as_text(disk.train) == as_text(memory.train) and len(disk.train) == 58
    assert {(f.kind, f.count) for f in disk.found} == {(f.kind, f.count) for f in memory.found} == {
        ("near_repeated", 10), ("near_leak", 2)}  # fmt: skip


def test_conversations_and_labels_are_what_they_are_in_memory(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": [{"role": "user", "content": sentence(i)}, *(turns[1:] + turns * (i % 3))]} for i in range(60)]
    path = write(tmp_path / "a.jsonl", rows)
    disk = read(config(path, task="chat"))
    whole = list(disk.train)
    assert len(disk.train) == len(whole) and [disk.train[i] for i in (0, 5, -1)] == [whole[i] for i in (0, 5, -1)]
    memory = read(DataConfig(train=path, task="chat"))
    assert as_text([*disk.train, *disk.validation, *disk.test]) == as_text([*memory.train, *memory.validation, *memory.test])
    path = write(tmp_path / "b.jsonl", [{"text": sentence(i), "label": f"l{i % 3}"} for i in range(90)])
    assert read(config(path, task="classification")).labels == ("l0", "l1", "l2")
    with pytest.raises(InputError, match="labels that are not in data.labels: \\['l2'\\]"):
        read(config(path, task="classification", labels=("l0", "l1")))


def test_a_mixture_stays_on_disk_with_limits_and_parts(tmp_path):
    train = {name: {"file": write(tmp_path / f"{name}.jsonl", map(row, range(start, start + size)))}
             for name, start, size in (("a", 0, 40), ("b", 1000, 200))}  # fmt: skip
    train["b"]["limit"] = 50
    rows = read(DataConfig(train=train, stream_above=1000))
    assert "train: rows of a 32 (weight 1), b 50 (weight 1)" in rows.notes
    assert rows.large and rows.parts["train"] == (("a", 32), ("b", 50)) and rows.parts["test"] == (("a", 4), ("b", 20))
    limited = read(DataConfig(train=train, stream_above=1000, limit=30))
    assert len(limited.train) == 30 and as_text(limited.test) == as_text(rows.test)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_other_formats_stay_on_disk_too(tmp_path, kind):
    import pandas

    frame = pandas.DataFrame(map(row, range(100)))
    path = tmp_path / f"a.{kind}"
    frame.to_csv(path, index=False) if kind == "csv" else frame.to_parquet(path)
    jsonl = write(tmp_path / "a.jsonl", map(row, range(100)))
    assert as_text(read(config(str(path))).test) == as_text(read(config(jsonl)).test)


MEASURE = """
import resource, sys
from training import shelf, sources, tokens
from training.data import prepare, read
from training.model import load_tokenizer
from training.recipe import DataConfig, Recipe
shelf.BATCH = tokens.CHUNK = 512
tokenizer = load_tokenizer(Recipe())
for path in sys.argv[2:]:
    config = DataConfig(train=path, stream_above=int(sys.argv[1]))
    found = prepare(read(config), config, tokenizer, 64)
    for _ in range(3):
        total = sum(len(found.train.ids[i]) for i in range(len(found.train)))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_file_or_with_epochs(tmp_path):
    paths = []
    for name, count in (("a", 3000), ("b", 25_000)):  # the first one fills what does not depend on the size
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(f'{{"instruction": "{name} {i} {i % 7} {i % 11}", "response": "{i}"}}\n' for i in range(count)))
        paths.append(str(path))

    done = subprocess.run([sys.executable, "-c", MEASURE, "0", *paths], capture_output=True, text=True, check=True)
    small, large = map(int, done.stdout.split())
    # 22,000 rows more: 4 MB are their numbers and ids, which a memory map counts as the process's; held rows take 25 MB.
    assert large - small < 12_000
