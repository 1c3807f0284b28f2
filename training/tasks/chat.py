"""Go on with a conversation: every answer of the assistant is learned, each given all that stands before it.

A conversation becomes one row per answer. Under a causal model that is the same likelihood as one long row with everything
else masked, and templates that treat earlier answers differently (by leaving out what was thought) are right by construction.

{"messages": [{"role": "user", "content": "how many ships?"}, {"role": "assistant", "content": "Nine."}]}
"""

from __future__ import annotations

import json
import re
from typing import Any

from training.tasks.instruction import score  # right when the greedy answer is the row's

__all__ = ["COLUMNS", "OPTIONAL", "RESPONSE", "TEMPLATE", "conversation", "divide", "is_conversation", "score"]

COLUMNS = {
    "messages": ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "text"),
    "system": ("system", "system_prompt"),
}
OPTIONAL = ("system",)
TEMPLATE = "{messages}"
RESPONSE = "response"
# What people call the four roles: OpenAI, ShareGPT, Vicuna, Gemma.
ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "bing": "assistant", "bard": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
_CHATML = re.compile(r"<\|im_start\|>([^\n]*)\n(.*?)(?:<\|im_end\|>|\Z)", re.DOTALL)


def is_conversation(value: Any) -> bool:
    """Says whether a field looks like one: a list of messages, or ChatML text."""
    return "<|im_start|>" in value if isinstance(value, str) else isinstance(value, list)


def conversation(value: Any, system: str = "") -> list[dict[str, str]] | str:
    """Returns messages with `role` and `content`, or what is wrong, in words that follow "the field ...".

    Args:
        value: OpenAI messages, ShareGPT conversations (`from` and `value`), or ChatML text.
        system: comes before all, where the conversation has no system message.
    """
    if isinstance(value, str):
        value = [{"role": role.strip(), "content": text} for role, text in _CHATML.findall(value)]
    if not isinstance(value, list) or not value:
        return "is no conversation."
    messages = []
    for message in value:
        if not isinstance(message, dict):
            return "has a message that is no object."
        role = message.get("role", message.get("from"))
        known = ROLES.get(role.lower()) if isinstance(role, str) else None
        if known is None:
            return f"has a message with the role {str(role)[:40]!r}."
        content = _text(message.get("content", message.get("value")))
        if content is None:
            return f"has a message of the {known} without text."
        messages.append({"role": known, "content": content})
    if system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    if not any(_answers(messages, i) for i in range(len(messages))):
        return "has no answer of the assistant."
    if any(not messages[i]["content"].strip() for i in range(len(messages)) if _answers(messages, i)):
        return "has an empty answer of the assistant."
    return messages


def divide(row: dict[str, str]) -> list[dict[str, str]]:
    """Returns one row for each answer that follows something: the messages before it, as JSON, and the answer."""
    messages = json.loads(row["messages"])
    return [
        {"messages": json.dumps(messages[:i], ensure_ascii=False), "response": messages[i]["content"]}
        for i in range(len(messages))
        if _answers(messages, i)
    ]


def _answers(messages: list[dict[str, str]], i: int) -> bool:
    # A conversation that the assistant opens has no prompt for that: it is read, not learned.
    return messages[i]["role"] == "assistant" and any(m["role"] in ("user", "tool") for m in messages[:i])


def _text(content: Any) -> str | None:
    if isinstance(content, list):  # OpenAI's parts
        parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
        return None if None in parts or not parts else "".join(parts)
    return content if isinstance(content, str) else None
