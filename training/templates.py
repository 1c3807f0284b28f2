"""From a row to the text of its prompt.

Owns: the user's column template, chat templates by name, the user's own Jinja and the tokenizer's, and the sandbox that
renders what a user wrote. Must not know: files, splits, token ids.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

from training import tasks
from training.errors import InputError, Problem, wrong
from training.recipe import DataConfig
from training.rows import Row

SECONDS = 2.0  # for one conversation
CHARACTERS = 1_000_000  # that one conversation may become
MEMORY = 1 << 30  # bytes of the process that renders

_ALPACA = "Below is an instruction that describes a task{0}. Write a response that appropriately completes the request.\n\n"
# Each ends an answer with the tokenizer's end of sequence, which is the family's own mark in the family's own tokenizers, and
# elsewhere the token that the learned answer ends with. The beginning of sequence is added where the tokenizer adds one.
NAMED = {
    # OpenAI's ChatML, as Qwen2 and many others write it
    "chatml": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' else '<|im_end|>' }}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    # meta-llama/Meta-Llama-3-8B-Instruct
    "llama3": "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}"
    "{{ eos_token if m['role'] == 'assistant' else '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    # mistralai/Mistral-7B-Instruct-v0.2; a system message goes before the first question, as Mistral's guide does it
    "mistral": "{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{% set ns.system = m['content'] + '\n\n' %}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}[INST] {{ ns.system + m['content'] }} [/INST]{% set ns.system = '' %}{% endif %}{% endfor %}",
    # HuggingFaceH4/zephyr-7b-beta
    "zephyr": "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] + eos_token }}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    # lmsys/vicuna-7b-v1.5 (fastchat/conversation.py)
    "vicuna": "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + ' ' }}"
    "{% elif m['role'] == 'assistant' %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}"
    "{% else %}{{ 'USER: ' + m['content'] + ' ' }}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    # tatsu-lab/stanford_alpaca (train.py, PROMPT_DICT); a system message stands in for the opening sentence
    "alpaca": "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n\n' }}"
    "{% elif messages[-1]['input'] %}{{ '" + _ALPACA.format(", paired with an input that provides further context")
    + "' }}{% else %}{{ '" + _ALPACA.format("") + "' }}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '### Response: ' + m['content'] + eos_token + '\n\n' }}"
    "{% elif m['role'] != 'system' %}{{ '### Instruction:\n' + (m['instruction'] if m['input'] else m['content']) + '\n\n' }}"
    "{% if m['input'] %}{{ '### Input:\n' + m['input'] + '\n\n' }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:{% endif %}",
}  # fmt: skip
# What no column template has: a tag of Jinja that looks at the messages.
_JINJA = re.compile(r"\{[{%][^{}]*\bmessages\b")


def chats(config: DataConfig, tokenizer) -> bool:
    """Says whether the tokenizer's own chat template renders the prompts."""
    # Plain text that is continued is no conversation.
    return config.template is None and config.task != "completion" and tokenizer is not None and bool(tokenizer.chat_template)


def writes_start(config: DataConfig, tokenizer) -> bool:
    """Says whether the template writes the beginning of sequence itself, as chat templates do by convention."""
    return chats(config, tokenizer) or (config.template is not None and _own_jinja(config.template))


def _own_jinja(template: str) -> bool:
    return template not in NAMED and bool(_JINJA.search(template))


def _jinja(config: DataConfig, tokenizer) -> str | None:
    """Returns the Jinja template that the study chose; None where the tokenizer's own or a column template is used."""
    if config.template is not None:
        return NAMED.get(config.template) or (config.template if _own_jinja(config.template) else None)
    return NAMED["chatml"] if config.task == "chat" and not chats(config, tokenizer) else None


def prompt_of(row: Row, config: DataConfig, tokenizer) -> str:
    """Returns the rendered prompt: the user's template, else the tokenizer's chat template, else the task's default."""
    return prompts_of([row], config, tokenizer)[0]


def prompts_of(rows: list[Row], config: DataConfig, tokenizer) -> list[str]:
    """Returns the rendered prompt of each row.

    Raises:
        InputError: a chat template fails, or is beyond the limits of time and length.
    """
    if (template := _jinja(config, tokenizer)) is not None:
        return render(template, [_messages(row, config, extras=True) for row in rows], _names(tokenizer))
    if chats(config, tokenizer):
        return _by_tokenizer([_messages(row, config) for row in rows], tokenizer)
    return [_filled(row, config) for row in rows]


def _filled(row: Row, config: DataConfig) -> str:
    template = config.template if config.template is not None else tasks.load(config.task).TEMPLATE
    if config.template is None and not row.get("input"):
        template = template.replace("{input}\n", "")
    # Only {column} is replaced: str.format would reach attributes of values, and braces in rows stay as they are.
    return re.sub(r"\{(\w+)\}", lambda match: row.get(match[1], ""), template)


def _messages(row: Row, config: DataConfig, *, extras: bool = False) -> list[dict[str, str]]:
    if config.task == "chat":
        return json.loads(row["messages"])
    response = tasks.load(config.task).RESPONSE
    message = {"role": "user", "content": "\n".join(value for name, value in row.items() if name != response and value)}
    if extras:
        message |= {name: row[name] for name in ("instruction", "input") if name in row}
    return [message]


