"""What a user typed, in YAML, as plain Python.

Owns: `parse`, `value_of`, and how much there may be of it. Must not know: what the fields mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpo.errors import Problem, SpecError

SIZE_LIMIT = 262_144  # bytes of a study file; a parser in Python takes seconds for more
NODE_LIMIT = 20_000  # values in a study file, aliases counted as often as they are used
DEPTH_LIMIT = 50  # mappings and lists inside one another


def parse(text: str, where: str = "study") -> dict[str, Any]:
    """Returns the YAML 1.2 mapping in a text, as plain Python; tags that build objects and duplicate keys are refused."""
    raw = typed(text, where)
    if not isinstance(raw, dict):
        shown = "nothing" if raw is None else "a list" if isinstance(raw, list) else "one value"
        raise SpecError(Problem(where, f"must be a mapping of fields, got {shown}.", "Begin with `name: my-study`."))
    return raw


def typed(text: str, where: str) -> Any:
    """Returns one YAML value of any kind; `where` is the place that an error names."""
    from ruamel.yaml import YAML, YAMLError

    yaml = YAML(typ="safe", pure=True)
    yaml.allow_duplicate_keys = False
    try:
        raw = yaml.load(text)
    except (YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        at = f"{where}:{mark.line + 1}" if mark else where
        said = (getattr(error, "problem", None) or str(error).split("\n")[0]).strip()
        if isinstance(error, RecursionError):
            said = f"nested more than {DEPTH_LIMIT} levels deep"
        elif said.startswith("Exceeds the limit"):
            said = "a number has more than 4300 digits"
        raise SpecError(Problem(at, f"is not valid YAML: {said}.", _yaml_remedy(said, where))) from None
    if _nodes(raw, NODE_LIMIT, DEPTH_LIMIT, where) <= 0:
        raise SpecError(Problem(where, f"has more than {NODE_LIMIT} values.", "Use fewer aliases and shorter lists."))
    return plain(raw)


def _yaml_remedy(said: str, where: str) -> str:
    remedies = {"tag": "Write plain values; nothing is built from tags.", "duplicate": "Keep one of the two.",
                "'\\t'": "Indent with spaces.", "another document": "Write one study per file.",
                "levels deep": "A study file needs three or four.", "digits": "Write a smaller number."}  # fmt: skip
    other = "The value is YAML, as in the file." if where.startswith("--set") else "Look at the line, and the one before it."
    return next((remedy for word, remedy in remedies.items() if word in said), other)


def _nodes(value: Any, left: int, depth: int, where: str) -> int:
    """Returns how many more values there may be; an alias inside what it stands for is endlessly deep."""
    if depth < 0:
        raise SpecError(Problem(where, f"is nested more than {DEPTH_LIMIT} levels deep.", _yaml_remedy("levels deep", where)))
    left -= 1
    children = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    for child in children:
        if left <= 0:
            return left
        left = _nodes(child, left, depth - 1, where)
    return left


def plain(value: Any) -> Any:
    """Returns a value of mappings, lists and scalars, whatever their types were; others become text."""
    if isinstance(value, Mapping):
        return {str(name): plain(child) for name, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(child) for child in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def value_of(text: str, where: str) -> Any:
    """Returns a value that was typed for a field, as YAML reads it, and numbers as people write them (1e-4)."""
    value = typed(text, f"--set {where}") if text else None
    try:
        return float(value) if isinstance(value, str) and value[:1].isdigit() else value
    except ValueError:
        return value
