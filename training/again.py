"""Recipes trained again with other seeds, and scored on rows that chose nothing.

Owns: `rerun`, `in_turn`. Called on a worker by dotted name; takes and returns JSON. Must not know: studies.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from training.recipe import Job, Outcome


def in_turn(calls: Sequence[Sequence]) -> list[Any]:
    """Returns what each of several functions returns, called one after another: one worker group for all of them.

    Args:
        calls: (dotted name, arguments) of each.
    """
    found = []
    for function, payload in calls:
        module, _, name = function.rpartition(".")
        found.append(getattr(importlib.import_module(module), name)(**payload))
    return found


def rerun(jobs: Sequence[Mapping[str, Any]], expected: Sequence[float], allowed: float) -> list[dict[str, Any] | None]:
    """Returns for each job how it ended and how what it trained does on the test rows; None for one that was not begun.

    What a job came to is kept beside its output folder at once, and the same job is not trained again: whoever was
    interrupted goes on. The adapter itself is not kept.

    Args:
        jobs: each with an output folder of its own.
        expected: seconds of the optimizer steps of each.
        allowed: seconds of optimizer steps in all; no job is begun that would go beyond.

    Returns:
        `ended`, `reason`, `seconds` of its optimizer steps, and where it completed `right`, `nll` and `tokens` per test row.
    """
    return each([Job.model_validate(job) for job in jobs], _rerun, expected, allowed)


def each(
    jobs: Sequence[Job], train: Callable[[Job], dict[str, Any]], expected: Sequence[float], allowed: float
) -> list[dict[str, Any] | None]:
    """Returns what each job came to, from what was kept or by `train`, and None for those that were not begun; see `rerun`."""
    found: list[dict[str, Any] | None] = []
    spent, slower = 0.0, 1.0
    for job, seconds in zip(jobs, expected, strict=True):
        result = kept(job)
        if result is None and spent + seconds * slower <= allowed:
            result = train(job)
        if result is not None:
            took = result["seconds"] or 0.0
            spent += took
            slower = max(slower, took / seconds) if seconds else slower  # this machine, now
        found.append(result)
    return found


def kept(job: Job) -> dict[str, Any] | None:
    """Returns what this very job came to before, or None."""
    try:
        found = json.loads(_place(job).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found["result"] if found.get("job") == _identity(job) else None


def keep(job: Job, result: dict[str, Any]) -> None:
    """Keeps what a job came to; a reader never sees half of it."""
    place = _place(job)
    place.parent.mkdir(parents=True, exist_ok=True)
    aside = place.with_name(f".{place.name}.{os.getpid()}")
    aside.write_text(json.dumps({"job": _identity(job), "result": result}), encoding="utf-8")
    os.replace(aside, place)


def told(outcome: Outcome) -> dict[str, Any]:
    """Returns what is kept of an outcome beside the scores of its rows."""
    plain = outcome.model_dump(mode="json", exclude={"conditions", "checkpoint"})
    return {"ended": outcome.ended, "reason": outcome.reason, "seconds": outcome.seconds, "outcome": plain}


def _place(job: Job) -> Path:
    folder = Path(job.output)
    return folder.with_name(f"{folder.name}.json")


def _identity(job: Job) -> dict[str, Any]:
    return job.model_dump(mode="json", include={"recipe", "data", "rows"})


def _rerun(job: Job) -> dict[str, Any]:
    from training import measure
    from training.loop import train

    outcome = train(job)
    found = told(outcome)
    if outcome.ended == "complete":
        model = {"who": "again", "recipe": job.recipe.model_dump(mode="json"), "checkpoint": outcome.checkpoint}
        found |= measure.judge([model], job.model_dump(mode="json"))["models"][0]
    shutil.rmtree(job.output, ignore_errors=True)
    keep(job, found)
    return found


__all__ = ["each", "in_turn", "keep", "kept", "rerun", "told"]
