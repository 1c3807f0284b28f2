"""Planted faults are counted exactly, with file and line; nothing else is reported; sound rows have no findings."""

from __future__ import annotations

import json
import random

import pytest

from training.model import load_tokenizer
from training.quality import Quality, examine
from training.recipe import Clean, DataConfig, Recipe

WORDS = [f"{a}{b}" for a in ("ka", "lo", "mi", "su", "te", "ro") for b in ("ban", "dor", "fel", "gim", "nup", "wex", "zot")]


def sentence(seed: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(12))


def write(path, rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def row(seed: int) -> dict[str, str]:
    return {"instruction": sentence(seed), "response": sentence(10_000 + seed)}


def counts(found: Quality) -> dict[tuple[str, str], int]:
    return {(one.kind, one.split): one.count for one in found.findings}


def test_sound_rows_have_no_findings(tmp_path):
    found = examine(DataConfig(train=write(tmp_path / "a.jsonl", map(row, range(200)))))
    assert found.findings == () and not found.refused
    assert {name: side.rows for name, side in found.splits.items()} == {"train": 162, "test": 20, "validation": 18}


def test_planted_faults_are_counted_exactly_with_their_lines(tmp_path):
    near = {**row(3), "instruction": row(3)["instruction"].upper() + "!"}
    other = {**row(5), "response": "another answer"}
    train = write(
        tmp_path / "a.jsonl", [*map(row, range(50)), row(1), row(1), near, other, "no json", {"instruction": "x"}, row(900)]
    )
    held = write(tmp_path / "b.jsonl", [row(900), {**row(7), "instruction": f"{sentence(7)}?"}, *map(row, range(300, 305))])
    test = write(tmp_path / "c.jsonl", map(row, range(400, 405)))
    config = DataConfig(train=train, validation=held, test=test)
    found = examine(config)
    assert counts(found) == {
        ("unreadable", "train"): 1, ("missing", "train"): 1, ("leak", "train"): 1, ("repeated", "train"): 2,
        ("contradiction", "train"): 2, ("near_leak", "train"): 1, ("near_repeated", "train"): 1,
    }  # fmt: skip
    by = {one.kind: one for one in found.findings}
    assert by["repeated"].places == (f"{train}:51", f"{train}:52")
    assert by["near_leak"].places == (f"{train}:8 ~ {held}:2",)
    assert by["leak"].places == (f"{train}:57",) and by["leak"].action == "drop"
    assert by["unreadable"].action == "error" and found.refused
    assert found.read == {"train": 57, "validation": 7, "test": 5} and found.splits["train"].rows == 54
    assert not examine(config.model_copy(update={"clean": Clean(unreadable="drop", missing="drop")})).refused
    assert Quality.model_validate_json(found.model_dump_json()) == found


def test_dropping_near_copies_leaves_none(tmp_path):
    rows = [*map(row, range(40)), *({**row(i), "instruction": sentence(i).title()} for i in range(10))]
    config = DataConfig(train=write(tmp_path / "a.jsonl", rows), clean=Clean(near_leak="drop", near_repeated="drop"))
    found = examine(config)
    assert counts(found)["near_repeated", "train"] == 10
    assert sum(side.rows for side in found.splits.values()) == 40


def test_lengths_are_those_of_training_and_uneven_labels_are_said(tmp_path):
    rows = [{"text": sentence(i), "label": "rare" if i % 20 == 0 else "usual"} for i in range(200)]
    config = DataConfig(train=write(tmp_path / "a.jsonl", rows), task="classification")
    found = examine(config, tokenizer=load_tokenizer(Recipe()), max_length=50)
    side = found.splits["train"]
    assert sum(side.labels.values()) == side.rows and side.labels["usual"] > 10 * side.labels["rare"]
    assert any("uneven" in note and "'usual'" in note for note in found.notes)
    from training.data import read, tokenize

    lengths = sorted(map(len, tokenize(read(config).train, config, load_tokenizer(Recipe()), 10_000).ids))
    assert (side.tokens.smallest, side.tokens.largest) == (lengths[0], lengths[-1])
    assert side.too_long == sum(length > 50 for length in lengths)


@pytest.mark.parametrize(("template", "said"), [("{{ messages[-1]['content'] }}", 2), ("chatml", 0)])
def test_a_template_that_leaves_turns_out_is_told(tmp_path, template, said):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": [{"role": "user", "content": sentence(i)}, *turns[1:], *turns]} for i in range(30)]
    config = DataConfig(train=write(tmp_path / "a.jsonl", rows), task="chat", template=template)
    found = examine(config, tokenizer=load_tokenizer(Recipe()))
    assert sum("leaves out" in note for note in found.notes) == said
    assert found.splits["train"].answers == 2 * found.splits["train"].rows
