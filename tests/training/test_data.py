"""Files to rows to tokens: every bad input by file and line, disjoint splits, exact prompt boundaries, a faithful cache."""

from __future__ import annotations

import csv
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from training import data, tokens
from training.data import prepare, prompt_of, read, template_problems, tokenize
from training.errors import InputError
from training.model import load_tokenizer
from training.recipe import DataConfig, Recipe


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(Recipe())


@pytest.fixture
def plain(tokenizer):
    """A tokenizer without a chat template."""
    copy = load_tokenizer(Recipe())
    copy.chat_template = None
    return copy


def write_jsonl(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def good(count: int = 12) -> list[dict]:
    return [{"instruction": f"say {i}", "response": f"word {i}"} for i in range(count)]


def problems(config: DataConfig) -> list[str]:
    with pytest.raises(InputError) as caught:
        read(config)
    return [str(problem) for problem in caught.value.problems]


def everything(rows) -> list[dict]:
    return rows.train + rows.validation + rows.test


# Reading


def test_jsonl_and_csv_give_the_same_rows(tmp_path):
    records = good() + [{"instruction": 'with, comma and "quotes"\nand a second line', "response": "née ☃"}]
    jsonl = write_jsonl(tmp_path / "a.jsonl", records)
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["instruction", "response"])
        writer.writeheader()
        writer.writerows(records)
    first, second = read(DataConfig(train=jsonl)), read(DataConfig(train=str(tmp_path / "a.csv")))
    assert first.train == second.train
    assert sorted(map(str, everything(first))) == sorted(map(str, records))


def test_csv_keeps_line_separators_inside_a_field(tmp_path):
    path = tmp_path / "a.csv"
    lines = [f"q{i} \u2028 \x0b \x85 end,a{i}" for i in range(12)]
    path.write_text("instruction,response\n" + "\n".join(lines) + "\n", encoding="utf-8")
    rows = everything(read(DataConfig(train=str(path))))
    assert Counter(row["instruction"] for row in rows) == Counter(line.rpartition(",")[0] for line in lines)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path, name):
    text = "".join(json.dumps(row) + "\n" for row in good())
    if name.endswith("csv"):
        text = "instruction,response\n" + "".join(f"{row['instruction']},{row['response']}\n" for row in good())
    path = tmp_path / name
    path.write_bytes(text.encode())
    usual = read(DataConfig(train=str(path)))
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert everything(read(DataConfig(train=str(path)))) == everything(usual)


def test_the_format_can_be_said(tmp_path):
    write_jsonl(tmp_path / "rows.txt", good())
    assert len(everything(read(DataConfig(train=str(tmp_path / "rows.txt"), format="jsonl")))) == 12
    assert problems(DataConfig(train=str(tmp_path / "rows.txt"))) == [
        "data.train: cannot tell the format of rows.txt. Set data.format to jsonl or csv."
    ]


