"""Splits are deterministic, disjoint and of the size that was asked for; strata keep their shares, groups and near-duplicates
their side."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from training import duplicates
from training.data import read
from training.recipe import DataConfig, Split
from training.rows import Entry, Ledger, identity
from training.splits import hold_out, separate

shares = st.floats(0.05, 0.5)
splits = st.builds(
    Split, by=st.just("stratified"), together=st.sampled_from(["exact", "near"]), validation=shares, test=shares
) | st.builds(Split, by=st.just("group"), column=st.just("g"), validation=shares, test=shares) | st.builds(
    Split, together=st.sampled_from(["exact", "near"]), validation=shares, test=shares
)  # fmt: skip
words = st.lists(st.sampled_from("red green blue ship boat wind".split()), min_size=1, max_size=4).map(" ".join)
tables = st.lists(st.tuples(words, st.sampled_from("abc"), st.sampled_from("xyz")), min_size=4, max_size=40)


def made(table) -> list[Entry]:
    rows = [{"text": text, "label": label} for text, label, _ in table]
    return [Entry(row, f"f:{i}", identity(row), table[i][2]) for i, row in enumerate(rows)]


def cut(table, split: Split, seed: int) -> dict[str, list[Entry]]:
    config = DataConfig(train="x", task="classification", split=split)
    entries = made(table)
    if split.by == "stratified":
        for entry in entries:
            entry.group = None
    parts = {"train": entries}
    hold_out(parts, config, seed)
    separate(parts, config, Ledger())
    return parts


@settings(max_examples=80, deadline=None)
@given(tables, splits, st.integers(0, 9))
def test_no_row_group_or_near_duplicate_crosses(table, split, seed):
    parts = cut(table, split, seed)
    again = cut(table, split, seed)
    assert {k: [e.place for e in v] for k, v in parts.items()} == {k: [e.place for e in v] for k, v in again.items()}
    keys = {name: {entry.key for entry in entries} for name, entries in parts.items()}
    assert set.union(*keys.values()) == {entry.key for entry in made(table)}  # nothing is lost
    names = list(parts)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert not keys[one] & keys[other]
            if split.by == "group":
                assert not {e.group for e in parts[one]} & {e.group for e in parts[other]}
            if split.together == "near":
                assert all(
                    duplicates.near(a.row["text"], b.row["text"]) < duplicates.ALIKE for a in parts[one] for b in parts[other]
                )


@settings(max_examples=40, deadline=None)
@given(st.integers(20, 120), shares, shares, st.integers(0, 9))
def test_sizes_are_the_shares_and_strata_keep_theirs(count, validation, test, seed):
    rng = random.Random(count)
    table = [(f"{i} {rng.random()}", "abc"[min(i % 7, 2)], "x") for i in range(count)]
    for by in ("seed", "stratified"):
        parts = cut(table, Split(by=by, validation=validation, test=test), seed)
        assert len(parts["test"]) == max(1, round(count * test))
        assert len(parts["validation"]) == max(1, round((count - len(parts["test"])) * validation))
    labels, whole = Counter(e.row["label"] for e in parts["test"]), Counter(label for _, label, _ in table)
    assert all(abs(labels[label] - whole[label] * test) <= 1 for label in whole)


def test_groups_and_strata_come_from_a_column_of_the_file(tmp_path):
    records = [
        {"instruction": f"say {i}", "response": "x", "who": f"author {i % 20}", "kind": "ab"[i % 4 == 0]} for i in range(200)
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    author = {record["instruction"]: record["who"] for record in records}
    kind = {record["instruction"]: record["kind"] for record in records}
    rows = read(DataConfig(train=str(path), split={"by": "group", "column": "who", "test": 0.2}))
    sides = [{author[row["instruction"]] for row in part} for part in (rows.train, rows.validation, rows.test)]
    assert [len(side) for side in sides] == [15, 1, 4] and len(set.union(*sides)) == 20
    assert rows.notes[0] == "test: 40 rows cut from the training rows by groups of who"
    rows = read(DataConfig(train=str(path), split={"by": "stratified", "column": "kind"}))
    assert Counter(kind[row["instruction"]] for row in rows.test) == {"a": 15, "b": 5}


def test_a_split_says_what_it_needs():
    with pytest.raises(ValidationError, match="by: group needs column"):
        Split(by="group")
    with pytest.raises(ValidationError, match="by: seed looks at no column"):
        Split(column="x")
    with pytest.raises(ValidationError):
        Split(test=1)


# Near-duplicates


@settings(max_examples=60, deadline=None)
@given(st.lists(words, max_size=25), st.lists(words, max_size=8))
def test_near_duplicates_are_those_of_an_exhaustive_search(texts, others):
    near = [[duplicates.near(a, b) >= duplicates.ALIKE for b in texts] for a in texts]
    found = duplicates.clusters(duplicates.sketch(texts))
    for i in range(len(texts)):
        reached, new = {i}, {i}
        while new:
            new = {j for k in new for j in range(len(texts)) if near[k][j]} - reached
            reached |= new
        assert found[i] == min(reached)
    for text, index in zip(texts, duplicates.like(duplicates.sketch(texts), duplicates.sketch(others)), strict=True):
        alike = [j for j, other in enumerate(others) if duplicates.near(text, other) >= duplicates.ALIKE]
        assert index == (alike[0] if alike else None)


def test_case_space_and_punctuation_make_no_difference_and_numbers_do():
    assert duplicates.near("How many  ships?", "how many ships") == 1
    assert duplicates.near("2 * 3", "2 * 4") < duplicates.ALIKE
    assert duplicates.near("", "") == 1 and duplicates.near("?", "!") == 0
