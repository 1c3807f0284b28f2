"""Forms of rows: conversations of every layout are the same rows, each answer is learned given all before it; what is wrong
is counted and treated as the study says."""

from __future__ import annotations

import json

import pytest
import torch

from training import tasks
from training.data import prepare, prompt_of, read
from training.errors import InputError
from training.model import load_model, load_tokenizer
from training.recipe import Clean, DataConfig, Recipe

TURNS = [
    ("system", "Be brief."),
    ("user", "how many ships?"),
    ("assistant", "Nine."),
    ("user", "and boats?"),
    ("assistant", "Two."),
]
SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt"}
LAYOUTS = {
    "openai": lambda turns: {"messages": [{"role": role, "content": text} for role, text in turns]},
    "parts": lambda turns: {"messages": [{"role": r, "content": [{"type": "text", "text": t}]} for r, t in turns]},
    "sharegpt": lambda turns: {"conversations": [{"from": SHAREGPT[role], "value": text} for role, text in turns]},
    "system apart": lambda turns: {"system": turns[0][1], "messages": [{"role": r, "content": t} for r, t in turns[1:]]},
    "chatml": lambda turns: {"text": "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)},
}


def write(path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def many(layout: str, count: int = 20) -> list[dict]:
    return [LAYOUTS[layout]([(role, f"{text} {i}" if role == "user" else text) for role, text in TURNS]) for i in range(count)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_a_conversation_gives_the_same_rows(tmp_path, layout):
    rows = read(DataConfig(train=write(tmp_path / "a.jsonl", many(layout)), task="chat"))
    usual = read(DataConfig(train=write(tmp_path / "b.jsonl", many("openai")), task="chat"))
    assert (rows.train, rows.validation, rows.test) == (usual.train, usual.validation, usual.test)
    assert len(rows.train) == 2 * 16 and len(rows.test) == 2 * 2  # two answers in each conversation


def test_every_answer_is_learned_given_all_that_stands_before_it(tmp_path):
    rows = read(DataConfig(train=write(tmp_path / "a.jsonl", many("openai")), task="chat")).train
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        before, later = json.loads(first["messages"]), json.loads(second["messages"])
        assert later[: len(before)] == before
        assert later[len(before)] == {"role": "assistant", "content": first["response"]}
        assert [m["role"] for m in later] == ["system", "user", "assistant", "user"]
        assert (first["response"], second["response"]) == ("Nine.", "Two.")


def test_one_row_for_each_answer_is_one_long_row_with_the_rest_masked(llama, tmp_path):
    """The oracle: one forward over the whole conversation, likelihood summed over the answers alone."""
    config = DataConfig(train=write(tmp_path / "a.jsonl", many("openai")), task="chat", template="zephyr")
    model, tokenizer = load_model(Recipe(model=llama)).eval(), load_tokenizer(Recipe(model=llama))
    rows = read(config)
    found = prepare(rows, config, tokenizer, 512)
    scores = tasks.load("chat").score(model, found.train, batch_size=3)
    row, length = found.train.ids[1], found.train.prompt_lengths
    with torch.no_grad():
        predicted = model(torch.tensor([row])).logits[0].log_softmax(-1)
    for which in (0, 1):
        own = found.train.ids[which]
        assert own[: length[which]] == row[: length[which]]  # a prefix of the whole conversation
        nll = -sum(predicted[k - 1, row[k]].item() for k in range(length[which], len(own) - 1))
        last = -predicted[len(own) - 2, tokenizer.eos_token_id].item()
        assert scores["nll"][which] == pytest.approx(nll + last, abs=2e-3)
        assert scores["tokens"][which] == len(own) - length[which]


def test_conversations_stay_on_one_side(tmp_path):
    rows = read(DataConfig(train=write(tmp_path / "a.jsonl", many("openai", 60)), task="chat"))
    sides = [{json.loads(row["messages"])[1]["content"] for row in part} for part in (rows.train, rows.validation, rows.test)]
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]
    assert sum(map(len, sides)) == 60


def user(text="q"):
    return {"role": "user", "content": text}


def answer(text="a"):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "is no conversation"),
        ("hello", "is no conversation"),
        ([user()], "has no answer of the assistant"),
        ([answer(), user()], "has no answer of the assistant"),
        ([user(), answer(" ")], "has an empty answer"),
        ([user(), {"role": "narrator", "content": "x"}, answer()], "has a message with the role 'narrator'"),
        ([user(), {"role": "assistant", "content": None, "tool_calls": []}], "has a message of the assistant without text"),
        (
            [user(), {"role": "user", "content": [{"type": "image", "url": "x"}]}, answer()],
            "has a message of the user without text",
        ),
        ([user(), "x"], "has a message that is no object"),
        ([user(), {"content": "x"}], "has a message with the role 'None'"),
        (None, "is missing"),
        (7, "is no conversation"),
        ([user("\ud800"), answer()], "half a character"),
    ],
)
def test_a_conversation_that_cannot_be_used_is_told_by_line(tmp_path, messages, said):
    path = write(tmp_path / "a.jsonl", [*many("openai"), {"messages": messages}])
    with pytest.raises(InputError, match=said) as caught:
        read(DataConfig(train=path, task="chat"))
    assert f"{path}:21: " in str(caught.value)


