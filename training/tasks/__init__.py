"""Kinds of task, one per file: the columns a row needs, the default prompt, and how a row is scored.

A task module has `COLUMNS` (our name -> the names people use), `OPTIONAL` (those that may be absent), `TEMPLATE`, `RESPONSE`
(the column that is learned) and `score(model, rows, *, batch_size, labels)`.
"""

from types import ModuleType


def load(name: str) -> ModuleType:
    """Returns the module of a task by its name; names were checked by DataConfig."""
    from training.tasks import chat, classification, completion, instruction

    return {"instruction": instruction, "classification": classification, "completion": completion, "chat": chat}[name]
