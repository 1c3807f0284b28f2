"""What pydantic says of a study file, in our words: the place, the rule with the value, the remedy.

Owns: `problem_of`. Must not know: how a file is read, what else can be wrong with it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from hpo.errors import Problem, nearest, rule_of
from training.recipe import Origin

# The members of the unions that a study file has, as pydantic names them in the place of an error.
_MEMBERS = {"bool", "int", "float", "str", "choice", "tuple[str, ...]", "tuple[union[bool,int,float,str], ...]"}
_DIMENSION = ["type", "low", "high", "log", "step", "values", "times", "when"]


def problem_of(error: Any, root: type[BaseModel]) -> Problem:
    """Returns an error of pydantic's about `root`, the model of the whole file, in our words."""
    members = [i for i, part in enumerate(error["loc"]) if part in _MEMBERS and i and error["loc"][0] not in ("data",)]
    forms = [2] if error["loc"][:2] == ("data", "train") else []  # a file's name, or a mixture
    path = [part for i, part in enumerate(error["loc"]) if i not in members and i not in forms]
    path = path[:2] if path[:2] == ["recipe", "targets"] else path
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".") or "study"
    kind, value = error["type"], error.get("input")
    if path[-1] == "[key]":
        rule = "must be a name of letters, digits, - and _, 40 at most."
        return Problem(where.removesuffix(".[key]"), rule, "Give the source another name.")
    if kind == "extra_forbidden":
        known = list(model_at(path[:-1], root).model_fields) if path[0] != "space" or len(path) == 1 else _DIMENSION
        known = list(Origin.model_fields) if forms else known
        return Problem(where, "unknown field.", nearest(str(path[-1]), known).strip() or f"Known: {', '.join(known)}.")
    if kind == "missing":
        return Problem(where, "is required.", _example(path))
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        written = value.get("type") if isinstance(value, dict) else None
        shown = f", got {written!r}" if written is not None else ""
        hint = nearest(str(written), ("float", "int", "choice"))
        return Problem(f"{where}.type", f"must be float, int or choice{shown}.", f"{hint}{_example(path)}")
    rule = rule_of(error)
    if path[:2] == ["recipe", "targets"]:
        rule = "must be a name or a list of names"
    elif members and path[0] != "space" or len(members) > 1:
        rule = "must be a finite number, text, true or false"
    shown = "" if ", got " in rule or isinstance(value, (dict, list)) else f", got {'nothing' if value is None else repr(value)}"
    expected = error.get("ctx", {}).get("expected", "")
    hint = nearest(value, re.findall(r"'([^']+)'", str(expected))) if isinstance(value, str) else ""
    return Problem(where, f"{rule}{shown}.", hint.strip() or (_example(path) if "mapping" in rule or "list" in rule else ""))


def _example(path: Sequence[str | int]) -> str:
    if path[0] == "space" and len(path) > 1:
        return "For example {type: choice, values: [8, 16]} or {type: float, low: 1.0e-4, high: 1.0e-2, log: true}."
    return _EXAMPLES.get(".".join(str(part) for part in path), "")


_EXAMPLES = {
    "name": "For example name: my-study.",
    "data": "For example data: {train: my.jsonl}.",
    "data.train": "Name a JSONL or CSV file, or several: {code: {file: a.jsonl, weight: 2}, chat: {file: b.jsonl}}.",
    "data.columns": "For example columns: {instruction: question}.",
    "data.labels": "For example labels: [yes, no].",
    "recipe": "For example recipe: {rank: 16}.",
    "recipe.targets": "For example targets: all-linear.",
    "space": "Name a bundled space (space: lora) or write one out.",
    "start": "For example start: [{rank: 8}], with every dimension of the space.",
    "objectives": "For example objectives: [accuracy, seconds].",
    "algorithm": "For example algorithm: bayes.",
    "prior": "For example prior: [an-earlier-study, lora].",
    "stopping": "For example stopping: front.",
    "budget": "For example budget: {trials: 30}.",
    "resources": "For example resources: {workers: 1}.",
    "evaluation": "For example evaluation: {rows: 200}.",
    "evaluation.metrics": "For example metrics: [perplexity, rouge_l].",
    "limits": "For example limits: {peak_bytes: 8000000000}.",
    "choose": "For example choose: {by: knee}.",
    "certify": "For example certify: {extra: 0.3}.",
    "promote": "For example promote: {accuracy: 0.9}.",
    "serving": "For example serving: {engine: {replicas: 2}}.",
}


def model_at(path: Sequence[str | int], root: type[BaseModel]) -> type[BaseModel]:
    """Returns the model of the section that a place lies in, as deep as there are sections."""
    model = root
    for part in path:
        found = model.model_fields.get(str(part))
        if found is None or not (isinstance(found.annotation, type) and issubclass(found.annotation, BaseModel)):
            break
        model = found.annotation
    return model
