"""Kinds of task, one per file: the columns a row needs, the default prompt, and how a row is scored.

A task module has `COLUMNS` (our name -> the names people use), `OPTIONAL` (those that may be absent), `TEMPLATE`, `RESPONSE`
(the column that is learned) and `score(model, rows, *, batch_size, labels)`, which returns lists by row: `nll`, `tokens`, `right`
and, by name, any scores of its own, of which more is better and which `SCORES` names. A user's own task is a `Task`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from training import own
from training.errors import wrong

NAMES = ("instruction", "classification", "completion", "chat")


def exactly(model: Any, rows: Any, *, batch_size: int, labels: Any = ()) -> dict[str, list[float]]:
    """Scores as the task `instruction` does: a row is right when its greedy answer is the expected one, to the last token."""
    from training.tasks import instruction

    return instruction.score(model, rows, batch_size=batch_size, labels=labels)


@dataclass(frozen=True)
class Task:
    """A user's own task, with the names that a task module has."""

    COLUMNS: Mapping[str, tuple[str, ...]]
    TEMPLATE: str
    RESPONSE: str
    OPTIONAL: tuple[str, ...] = ()
    SCORES: tuple[str, ...] = ()
    score: Callable[..., dict[str, list[float]]] = exactly


def load(name: str) -> ModuleType | Any:
    """Returns the module of a task by its name, or a user's own task.

    Raises:
        InputError: it cannot be imported, or is no task.
    """
    from training.tasks import chat, classification, completion, instruction

    bundled = {"instruction": instruction, "classification": classification, "completion": completion, "chat": chat}
    if name in bundled:
        return bundled[name]
    task = own.load(name, "data.task")
    if missing := [part for part in ("COLUMNS", "OPTIONAL", "TEMPLATE", "RESPONSE", "score") if not hasattr(task, part)]:
        raise wrong("data.task", f"{name} is no task, it lacks {', '.join(missing)}.", "Make it a training.tasks.Task(...).")
    if task.RESPONSE not in task.COLUMNS:
        raise wrong("data.task", f"{name} learns the column {task.RESPONSE!r}, which is none of its COLUMNS.",
                    f"It has {', '.join(task.COLUMNS)}.")  # fmt: skip
    return task