def _by_tokenizer(conversations: list[list[dict]], tokenizer) -> list[str]:
    from jinja2.exceptions import TemplateError

    failures = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
    _examine(str(tokenizer.chat_template), conversations[:1], _names(tokenizer))
    rendered = functools.partial(tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True)
    try:
        return rendered(conversations) if conversations else []
    except failures:
        for i, messages in enumerate(conversations):  # which one
            try:
                rendered(messages)
            except failures as error:
                raise _unrendered("recipe.model", "the tokenizer's chat template", i, f"fails: {error}") from None
        raise


_ended: set[tuple[str, str]] = set()  # templates and names with which a conversation was rendered within the limits


def _examine(template: str, conversations: list[list[dict]], names: dict[str, str]) -> None:
    # transformers renders in the same sandbox, but without limits: the first conversation shows whether it ever ends.
    if (key := (template, json.dumps(names))) in _ended:
        return
    try:
        render(template, conversations, names)
        _ended.add(key)
    except InputError as error:
        said = error.problems[0].rule
        if "takes" in said or "writes" in said:  # what else is wrong, transformers says; it knows more tags than the sandbox
            raise wrong("recipe.model", f"the tokenizer's {said.removeprefix('the ')}", "Set data.template.") from None


def _names(tokenizer) -> dict[str, str]:
    known = {"bos_token": "", "eos_token": ""}
    return known | {name: str(value) for name, value in (tokenizer.special_tokens_map if tokenizer else {}).items()
                    if isinstance(value, str)}  # fmt: skip


def render(template: str, conversations: list[list[dict]], names: dict[str, str]) -> list[str]:
    """Returns each conversation as a Jinja chat template writes it, ready for an answer.

    A process of its own renders them, in jinja2's sandbox for immutable values, without files, with limits of time, length
    and memory: a thread cannot be ended from outside.

    Args:
        template: Jinja, with `messages`, `add_generation_prompt` and `names`.
        conversations: messages with role and content.
        names: what else the template may know: bos_token, eos_token.

    Raises:
        InputError: the template is wrong, or beyond a limit.
    """
    if not conversations:
        return []
    asked = {"template": template, "conversations": conversations, "names": names, "seconds": SECONDS,
             "characters": CHARACTERS, "bytes": MEMORY}  # fmt: skip
    command = [sys.executable, "-I", str(Path(__file__).with_name("sandbox.py"))]
    try:
        done = subprocess.run(command, input=json.dumps(asked).encode(), capture_output=True, env={},
                              timeout=10 * SECONDS + 0.01 * len(conversations))  # fmt: skip
        said = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        said = {"error": "takes too long.", "row": 0}
    except ValueError:  # ended by the system, for memory or by a signal
        said = {"error": "ended its process: it needs too much memory or time.", "row": 0}
    if "error" in said:
        raise _unrendered("data.template", "the chat template", said["row"], said["error"])
    return said["texts"]


def _unrendered(where: str, what: str, row: int, said: str) -> InputError:
    remedy = f"Correct it, or use one by name: {', '.join(NAMED)}."
    return wrong(where, f"{what} {said.splitlines()[0][:300]} (at row {row + 1} of those rendered)", remedy)


def chat_template_of(config: DataConfig, tokenizer) -> str | None:
    """Returns a chat template that asks as the rows did, for a model that was tuned on them; None: the tokenizer's own does.

    It renders the last user message where the main column was; other columns stay empty. A completion model gets the text of
    all messages as it is.
    """
    if chats(config, tokenizer):
        return None
    start = "{{ bos_token }}" if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else ""
    if (template := _jinja(config, tokenizer)) is not None:
        return template if writes_start(config, tokenizer) else start + template
    if config.task == "completion" and config.template is None:
        return start + "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    task = tasks.load(config.task)
    template = (config.template if config.template is not None else task.TEMPLATE).replace("{input}\n", "")
    before, name, after = re.split(r"\{(\w+)\}", template, maxsplit=1)
    before, after = (re.sub(r"\{\w+\}", "", part) for part in (before, after))
    asked = "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
    return f"{asked}{start}{{{{ {json.dumps(before)} + asked[-1]['content'] + {json.dumps(after)} }}}}"


_PROBE = [
    {"role": "user", "content": "Which ships?"},
    {"role": "assistant", "content": "Nine."},
    {"role": "user", "content": "Why?"},
]


def template_problems(config: DataConfig) -> list[Problem]:
    """Returns what is wrong with the user's template: unknown columns, or none at all; Jinja that does not render."""
    if config.template is None:
        return []
    task = tasks.load(config.task)
    names = ", ".join(NAMED)
    if config.template in NAMED or _own_jinja(config.template):
        if config.task == "completion":
            return [Problem("data.template", "is a chat template, and completion continues plain text.", "Use another task.")]
        try:
            render(_jinja(config, None), [_PROBE if config.task == "chat" else _PROBE[:1]], _names(None))
        except InputError as error:
            return list(error.problems)
        return []
    if config.task == "chat":
        return [
            Problem("data.template", "must be a chat template for task chat.", f"Write Jinja over messages, or one of {names}.")
        ]
    known = re.findall(r"\{(\w+)\}", task.TEMPLATE)
    used = re.findall(r"\{(\w+)\}", config.template)
    found = [
        Problem("data.template", f"unknown column {{{name}}}.", f"Known: {', '.join(known)}.")
        for name in used
        if name not in known
    ]
    if not used:
        found.append(Problem("data.template", "names no column, so every prompt would be the same.", f"Use {{{known[0]}}}."))
    return found