def test_numbers_become_text_in_the_response(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": f"2 * {i}", "answer": 2 * i} for i in range(12)])
    assert {row["response"] for row in everything(read(DataConfig(train=path)))} == {str(2 * i) for i in range(12)}


GOOD = "".join(json.dumps(row) + "\n" for row in good()).encode()
BAD_FILES = [
    (b"", "data.train: {file} is empty."),
    (b" \n\n", "data.train: {file} is empty."),
    (GOOD + b'{"instruction": "a\0b"}', "data.train: {file}:13: a NUL byte"),
    (GOOD + b"\n\xff\xfe", "data.train: {file}:14: byte {at} is not UTF-8."),
    (GOOD + b"not json\n", "data.train: {file}:13: is not JSON."),
    (GOOD + b"[" * 100_000, "data.train: {file}:13: is not JSON."),
    (b"[" + b", ".join(GOOD.splitlines()) + b"]", "data.train: {file} is one JSON array."),
    (GOOD + b'"text"\n', "data.train: {file}:13: is not a JSON object."),
    (GOOD + b'{"instruction": "a"}\n', "data.train: {file}:13: the field 'response' is missing."),
    (
        GOOD + b'{"instruction": ["a"], "response": "b"}\n',
        "data.train: {file}:13: the field 'instruction' must be text, got list.",
    ),
    (GOOD + b'{"instruction": "a", "response": true}\n', "data.train: {file}:13: the field 'response' must be text, got bool."),
    (GOOD + b'{"instruction": "a", "response": " "}\n', "data.train: {file}:13: the field 'response' is empty."),
    (
        GOOD + b'{"instruction": "\\ud800", "response": "b"}\n',
        "data.train: {file}:13: the field 'instruction' has half a character",
    ),
    (b'{"a": "x", "b": "y"}\n', "data.train: the first row has no column any of instruction, prompt, question, query, text"),
]


@pytest.mark.parametrize(("content", "message"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_bad_content_is_told_by_file_and_line(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    assert problems(DataConfig(train=str(path)))[0].startswith(message.format(file=path, at=len(GOOD) + 1))


def test_a_line_is_told_without_a_trace_of_the_parser(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"x\n" * 5)
    path = tmp_path / "a.jsonl"
    assert problems(DataConfig(train=str(path))) == [
        f"data.train: {path}:13, {path}:14, {path}:15 and 2 more lines: is not JSON. "
        "Correct or remove the rows, or name other columns in data.columns."
    ]


BAD_CSV = [
    ("instruction,response\na,b\na,b,c\n", ":3: has more fields than the header."),
    ("instruction,response\na,b\na\n", ":3: the field 'response' is missing."),
    ('instruction,response\na,b\n"a"x,b\n', ":3: is not CSV ("),
    ('instruction,response\na,b\n"a,b\n', ":3: is not CSV ("),
    ("instruction;response\na;b\n", "the first row has no column any of"),
    ("instruction,response\n", "no row is left."),
]


@pytest.mark.parametrize(("content", "message"), BAD_CSV, ids=range(len(BAD_CSV)))
def test_bad_csv_is_told_by_line(tmp_path, content, message):
    (tmp_path / "a.csv").write_text(content)
    assert message in problems(DataConfig(train=str(tmp_path / "a.csv")))[0]


def test_a_missing_file_and_a_folder_are_told(tmp_path):
    assert "no such file" in problems(DataConfig(train=str(tmp_path / "none.jsonl")))[0]
    assert "is a folder" in problems(DataConfig(train=str(tmp_path)))[0]


def test_problems_of_all_files_come_at_once(tmp_path):
    (tmp_path / "a.jsonl").write_text("x\n")
    (tmp_path / "b.jsonl").write_text("")
    found = problems(
        DataConfig(train=str(tmp_path / "a.jsonl"), validation=str(tmp_path / "b.jsonl"), test=str(tmp_path / "c.jsonl"))
    )
    assert [problem.split(":")[0] for problem in found] == ["data.train", "data.validation", "data.test"]


def test_too_few_rows_for_three_splits_are_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", good(2))
    assert "no row is left" in problems(DataConfig(train=path))[0]


def test_columns_can_be_named_and_names_are_checked(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": f"x{i}", "a": f"y{i}"} for i in range(12)])
    rows = read(DataConfig(train=path, columns={"instruction": "q", "response": "a"}))
    assert {row["response"] for row in everything(rows)} == {f"y{i}" for i in range(12)}
    found = problems(DataConfig(train=path, columns={"instruction": "q", "response": "b", "label": "a"}))
    assert found == [
        "data.columns.label: unknown column of task instruction. Known: instruction, input, response.",
        "data.train: the first row has no column 'b' for 'response'; it has q, a. Set data.columns.response.",
    ]


def test_an_optional_column_may_begin_later(tmp_path):
    records = good()
    records[5]["input"] = "context"
    rows = everything(read(DataConfig(train=write_jsonl(tmp_path / "a.jsonl", records))))
    assert [row["input"] for row in rows if row["instruction"] == "say 5"] == ["context"]
    assert sum(bool(row["input"]) for row in rows) == 1


def labelled(*labels: str) -> list[dict]:
    return [{"text": f"text {i}", "label": labels[i % len(labels)]} for i in range(40)]


def test_labels_must_be_two_and_known(tmp_path):
    one = write_jsonl(tmp_path / "one.jsonl", labelled("a"))
    assert problems(DataConfig(train=one, task="classification")) == [
        "data.labels: classification needs two labels, got ['a']. Check data.columns.label."
    ]
    three = write_jsonl(tmp_path / "three.jsonl", labelled("a", "b", "c"))
    assert read(DataConfig(train=three, task="classification")).labels == ("a", "b", "c")
    assert problems(DataConfig(train=three, task="classification", labels=("a", "b"))) == [
        "data.train: labels that are not in data.labels: ['c']. Add them, or remove the rows."
    ]


def test_space_around_labels_does_not_count(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"text {i} , {'ab'[i % 2]}\n" for i in range(40)))
    assert read(DataConfig(train=str(tmp_path / "a.csv"), task="classification")).labels == ("a", "b")


def test_completion_is_divided_at_the_last_separator(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"Q: A: {i}\nA: answer {i}"} for i in range(12)])
    rows = everything(read(DataConfig(train=path, task="completion", separator="A:")))
    assert {(row["prompt"], row["response"]) for row in rows} == {(f"Q: A: {i}\nA:", f"answer {i}") for i in range(12)}
    assert "no text after data.separator 'ZZ'" in problems(DataConfig(train=path, task="completion", separator="ZZ"))[0]


# Splits


def test_splits_are_seeded_and_share_no_content(tmp_path):
    records = good(60) + good(30) + [{"instruction": " say 1 ", "response": "another answer"}]
    config = DataConfig(train=write_jsonl(tmp_path / "a.jsonl", records))
    rows = read(config)
    assert read(config) == rows
    assert read(config, seed=1).test != rows.test
    parts = [{row["instruction"].strip() for row in part} for part in (rows.train, rows.validation, rows.test)]
    assert len(parts[1]) == 5 and len(parts[2]) == 6
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert set.union(*parts) == {f"say {i}" for i in range(60)}
    assert len(rows.validation) == 5 and len(rows.test) == 6  # a repeated row is scored once
    assert rows.notes[:2] == (
        "test: 6 rows cut from the training rows by seed",
        "validation: 5 rows cut from the training rows by seed",
    )


def test_rows_that_stand_in_two_given_files_are_left_out_and_noted(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", [{**row, "input": ""} for row in good(20)])
    validation = write_jsonl(tmp_path / "validation.jsonl", good(30)[18:26])
    test = write_jsonl(tmp_path / "test.jsonl", good(30)[24:])
    rows = read(DataConfig(train=train, validation=validation, test=test))
    assert [len(part) for part in (rows.train, rows.validation, rows.test)] == [18, 6, 6]
    assert rows.notes == (
        "validation: 2 rows left out because they also stand in test",
        "train: 2 rows left out because they also stand in validation",
    )


def test_the_digest_is_of_the_content_and_not_of_the_path(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "sub" / "b.jsonl"
    second.parent.mkdir()
    write_jsonl(first, good(20))
    shutil.copy(first, second)
    assert read(DataConfig(train=str(first))).digest == read(DataConfig(train=str(second))).digest
    write_jsonl(second, good(21))
    assert read(DataConfig(train=str(first))).digest != read(DataConfig(train=str(second))).digest


def test_the_digest_tells_which_file_is_which_split_and_the_seed(tmp_path):
    train, other = write_jsonl(tmp_path / "a.jsonl", good(40)[:30]), write_jsonl(tmp_path / "b.jsonl", good(40)[30:])
    found = {
        read(DataConfig(train=train, validation=other)).digest,
        read(DataConfig(train=train, test=other)).digest,
        read(DataConfig(train=other, test=train)).digest,
        read(DataConfig(train=train, test=other), seed=1).digest,
        read(DataConfig(train=train, test=other, limit=9)).digest,
    }
    assert len(found) == 5


# Prompts


def test_a_template_names_columns_that_exist():
    def said(template, **more):
        return [str(p) for p in template_problems(DataConfig(train="x", template=template, **more))]

    assert said(None) == said("{instruction} -> ") == said("{prompt}", task="completion") == []
    assert said("{text} {instruction}") == ["data.template: unknown column {text}. Known: instruction, input."]
    assert said("{response}")[0].startswith("data.template: unknown column {response}.")  # would give the answer away
    assert said("always the same")[0].startswith("data.template: names no column")


def test_braces_in_rows_and_attacks_in_templates_are_inert(plain):
    row = {"instruction": "{response} {0} {instruction.__class__} %s ${HOME}", "response": "secret", "input": ""}
    rendered = prompt_of(row, DataConfig(train="x", template="{instruction}|{instruction.__class__}|{{instruction}}|"), plain)
    assert rendered == f"{row['instruction']}|{{instruction.__class__}}|{{{row['instruction']}}}|"


def test_the_chat_template_is_used_where_there_is_one(tokenizer, plain):
    row, config = {"instruction": "do it", "input": "here", "response": "done"}, DataConfig(train="x")
    assert prompt_of(row, config, tokenizer) == "do it\nhere\nAnswer:"
    tokenizer_with_roles = load_tokenizer(Recipe())
    tokenizer_with_roles.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}<assistant>"
    assert prompt_of(row, config, tokenizer_with_roles) == "<user>do it\nhere</s><assistant>"
    assert prompt_of(row, config, plain) == "do it\nhere\nAnswer:"
    assert prompt_of({**row, "input": ""}, config, plain) == "do it\nAnswer:"
    assert prompt_of(row, DataConfig(train="x", template="{input}?"), tokenizer_with_roles) == "here?"


# Tokens


def test_the_prompt_ends_exactly_where_the_response_begins(tokenizer):
    rows = [{"instruction": "one two " * i, "response": "three " * (i % 3 + 1)} for i in range(1, 9)]
    config = DataConfig(train="x")
    found = tokenize(rows, config, tokenizer, 200)
    assert found.cut == 0
    for row, ids, length in zip(rows, found.ids, found.prompt_lengths, strict=True):
        assert tokenizer.decode(ids[:length]) == prompt_of(row, config, tokenizer)
        assert tokenizer.decode(ids[length:-1]) == " " + row["response"]
        assert ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in ids[:-1]


def test_a_row_that_is_too_long_loses_the_beginning_of_its_prompt(tokenizer):
    rows = [{"instruction": "word " * 60, "response": "answer one"}, {"instruction": "short", "response": "answer two"}]
    whole = tokenize(rows, DataConfig(train="x"), tokenizer, 200)
    cut = tokenize(rows, DataConfig(train="x"), tokenizer, 30)
    assert whole.cut == 0 and cut.cut == 1
    assert cut.ids[0] == whole.ids[0][-30:] and cut.ids[1] == whole.ids[1]
    assert cut.ids[0][cut.prompt_lengths[0] :] == whole.ids[0][whole.prompt_lengths[0] :]
    exact = tokenize(rows, DataConfig(train="x"), tokenizer, len(whole.ids[0]))
    assert exact.cut == 0 and exact.ids == whole.ids


def test_a_response_that_is_too_long_leaves_one_token_of_prompt_and_is_counted(tokenizer):
    rows = [{"instruction": "a", "response": "long " * 50}]
    found = tokenize(rows, DataConfig(train="x"), tokenizer, 16)
    assert len(found.ids[0]) == 16 and found.prompt_lengths == [1] and found.cut == 1


def test_a_token_of_beginning_is_added_where_the_tokenizer_was_trained_with_one(plain):
    from tokenizers.processors import TemplateProcessing

    row = [{"instruction": "word " * 60, "response": "answer"}]
    assert tokenize(row, DataConfig(train="x"), plain, 200).ids[0][0] != plain.bos_token_id
    plain.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{plain.bos_token} $A", special_tokens=[(plain.bos_token, plain.bos_token_id)]
    )
    for max_length in (200, 20):
        found = tokenize(row, DataConfig(train="x"), plain, max_length)
        assert found.ids[0][0] == plain.bos_token_id and found.ids[0].count(plain.bos_token_id) == 1
        assert len(found.ids[0]) <= max_length and found.prompt_lengths[0] > 1


# Preparing


def test_the_cache_gives_the_same_rows(tmp_path, tokenizer, monkeypatch):
    config = DataConfig(train=write_jsonl(tmp_path / "a.jsonl", labelled("yes", "no")), task="classification")
    rows = read(config)
    fresh = prepare(rows, config, tokenizer, 64)
    assert prepare(rows, config, tokenizer, 64, cache=str(tmp_path / "cache")) == fresh
    monkeypatch.setattr(tokens, "tokenize", None)  # from now on only the cache can answer
    assert prepare(rows, config, tokenizer, 64, cache=str(tmp_path / "cache")) == fresh
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_cache_knows_other_rows_tokenizers_lengths_and_templates(tmp_path, tokenizer, plain):
    cache = str(tmp_path / "cache")
    path = write_jsonl(tmp_path / "a.jsonl", good(20))
    config = DataConfig(train=path)

    def both(rows, config, tokenizer, max_length):
        found = prepare(rows, config, tokenizer, max_length, cache=cache)
        assert found == prepare(rows, config, tokenizer, max_length)

    both(read(config), config, tokenizer, 64)
    both(read(config), config, tokenizer, 9)
    both(read(config, seed=3), config, tokenizer, 64)
    plain.chat_template = "{{ messages[0]['content'] }} now:"
    both(read(config), config, plain, 64)
    plain.chat_template = tokenizer.chat_template
    plain.add_tokens(["say"])
    both(read(config), config, plain, 64)
    templated = config.model_copy(update={"template": "{instruction}!"})
    both(read(templated), templated, tokenizer, 64)
    write_jsonl(tmp_path / "a.jsonl", good(21))
    both(read(config), config, tokenizer, 64)
    assert len(list((tmp_path / "cache").iterdir())) == 7


def test_labels_are_tokenized_as_responses_are(tmp_path, tokenizer):
    config = DataConfig(train=write_jsonl(tmp_path / "a.jsonl", labelled("yes please", "no")), task="classification")
    found = prepare(read(config), config, tokenizer, 64)
    for split in (found.train, found.validation, found.test):
        for ids, length in zip(split.ids, split.prompt_lengths, strict=True):
            assert ids[length:] in found.labels
    spaced = config.model_copy(update={"template": "{text}"})
    write_jsonl(tmp_path / "a.jsonl", [{**row, "text": row["text"] + " " * (i % 2)} for i, row in enumerate(labelled("y", "n"))])
    found = prepare(read(spaced), spaced, tokenizer, 64)
    assert all(ids[length:] in found.labels for ids, length in zip(found.train.ids, found.train.prompt_lengths, strict=True))


def test_a_label_longer_than_a_row_is_refused(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", labelled("yes", "a label of very many different words indeed"))
    config = DataConfig(train=path, task="classification")
    with pytest.raises(InputError, match="recipe.max_length: the label 'a label of"):
        prepare(read(config), config, tokenizer, 8)


def test_a_sample_is_seeded_and_keeps_the_order():
    rows = data.Tokenized([[i] for i in range(50)], list(range(50)))
    chosen = data.sample(rows, 10, seed=0)
    assert chosen == data.sample(rows, 10, seed=0) != data.sample(rows, 10, seed=1)
    assert len(chosen) == 10 and [ids[0] for ids in chosen.ids] == sorted(chosen.prompt_lengths)
    assert data.sample(rows, 50, seed=0) is rows


def test_files_that_ship_are_found_and_nothing_beside_them(monkeypatch, tmp_path):
    assert data.locate("embedded:train.jsonl").is_file()
    assert data.locate("embedded:../../../../etc/passwd").parent == data.locate("embedded:train.jsonl").parent
    monkeypatch.setenv("ROWS", str(tmp_path))
    assert data.locate("$ROWS/a.jsonl") == tmp_path / "a.jsonl"


@pytest.mark.parametrize("seed", range(5))
def test_random_bytes_never_end_in_a_stack_trace(tmp_path, seed):
    rng = random.Random(seed)
    for name in ("a.jsonl", "a.csv"):
        (tmp_path / name).write_bytes(bytes(rng.choice(b'{}[]",:\n\\u0aZ \xff\r') for _ in range(rng.randint(1, 60))))
        with pytest.raises(InputError):
            read(DataConfig(train=str(tmp_path / name)))


def test_a_limit_is_a_seeded_choice_from_the_whole_file(tmp_path):
    rows = [{"text": f"row {i} of many", "label": "first" if i < 60 else "second"} for i in range(120)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(train=str(tmp_path / "rows.jsonl"), task="classification", limit=40)
    limited = read(config)
    assert len(limited.train) == 40 and {row["label"] for row in limited.train} == {"first", "second"}
    assert limited.train == read(config).train


def test_plain_text_is_not_rendered_as_a_conversation(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": f"Q: {i}\nA: {i}"}) for i in range(30)))
    config = DataConfig(train=str(tmp_path / "rows.jsonl"), task="completion", separator="\nA:")
    tokenizer = load_tokenizer(Recipe())
    assert tokenizer.chat_template
    assert prompt_of(read(config).train[0], config, tokenizer).startswith("Q: ")


# What may never change for studies that exist


def test_rows_and_digest_of_a_study_that_says_nothing_new_stay_as_they_were(tmp_path):
    """Recorded before there were `clean`, `split` and `too_long`; a study is continued only with the same digest."""
    path = write_jsonl(tmp_path / "a.jsonl", good(30))
    rows = read(DataConfig(train=path))
    assert rows.digest == "735b46bbde195e4a5c48d1930a179f4031393190a7ad880c463f219f0eee1cff"
    assert (
        read(DataConfig(train=path, limit=9, template="{instruction}"), seed=3).digest
        == "74e0fd660f14d35e632fc93f11eab74b1fa83e380263c4cb53257acfbf0edcf1"
    )
    assert [row["response"] for row in rows.test + rows.validation] == [
        "word 3",
        "word 10",
        "word 18",
        "word 27",
        "word 5",
        "word 4",
    ]
    changed = [DataConfig(train=path, clean={"repeated": "drop"}), DataConfig(train=path, split={"test": 0.2}),
               DataConfig(train=path, too_long="drop")]  # fmt: skip
    assert len({read(config).digest for config in changed} | {rows.digest}) == 4


# Rows that are too long


@pytest.mark.parametrize("how", ["cut_prompt", "cut_end", "cut_both", "drop", "error"])
def test_what_is_too_long_is_treated_as_said_and_counted(tokenizer, how):
    rows = [{"instruction": "word " * 60, "response": "answer"}, {"instruction": "short", "response": "long " * 60},
            {"instruction": "short", "response": "answer"}]  # fmt: skip
    whole = tokenize(rows, DataConfig(train="x"), tokenizer, 500)
    assert (whole.cut, whole.dropped) == (0, 0)
    config = DataConfig(train="x", too_long=how)
    if how == "error":
        with pytest.raises(InputError, match="recipe.max_length: 2 of 3 rows are longer than 30 tokens"):
            tokenize(rows, config, tokenizer, 30)
        return
    found = tokenize(rows, config, tokenizer, 30)
    assert found.ids[-1] == whole.ids[-1] and found.prompt_lengths[-1] == whole.prompt_lengths[-1]
    assert (found.cut, found.dropped, len(found)) == {"drop": (0, 2, 1)}.get(how, (2, 0, 3))
    assert all(len(ids) <= 30 and length < len(ids) for ids, length in zip(found.ids, found.prompt_lengths, strict=True))
    if how == "cut_prompt":
        assert found.ids[0] == whole.ids[0][-30:]
    if how == "cut_end":
        assert found.ids[1] == whole.ids[1][:30] and found.prompt_lengths[1] == whole.prompt_lengths[1]
        assert found.ids[0] == whole.ids[0][-30:]  # its prompt alone leaves no room
    if how == "cut_both":
        for ids, length, before, was in zip(found.ids, found.prompt_lengths, whole.ids, whole.prompt_lengths, strict=True):
            kept = len(ids) - length
            assert ids == before[was - length : was + kept]  # the prompt's end and the response's beginning
            assert abs(kept / len(ids) - (len(before) - was) / len(before)) < 1 / len(ids)


def test_held_out_rows_are_the_same_whatever_becomes_of_long_training_rows(tmp_path, tokenizer):
    records = [{"instruction": "word " * (i % 30) + str(i), "response": f"answer {i}"} for i in range(60)]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    found = []
    for how in ("cut_prompt", "cut_end", "drop"):
        config = DataConfig(train=path, too_long=how)
        fresh = prepare(read(config), config, tokenizer, 24, cache=str(tmp_path / "cache"))
        assert fresh == prepare(read(config), config, tokenizer, 24, cache=str(tmp_path / "cache"))
        found.append(fresh)
    assert found[0].test == found[1].test == found[2].test and found[0].validation == found[2].validation
    assert found[2].train.dropped == found[0].train.cut == found[1].train.cut > 0
    with pytest.raises(InputError, match="rows are longer than 8 tokens"):
        prepare(read(config), config.model_copy(update={"too_long": "error"}), tokenizer, 8)
