"""From records to rows with a task's columns.

Owns: `Row`, `Entry`, the choice of columns, what is wrong with a record, and the count of it.
Must not know: file formats, splits, tokens.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from training import tasks
from training.errors import InputError, Problem
from training.recipe import Clean, DataConfig, Frozen
from training.sources import Source

AHEAD = 10_000  # records that are looked at for the names of columns
SHOWN = 3  # problems of one kind and file that are listed; the rest is counted
Row = dict[str, str]
_SORTED = json.JSONEncoder(sort_keys=True).encode
_SURROGATE = re.compile("[\ud800-\udfff]")
# The replacement character, and UTF-8 that was read as Windows-1252 or Latin-1 ("Ã©" for "é", "â€™" for an apostrophe).
_BROKEN = re.compile("\ufffd|[\u00c2\u00c3][\u0080-\u00bf]|\u00e2\u20ac|\u00e2\u0080")


@dataclass(slots=True)
class Entry:
    """A row on its way to a split: where it stood, what it is the same as (`key`), its stratum or group, its source's name."""

    row: Row
    place: str
    key: str
    group: str | None = None
    origin: str = ""
    line: int = 0


class Finding(Frozen):
    """How often something was found, where first, and what is done about it: keep, drop, or error (the study is refused)."""

    kind: str
    split: str
    what: str
    action: str
    count: int
    places: tuple[str, ...] = ()


@dataclass
class Ledger:
    """What was found while reading, in the order of finding."""

    findings: list[Finding] = field(default_factory=list)
    read: dict[str, int] = field(default_factory=dict)  # records by split

    def note(self, kind: str, split: str, what: str, action: str, places: Iterable[str], count: int | None = None) -> None:
        """Adds a finding where there is one; `count` where `places` are only the first ones."""
        places = list(places)
        if count := len(places) if count is None else count:
            self.findings.append(
                Finding(kind=kind, split=split, what=what, action=action, count=count, places=tuple(places[:SHOWN]))
            )


def entries(source: Source, config: DataConfig, split: str, ledger: Ledger, origin: str = "") -> Iterator[Entry]:
    """Yields the sound rows of one source while it is read, and notes the others at its end.

    Args:
        source: what is read.
        config: the task, the columns (those of this source), and what happens to rows with a problem.
        split: train, validation or test.
        ledger: where findings go.
        origin: the source's name, where it has one.

    Raises:
        InputError: with the problems that `config.clean` does not let pass.
    """
    where = f"data.{split}.{origin}" if origin else f"data.{split}"
    records, task = iter(source.records), tasks.load(config.task)
    ahead = list(itertools.islice(records, AHEAD))
    columns = _columns([raw for _, raw in ahead if isinstance(raw, dict)], config, where)
    grouped = config.split.column if split == "train" else None
    found: dict[tuple[str, str], _Seen] = {}
    read = 0
    for line, raw in itertools.chain(ahead, records):
        read += 1
        row, wrong = (None, [("unreadable", raw)]) if isinstance(raw, str) else _row(raw, columns, config, task)
        if grouped and not isinstance(raw, str) and raw.get(grouped) in (None, ""):
            wrong.append(("missing", f"the field {grouped!r} of data.split.column is missing."))
        if row is not None and any(_BROKEN.search(value) for value in row.values()):
            found.setdefault(("broken_text", "has traces of a wrong encoding."), _Seen()).add(line)
            row = row if config.clean.broken_text == "keep" else None
        for problem in wrong:
            found.setdefault(problem, _Seen()).add(line)
        if row is not None and not wrong:
            group = str(raw[grouped]) if grouped else None
            yield Entry(row, source.place(line), identity(row), group, origin, line)
    ledger.read[split] = ledger.read.get(split, 0) + read
    refused = []
    for (kind, what), seen in found.items():
        action = getattr(config.clean, kind)
        if action == "error":
            refused.append(listed(where, what, [source.place(line) for line in seen.lines], seen.count))
        else:
            ledger.note(kind, split, what, action, map(source.place, seen.lines), seen.count)
    if refused:
        raise InputError(*refused)


@dataclass
class _Seen:
    """How many lines have a problem, and the first of them."""

    count: int = 0
    lines: list[int] = field(default_factory=list)

    def add(self, line: int) -> None:
        self.count += 1
        if len(self.lines) < SHOWN:
            self.lines.append(line)


def lenient(clean: Clean) -> Clean:
    """Returns the policy under which everything is counted and nothing refused."""
    return Clean(**{name: "drop" if action == "error" else action for name, action in clean.model_dump().items()})