def test_an_opening_by_the_assistant_is_read_and_not_learned():
    row = {"messages": json.dumps([answer("Hello!"), user(), answer(), user("thanks")])}
    assert [(len(json.loads(part["messages"])), part["response"]) for part in tasks.load("chat").divide(row)] == [(2, "a")]


def test_plain_text_is_no_conversation(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": f"plain {i}"} for i in range(20)])
    with pytest.raises(InputError, match="the first row has no column any of messages"):
        read(DataConfig(train=path, task="chat"))


def test_alpaca_rows_are_instructions(tmp_path):
    records = [{"instruction": f"add {i}", "input": str(i) if i % 2 else "", "output": "x"} for i in range(20)]
    config = DataConfig(train=write(tmp_path / "a.jsonl", records), template="alpaca")
    rows = read(config)
    row = next(row for row in rows.train if row["input"])
    prompt = prompt_of(row, config, load_tokenizer(Recipe()))
    assert prompt.endswith(f"### Instruction:\n{row['instruction']}\n\n### Input:\n{row['input']}\n\n### Response:")


# What is wrong with rows, and what happens to them

SOUND = [{"instruction": f"say {i}", "response": f"word {i}"} for i in range(20)]
WRONG = {
    "unreadable": "not json",
    "missing": json.dumps({"instruction": "x"}),
    "wrong_type": json.dumps({"instruction": ["x"], "response": "y"}),
    "empty": json.dumps({"instruction": "x", "response": "  "}),
    "broken_text": json.dumps({"instruction": "caf\u00c3\u00a9", "response": "y"}),
}


@pytest.mark.parametrize("kind", WRONG)
def test_each_problem_is_refused_or_dropped_and_counted_with_its_line(tmp_path, kind):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in SOUND) + f"{WRONG[kind]}\n" * 5)
    with pytest.raises(InputError, match="a.jsonl:21, .*a.jsonl:22, .*a.jsonl:23 and 2 more lines"):
        read(DataConfig(train=str(path), clean=Clean(**{kind: "error"})))
    rows = read(DataConfig(train=str(path), clean=Clean(**{kind: "drop"})))
    assert len(rows.train) + len(rows.validation) + len(rows.test) == 20 and rows.read == {"train": 25}
    (found,) = rows.found
    assert (found.kind, found.split, found.action, found.count) == (kind, "train", "drop", 5)
    assert found.places == tuple(f"{path}:{line}" for line in (21, 22, 23))
    assert any("5 rows left out" in note for note in rows.notes)


def test_sound_text_of_many_languages_is_not_called_broken(tmp_path):
    said = ["naïve café", "ÂME", "Ångström", "Ãgua", "日本語", "emoji 😀", "“quoted” – dash…", "Ελληνικά", "a\u2028b\x85c"]
    path = write(tmp_path / "a.jsonl", [{"instruction": text, "response": text} for text in said * 2])
    assert not [f for f in read(DataConfig(train=path)).found if f.kind == "broken_text"]


def test_repeated_training_rows_are_kept_dropped_or_refused(tmp_path):
    near = {"instruction": "Say, in one word, what the name of this very ship is!", "response": "word"}
    again = {**near, "instruction": near["instruction"].replace("!", " ?").upper()}
    path = write(tmp_path / "a.jsonl", SOUND + SOUND[:4] + [near, again])
    held = write(tmp_path / "b.jsonl", [{"instruction": "unlike", "response": "any"}])

    def lines(**clean):
        return read(DataConfig(train=path, validation=held, test=write(tmp_path / "c.jsonl", SOUND[:1]), clean=Clean(**clean)))

    assert len(lines().train) == 24  # the two that stand in test are left out
    assert len(lines(repeated="drop").train) == 21
    assert len(lines(repeated="drop", near_repeated="drop").train) == 20
    with pytest.raises(InputError, match="4 rows stand in the training rows before .*a.jsonl:21"):
        lines(repeated="error")


def test_leaks_are_left_out_of_training_and_counted_exactly(tmp_path):
    long = [
        {"instruction": f"Tell me about ship number {i} of the northern fleet, please.", "response": f"w{i * 7919}"}
        for i in range(9)
    ]
    train = write(tmp_path / "a.jsonl", SOUND + long)
    almost = {**long[4], "instruction": long[4]["instruction"].replace("please.", "PLEASE")}
    held = write(tmp_path / "b.jsonl", [SOUND[3], {"instruction": "another one", "response": "x"}])
    test = write(tmp_path / "c.jsonl", [almost, {"instruction": "yet another", "response": "x"}])

    def found(**clean):
        rows = read(DataConfig(train=train, validation=held, test=test, clean=Clean(**clean)))
        return len(rows.train), [(f.kind, f.count, f.places) for f in rows.found]

    leak = ("leak", 1, (f"{train}:4",))
    assert found() == (28, [leak])
    assert found(near_leak="drop") == (27, [leak, ("near_leak", 1, (f"{train}:25",))])
    with pytest.raises(InputError, match="1 rows also stand in validation .*a.jsonl:4"):
        found(leak="error")
    with pytest.raises(InputError, match="1 rows are much like a held-out row"):
        found(near_leak="error")
