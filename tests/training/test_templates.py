"""Chat templates: the tokenizer's, one by name, the user's own; what a user wrote runs in a sandbox that ends."""

from __future__ import annotations

import json
import time

import pytest

from training import templates
from training.data import prompt_of, read, template_problems, tokenize
from training.errors import InputError
from training.model import load_tokenizer
from training.recipe import DataConfig, Recipe

TURNS = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "q1"}, {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "q2"},
]  # fmt: skip
ROW = {"messages": json.dumps(TURNS), "response": "a2"}
# As the families' own tokenizers write the same turns, without the beginning of sequence, their mark as end of sequence.
KNOWN = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1§\n"
    "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "q1<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\na1§<|start_header_id|>user<|end_header_id|>\n\nq2<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "[INST] Be brief.\n\nq1 [/INST] a1§[INST] q2 [/INST]",
    "zephyr": "<|system|>\nBe brief.§\n<|user|>\nq1§\n<|assistant|>\na1§\n<|user|>\nq2§\n<|assistant|>\n",
    "vicuna": "Be brief. USER: q1 ASSISTANT: a1§USER: q2 ASSISTANT:",
    "alpaca": "Be brief.\n\n### Instruction:\nq1\n\n### Response: a1§\n\n### Instruction:\nq2\n\n### Response:",
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(Recipe())


@pytest.mark.parametrize("name", templates.NAMED)
def test_a_named_template_writes_as_its_family_does(name, tokenizer):
    config = DataConfig(train="x", task="chat", template=name)
    assert template_problems(config) == []
    assert prompt_of(ROW, config, tokenizer) == KNOWN[name].replace("§", tokenizer.eos_token)


@pytest.mark.parametrize("name", [None, *templates.NAMED])
def test_a_served_model_is_asked_as_the_rows_were(name, tokenizer):
    config = DataConfig(train="x", task="chat", template=name)
    copy = load_tokenizer(Recipe())
    copy.chat_template = templates.chat_template_of(config, tokenizer) or copy.chat_template
    assert copy.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True) == prompt_of(ROW, config, tokenizer)


def test_the_tokenizers_own_is_used_first_and_chatml_where_it_has_none(tokenizer):
    config, plain = DataConfig(train="x", task="chat"), load_tokenizer(Recipe())
    plain.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    assert prompt_of(ROW, config, plain) == "<system>Be brief.<user>q1<assistant>a1<user>q2<assistant>"
    plain.chat_template = None
    assert prompt_of(ROW, config, plain) == KNOWN["chatml"].replace("§", plain.eos_token)


def test_a_jinja_template_of_the_users_own_renders_every_task(tokenizer):
    own = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant]{{ bos_token }}"
    row = {"instruction": "do it", "input": "here", "response": "done"}
    prompt = prompt_of(row, DataConfig(train="x", template=own), tokenizer)
    assert prompt == f"[user] do it\nhere\n[assistant]{tokenizer.bos_token or ''}"


def test_the_beginning_of_sequence_is_there_once(tokenizer):
    from tokenizers.processors import TemplateProcessing

    copy = load_tokenizer(Recipe())
    copy.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{copy.bos_token} $A", special_tokens=[(copy.bos_token, copy.bos_token_id)]
    )
    own = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    for template in ("zephyr", own):
        found = tokenize([ROW], DataConfig(train="x", task="chat", template=template), copy, 500)
        assert found.ids[0][0] == copy.bos_token_id and found.ids[0].count(copy.bos_token_id) == 1


ATTACKS = {
    "an endless loop": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{{ messages }}", "takes more than 2 s",
    ),
    "a giant range": ("{{ range(10**9) }}{{ messages }}", "Range too big"),
    "a giant text": ("{% for i in range(99999) %}{{ messages }}{{ messages }}{% endfor %}", "more than 1,000,000 characters"),
    "all memory": ("{{ 'a' * 10**10 }}{{ messages }}", "too much memory"),
    "a file": ("{% include '/etc/passwd' %}{{ messages }}", "fails"),
    "an import": ("{% import 'os' as os %}{{ messages }}", "fails"),
    "python": ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "a format string": ("{{ messages }}{{ '{0.__class__.__mro__}'.format(messages) }}", "unsafe"),
    "a change of the rows": ("{{ messages.append(1) }}", "unsafe"),
    "broken Jinja": ("{% for m in messages %}", "endfor"),
    "an unknown filter": ("{{ messages | nothing }}", "nothing"),
    "a refusal": ("{{ messages }}{{ raise_exception('roles must alternate') }}", "roles must alternate"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_a_template_that_does_harm_is_refused(name):
    template, said = ATTACKS[name]
    since = time.monotonic()
    problems = template_problems(DataConfig(train="x", template=template))
    assert time.monotonic() - since < 15  # that it ends, not how fast it is
    assert [problem.where for problem in problems] == ["data.template"] and said in problems[0].rule


def test_a_tokenizers_template_that_never_ends_is_refused():
    copy = load_tokenizer(Recipe())
    copy.chat_template = ATTACKS["an endless loop"][0]
    with pytest.raises(InputError, match="recipe.model: the tokenizer's chat template takes more than 2 s"):
        prompt_of({"instruction": "x", "response": "y"}, DataConfig(train="x"), copy)
    copy.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(InputError, match="recipe.model: the tokenizer's chat template fails: no system message"):
        prompt_of(ROW, DataConfig(train="x", task="chat"), copy)


def test_a_column_template_is_none_of_a_conversation_and_plain_text_has_no_roles():
    (problem,) = template_problems(DataConfig(train="x", task="chat", template="{messages}"))
    assert "must be a chat template" in problem.rule
    (problem,) = template_problems(DataConfig(train="x", task="completion", template="chatml"))
    assert "completion continues plain text" in problem.rule


def test_a_text_in_a_row_is_never_a_template(tokenizer, tmp_path):
    text = "{{ messages }} {% for %} {instruction} <|im_end|>"
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"instruction": f"{text} {i}", "response": "x"}) + "\n" for i in range(20))
    )
    config = DataConfig(train=str(tmp_path / "a.jsonl"), template="zephyr")
    row = read(config).train[0]
    assert row["instruction"] in prompt_of(row, config, tokenizer)