def identity(row: Row) -> str:
    """Returns what makes two rows the same: all but the answer, or the text itself where nothing is asked."""
    if "messages" in row:
        asked = json.loads(tasks.load("chat").divide(row)[0]["messages"])
        return json.dumps([(message["role"], message["content"].strip()) for message in asked])
    shown = {name: value.strip() for name, value in row.items() if name != "label"}
    if row.get("instruction"):
        del shown["response"]
    return _SORTED({name: value for name, value in shown.items() if value})


def text_of(row: Row) -> str:
    """Returns all that a row says, but for its label."""
    if "messages" in row:
        return "\n".join(message["content"] for message in json.loads(row["messages"]))
    return "\n".join(value for name, value in row.items() if name != "label" and value)


def divided(rows: list[Row], config: DataConfig) -> list[Row]:
    """Returns the rows that are learned: of a conversation one for each answer, of other tasks the rows themselves."""
    return [part for row in rows for part in tasks.load("chat").divide(row)] if config.task == "chat" else rows


def _row(raw: dict, columns: dict[str, str], config: DataConfig, task) -> tuple[Row | None, list[tuple[str, str]]]:
    row: Row = {}
    wrong = []
    for ours, theirs in columns.items():
        value = raw.get(theirs)
        if ours == task.RESPONSE and isinstance(value, (int, float)) and not isinstance(value, bool):
            value = str(value)
        if value is None and ours in task.OPTIONAL:
            value = ""
        if ours == "messages" and value is not None:
            system = raw.get(columns.get("system", ""))
            value = task.conversation(value, system if isinstance(system, str) else "")
            if isinstance(value, str):
                wrong.append(
                    ("empty" if "empty" in value or "no answer" in value else "wrong_type", f"the field {theirs!r} {value}")
                )
                continue
            value = json.dumps(value, ensure_ascii=False)
        if not isinstance(value, str):
            what = "is missing" if value is None else f"must be text, got {type(value).__name__}"
            wrong.append(("missing" if value is None else "wrong_type", f"the field {theirs!r} {what}."))
        elif not value.strip() and ours not in task.OPTIONAL:
            wrong.append(("empty", f"the field {theirs!r} is empty."))
        elif _SURROGATE.search(value):
            wrong.append(("wrong_type", f"the field {theirs!r} has half a character (a lone surrogate)."))
        else:
            row[ours] = value.strip() if config.task == "classification" else value
    if wrong:
        return None, wrong
    if config.task == "completion":
        row = task.divide(row, config.separator)
        if row is None:
            return None, [("empty", f"no text after data.separator {config.separator!r}.")]
    row.pop("system", None) if config.task == "chat" else None
    return row, []


def listed(where: str, what: str, places: Sequence[str], count: int) -> Problem:
    """Returns the problem that so many rows have, the first of which stand at these places."""
    more = f" and {count - len(places)} more lines" if count > len(places) else ""
    remedy = "Correct or remove the rows, or name other columns in data.columns."
    return Problem(where, f"{', '.join(places)}{more}: {what}", remedy)


def _columns(records: list[dict], config: DataConfig, where: str) -> dict[str, str]:
    """Returns our name -> the file's, from the user first and the usual names second.

    A column must stand in the first record; an optional one may come later, among the records given.
    """
    task = tasks.load(config.task)
    found, chosen = [], {}
    if not records:
        return chosen
    first, everywhere = records[0], {name: None for record in records for name in record}
    for ours in config.columns:
        if ours not in task.COLUMNS:
            found.append(
                Problem(f"data.columns.{ours}", f"unknown column of task {config.task}.", f"Known: {', '.join(task.COLUMNS)}.")
            )
    for ours, names in task.COLUMNS.items():
        raw = everywhere if ours in task.OPTIONAL else first
        if ours == "messages":  # plain text under one of these names is none
            names = [name for name in names if name not in first or task.is_conversation(first[name])]
        theirs = config.columns.get(ours) or next((name for name in names if name in raw and name not in chosen.values()), None)
        if theirs is None and ours in task.OPTIONAL:
            continue
        if theirs is None or theirs not in raw:
            wanted = repr(theirs) if theirs else f"any of {', '.join(names)}"
            found.append(Problem(where, f"the first row has no column {wanted} for {ours!r}; it has {', '.join(map(str, raw))}.",
                                 f"Set data.columns.{ours}."))  # fmt: skip
        else:
            chosen[ours] = theirs
    if found:
        raise InputError(*found)
    return chosen
