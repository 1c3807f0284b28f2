r"""Continue a text: rows are plain text, learned from `data.separator` on, or as a whole where there is none.

{"text": "table: 1-100\ncolumns: State, Format\nQ: What is the format for South Australia?\nA: SELECT Format FROM ..."}
"""

from __future__ import annotations

from training.tasks.instruction import score  # right when the greedy continuation is the row's

__all__ = ["COLUMNS", "OPTIONAL", "RESPONSE", "TEMPLATE", "divide", "score"]

COLUMNS = {"text": ("text", "content", "document")}
OPTIONAL = ()
TEMPLATE = "{prompt}"
RESPONSE = "response"


def divide(row: dict[str, str], separator: str | None) -> dict[str, str] | None:
    """Returns the row as prompt (up to and with the separator) and response, or None where it lacks the separator."""
    if separator is None:
        return {"prompt": "", "response": row["text"]}
    head, found, tail = row["text"].rpartition(separator)
    return {"prompt": head + separator, "response": tail.strip()} if found and tail.strip() else None
