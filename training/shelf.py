"""Rows of files that are too large to be held in memory.

Owns: the shelf (a folder with all sound rows as an Arrow file and, of each row, a few numbers), the way from these numbers to
three splits, and rows that are read when they are asked for. Must not know: file formats, tokens.

A shelf is made once for the content of the files, and read by all processes of a machine. It takes the way of `training.splits`
with hashes of 64 bits in place of texts: a row counts as the same as another where these are equal (2e-7 of all sets with four
million rows have such a chance). Held out is what comes first in a seeded order of hashes, so equal rows stay on one side.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training import duplicates, splits, tasks
from training import rows as row_words
from training.errors import InputError, Problem, wrong
from training.recipe import DataConfig
from training.rows import SHOWN, Entry, Finding, Ledger, Row
from training.tokens import home, made

BATCH = 8192  # rows that are Python objects at one time
VERSION = 1
NUMBERS = {"key": "Q", "whole": "Q", "answer": "Q", "group": "Q", "label": "i", "answers": "i", "characters": "i", "line": "q"}


@dataclass(frozen=True)
class Sides:
    """The three splits of large data: `chosen` has the numbers of their rows on the shelf, `sources` where these come from."""

    rows: dict[str, View]
    chosen: dict[str, np.ndarray]
    shelf: Shelf
    sources: dict[str, tuple[tuple[str, int], ...]]
    labels: tuple[str, ...]
    notes: tuple[str, ...]
    digest: str
    ledger: Ledger


class Shelf:
    """All sound rows of all files, in the order of reading."""

    def __init__(self, folder: Path):
        self.folder = folder
        said = json.loads((folder / "made.json").read_text())
        self.task: str = said["task"]
        self.rows: int = said["rows"]
        self.labels: list[str] = said["labels"]
        # split, name of the source, name of the file, what stands before a line's number, first row, row after the last
        self.segments: list[tuple[str, str, str, str, int, int]] = [tuple(segment) for segment in said["segments"]]
        self.findings = [Finding.model_validate(finding) for finding in said["findings"]]
        self.read: dict[str, int] = said["read"]

    def numbers(self, name: str) -> np.ndarray:
        """Returns one number of every row, read anew: whoever asks decides how long it stays in memory."""
        return np.fromfile(self.folder / name, dtype=np.dtype(NUMBERS[name]))

    def of(self, split: str) -> dict[str, np.ndarray]:
        """Returns the numbers of the rows of one split by source."""
        return {origin: np.arange(start, stop) for part, origin, *_, start, stop in self.segments if part == split}

    def place(self, row: int) -> str:
        """Returns where a row stood, for people."""
        name, unit = next((name, unit) for _, _, name, unit, start, stop in self.segments if start <= row < stop)
        return f"{name}{unit}{int(np.fromfile(self.folder / 'line', dtype=np.int64, count=1, offset=8 * int(row))[0])}"

    def batches(self) -> Iterator[list[Row]]:
        """Yields all rows, some thousands at a time, without a memory map: what was read is given back."""
        import pyarrow as pa
        import pyarrow.ipc

        with pa.OSFile(str(self.folder / "rows.arrow")) as file:
            reader = pyarrow.ipc.open_file(file)
            for i in range(reader.num_record_batches):
                yield _rows(reader.get_batch(i))

    @functools.cached_property
    def _map(self) -> Any:
        import pyarrow as pa
        import pyarrow.ipc

        return pyarrow.ipc.open_file(pa.memory_map(str(self.folder / "rows.arrow")))

    def row(self, number: int) -> Row:
        """Returns one row."""
        batch, at = divmod(int(number), BATCH)
        return _rows(self._map.get_batch(batch).slice(at, 1))[0]

    @functools.cached_property
    def bands(self) -> np.ndarray:
        """What rows are compared by: a row of hashes for each, in a memory map; made when first asked for."""
        path = self.folder / "bands"
        if not path.exists():
            aside = path.with_name(f".bands.{id(self)}")
            with aside.open("wb") as file:
                for batch in self.batches():
                    duplicates.bands([row_words.text_of(row) for row in batch]).tofile(file)
            aside.rename(path)
        return np.memmap(path, np.uint64, "r", shape=(self.rows, duplicates.BANDS))

    def text(self, number: int) -> str:
        """Returns all that a row says, but for its label."""
        return row_words.text_of(self.row(number))


def _rows(batch: Any) -> list[Row]:
    columns = batch.to_pydict()
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


class View(Sequence):
    """Some rows of a shelf, read when they are asked for; of a conversation one for each answer."""

    def __init__(self, shelf: Shelf, chosen: np.ndarray):
        self.shelf, self.chosen = shelf, chosen
        self._ends = np.cumsum(shelf.numbers("answers")[chosen]) if shelf.task == "chat" else None

    def __len__(self) -> int:
        return len(self.chosen) if self._ends is None else int(self._ends[-1]) if len(self._ends) else 0

    def __iter__(self) -> Iterator[Row]:
        divide = tasks.load("chat").divide if self.shelf.task == "chat" else None
        at = 0
        for number, batch in enumerate(self.shelf.batches()):
            stop = int(np.searchsorted(self.chosen, (number + 1) * BATCH))
            for row in self.chosen[at:stop].tolist():
                found = batch[row - number * BATCH]
                yield from divide(found) if divide else (found,)
            at = stop

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        if self._ends is None:
            return self.shelf.row(self.chosen[i])
        entry = int(np.searchsorted(self._ends, i, side="right"))
        before = int(self._ends[entry - 1]) if entry else 0
        return tasks.load("chat").divide(self.shelf.row(self.chosen[entry]))[i - before]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _build(folder: Path, given: Any, config: DataConfig) -> None:
    """Reads all sources once and writes the shelf."""
    import pyarrow as pa
    import pyarrow.ipc

    ledger, segments, labels, rows = Ledger(), [], {}, 0
    task = tasks.load(config.task)
    # Sources may lack an optional column: it is empty there.
    names = {"completion": ["prompt", "response"], "chat": ["messages"]}.get(config.task) or list(task.COLUMNS)
    schema = pa.schema([(name, pa.large_string()) for name in names])
    files = {name: (folder / name).open("wb") for name in NUMBERS}
    problems: list[Problem] = []
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as sink, pyarrow.ipc.new_file(sink, schema) as writer:
        waiting: list[Entry] = []

        def put(some: list[Entry]) -> None:
            columns = [[entry.row.get(name, "") for entry in some] for name in schema.names]
            writer.write_batch(pa.record_batch(columns, schema))
            for name, numbers in _numbers(some, labels).items():
                numbers.tofile(files[name])

        for split, loaded in given.items():
            for origin, (source, own) in loaded.items():
                start = rows
                own = own.model_copy(update={"clean": row_words.lenient(own.clean)})
                try:
                    for entry in row_words.entries(source, own, split, ledger, origin):
                        waiting.append(entry)
                        rows += 1
                        if len(waiting) == BATCH:
                            put(waiting)
                            waiting = []
                except InputError as error:
                    problems += error.problems
                segments.append((split, origin, source.name, source.unit, start, rows))
        if waiting:
            put(waiting)
    for file in files.values():
        file.close()
    if problems:
        raise InputError(*problems)
    said = {"task": config.task, "rows": rows, "labels": list(labels), "segments": segments, "read": ledger.read,
            "findings": [finding.model_dump() for finding in ledger.findings]}  # fmt: skip
    (folder / "made.json").write_text(json.dumps(said))


def _numbers(some: list[Entry], labels: dict[str, int]) -> dict[str, array]:
    answers = tasks.load("chat").divide
    found = {
        "key": [_hash(entry.key) for entry in some],
        "whole": [_hash("\0".join(value.strip() for value in entry.row.values())) for entry in some],
        "answer": [_hash((entry.row.get("label") or entry.row.get("response") or "").strip()) for entry in some],
        "group": [_hash(entry.group) if entry.group is not None else 0 for entry in some],
        "label": [labels.setdefault(entry.row.get("label", ""), len(labels)) for entry in some],
        "answers": [len(answers(entry.row)) if "messages" in entry.row else 1 for entry in some],
        "characters": [len(row_words.text_of(entry.row)) if "messages" in entry.row else sum(map(len, entry.row.values()))
                       for entry in some],
        "line": [entry.line for entry in some],
    }  # fmt: skip
    return {name: array(NUMBERS[name], values) for name, values in found.items()}


def sides(given: Any, config: DataConfig, seed: int, digest: str) -> Sides:
    """Returns the three splits of what was loaded, as `training.data.sides` does.

    Raises:
        InputError: with the problems that `config.clean` does not let pass, or no row is left.
    """
    content = [VERSION, config.task, config.separator, config.split.column, config.clean.broken_text == "keep"]
    content += [[split, origin, own.columns, source.name, source.digest.hex()]
                for split, loaded in given.items() for origin, (source, own) in loaded.items()]  # fmt: skip
    folder = home() / "rows" / hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
    with made(folder) as new:
        if new is not None:
            _build(new, given, config)
    shelf, ledger = Shelf(folder), Ledger()
    _judge(shelf, config, ledger)
    parts = {split: list(shelf.of(split).values()) for split in given}
    parts["train"] = _repeated(shelf, parts["train"], config, ledger)
    origins = list(config.origins())
    notes = _hold_out(shelf, parts, origins, config, seed)
    chosen = {name: np.concatenate(some) if some else np.empty(0, np.int64) for name, some in parts.items()}
    notes += _separate(shelf, chosen, config, ledger)
    numbers = shelf.numbers("label") if config.task == "classification" else None
    present = {name: {shelf.labels[i] for i in np.unique(numbers[some])} for name, some in chosen.items()
               } if numbers is not None else {}  # fmt: skip
    labels = splits.labels_of(config, present)
    chosen["train"] = _limited(shelf, chosen["train"], config, seed)
    by = {name: _by_source(shelf, some) for name, some in chosen.items()}
    splits.check({name: [origin for origin, count in some if count] for name, some in by.items()}, config)
    notes += splits.mixed(config, by["train"])
    notes.append(f"{sum(map(len, chosen.values())):,} rows stay on disk, in {folder}")
    views = {name: View(shelf, chosen[name]) for name in ("train", "validation", "test")}
    sources = {name: tuple((origin, count) for origin, count in by[name] if count) for name in views}
    return Sides(views, chosen, shelf, sources, labels, (*notes, *splits.left_out(ledger)), digest, ledger)


def _judge(shelf: Shelf, config: DataConfig, ledger: Ledger) -> None:
    """Enters what was found while reading, or refuses it."""
    ledger.read |= shelf.read
    refused = []
    for found in shelf.findings:
        action = getattr(config.clean, found.kind)
        if action == "error":
            refused.append(row_words.listed(f"data.{found.split}", found.what, found.places, found.count))
        else:
            ledger.note(found.kind, found.split, found.what, action, found.places, found.count)
    if refused:
        raise InputError(*refused)


def first(numbers: np.ndarray) -> np.ndarray:
    """Returns where each number stands for the first time, as a mask."""
    mask = np.zeros(len(numbers), bool)
    mask[np.unique(numbers, return_index=True)[1]] = True
    return mask


def _repeated(shelf: Shelf, parts: list[np.ndarray], config: DataConfig, ledger: Ledger) -> list[np.ndarray]:
    for kind, what in (("repeated", "stand in the training rows before"), ("near_repeated", "are much like one before")):
        if getattr(config.clean, kind) == "keep":
            continue
        whole = np.concatenate(parts)
        if kind == "repeated":
            stays = first(shelf.numbers("whole")[whole])
        else:
            stays = duplicates.clusters_on_disk(shelf.bands, shelf.text, whole)[whole] == whole
        _lose(shelf, whole[~stays], "train", kind, what, config, ledger)
        ends = np.cumsum([len(part) for part in parts])[:-1]
        parts = [part[mask] for part, mask in zip(parts, np.split(stays, ends), strict=True)]
    return parts


def _lose(shelf: Shelf, lost: np.ndarray, split: str, kind: str, what: str, config: DataConfig, ledger: Ledger) -> None:
    action = getattr(config.clean, kind)
    places = [shelf.place(row) for row in lost[:SHOWN]]
    ledger.note(kind, split, what, action, places, len(lost))
    if len(lost) and action == "error":
        remedy = f"Remove them, or set data.clean.{kind}: drop."
        raise wrong(f"data.{split}", f"{len(lost)} rows {what} ({', '.join(places)}).", remedy)


def _hold_out(shelf: Shelf, parts: dict[str, list[np.ndarray]], origins: list[str], config: DataConfig, seed: int) -> list[str]:
    """Fills in the missing splits from the training rows, in place; returns notes."""
    missing = [name for name in ("test", "validation") if name not in parts]
    if not missing:
        return []
    keys = shelf.numbers("key")
    bags = _bags(shelf, np.concatenate(parts["train"]), keys, config)
    strata = shelf.numbers("group" if config.split.column else "label") if config.split.by == "stratified" else None
    held: dict[str, list[np.ndarray]] = {name: [] for name in missing}
    for i, origin in enumerate(origins):
        rows = parts["train"][i]
        opening, left = first(keys[rows]), np.ones(len(rows), bool)
        _, start, back = np.unique(bags[rows], return_index=True, return_inverse=True)
        stratum = np.zeros(len(rows), np.uint64) if strata is None else strata[rows][start][back]
        rank = _order(bags[rows], f"{seed} {origin}")
        for name in missing:
            out = np.zeros(len(rows), bool)
            for one in np.unique(stratum):
                own = left & (stratum == one)
                ranks = np.sort(rank[own & opening])
                wanted = round(getattr(config.split, name) * len(ranks))
                if strata is None:
                    wanted = max(1, wanted)
                if len(ranks) and wanted:
                    out |= own & (rank <= ranks[wanted - 1])
            held[name].append(rows[out & opening])
            left &= ~out
        parts["train"][i] = rows[left]
    parts |= held
    each = " of each source" if len(origins) > 1 else ""
    how = f"rows cut from the training rows{each} {splits.how(config)}"
    return [f"{name}: {sum(map(len, parts[name]))} {how}" for name in missing]


def _bags(shelf: Shelf, rows: np.ndarray, keys: np.ndarray, config: DataConfig) -> np.ndarray:
    """Returns a number for each row of the shelf; rows with the same number stay on one side."""
    # A row that stands in two groups leaves training as a leak, where the groups come to lie on two sides.
    bags = shelf.numbers("group") if config.split.by == "group" else keys
    if config.split.together == "near":
        bags = bags.copy()
        first = duplicates.clusters_on_disk(shelf.bands, shelf.text, rows)
        bags[rows] = bags[first[rows]]
    return bags


def _order(numbers: np.ndarray, seed: str) -> np.ndarray:
    """Returns numbers of 64 bits by which rows are in a seeded order (splitmix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        mixed = numbers + np.uint64(_hash(seed))
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _separate(shelf: Shelf, chosen: dict[str, np.ndarray], config: DataConfig, ledger: Ledger) -> list[str]:
    """Takes rows that stand on two sides out of the one that is learned or looked at more, in place; returns notes."""
    notes, keys = [], shelf.numbers("key")
    for kept, lost in (("test", "validation"), ("test", "train"), ("validation", "train")):
        shared = np.isin(keys[chosen[lost]], keys[chosen[kept]])
        _lose(shelf, chosen[lost][shared], lost, "leak", f"also stand in {kept}", config, ledger)
        chosen[lost] = chosen[lost][~shared]
        if shared.any():
            notes.append(f"{lost}: {shared.sum()} rows left out because they also stand in {kept}")
    if config.clean.near_leak != "keep":
        held = np.concatenate([chosen["test"], chosen["validation"]])
        shared = duplicates.like_on_disk(shelf.bands, shelf.text, chosen["train"], held)
        _lose(shelf, chosen["train"][shared], "train", "near_leak", "are much like a held-out row", config, ledger)
        chosen["train"] = chosen["train"][~shared]
        if shared.any():
            notes.append(f"train: {shared.sum()} rows left out because they are much like a held-out row")
    return notes


def _limited(shelf: Shelf, rows: np.ndarray, config: DataConfig, seed: int) -> np.ndarray:
    def some(of: np.ndarray, limit: int | None) -> np.ndarray:
        if not limit or limit >= len(of):
            return of
        return np.sort(of[np.argsort(_order(of.astype(np.uint64), f"{seed} limit"), kind="stable")[:limit]])

    own = [some(np.intersect1d(rows, of, assume_unique=True) if origin else rows, config.origins()[origin].limit)
           for origin, of in shelf.of("train").items()]  # fmt: skip
    return some(np.concatenate(own), config.limit)


def _by_source(shelf: Shelf, rows: np.ndarray) -> list[tuple[str, int]]:
    """Returns the sources of sorted rows and how many answers come from each."""
    answers = shelf.numbers("answers")
    found = []
    for origin, of in itertools.groupby(shelf.segments, lambda segment: segment[1]):
        ends = [np.searchsorted(rows, segment[-2:]) for segment in of]
        found.append((origin, sum(int(answers[rows[start:stop]].sum()) for start, stop in ends)))
    return found
