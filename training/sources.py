"""From a file, a folder or a hub's id to records.

Owns: JSONL, JSON, CSV, Parquet, Arrow files and Hugging Face datasets, and what is wrong with them by file and line.
Must not know: what a record means.

No code that comes with data runs: the `datasets` library reads no scripts since version 4, and nothing is unpickled.
"""

from __future__ import annotations

import csv
import datetime
import decimal
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.errors import InputError, wrong

EMBEDDED = "embedded:"
HUB = "hub:"
KINDS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".pq": "parquet",
    ".arrow": "arrow", ".feather": "arrow",
}  # fmt: skip
OTHER_NAMES = {"validation": ("validation", "valid", "val", "dev"), "test": ("test",), "train": ("train",)}
BATCH = 8192  # records of a table that are Python objects at one time
Record = tuple[int, dict | str]  # line and record, or line and what is wrong there


@dataclass(frozen=True)
class Source:
    """Records of one file or folder, read once and while they are asked for.

    `digest` is of its content, `size` is in bytes, `unit` stands between its name and a record's number.
    """

    name: str
    records: Iterable[Record]
    digest: bytes
    size: int
    unit: str = ":"

    def place(self, line: int) -> str:
        """Returns where a record stands, for people: FILE:LINE, or FILE row N where there are no lines."""
        return f"{self.name}{self.unit}{line}"


def locate(name: str) -> Path:
    """Returns the path of a data file; `embedded:FILE` is one that ships with the package."""
    if name.startswith(EMBEDDED):
        return Path(__file__).parent / "embedded" / Path(name.removeprefix(EMBEDDED)).name
    return Path(os.path.expandvars(name)).expanduser()


def load(name: str, split: str, kind: str | None, where: str) -> Source:
    """Returns the records of one split.

    Args:
        name: a file, a folder, `embedded:FILE` or `hub:OWNER/NAME[/CONFIGURATION][@REVISION]`.
        split: train, validation or test; chooses among the splits of a folder or a hub's data set.
        kind: the format where the file's name does not tell it.
        where: the field that named it, for errors.

    Raises:
        InputError: it cannot be read; what is wrong with single records is in the records.
    """
    path = locate(name)
    if name.startswith(HUB) or path.is_dir():
        if kind is not None:
            raise wrong("data.format", f"is for files, and {name} is none.", "Leave it out.")
        found = _data_set(name, path, split, where)
        digest, size = hashlib.sha256(), 0
        for line in _lines(found):
            digest.update(line.encode())
            size += len(line)
        return Source(name, _jsonl(_lines(found)), digest.digest(), size, " row ")
    if not path.exists():
        raise wrong(where, f"no such file: {name}.", "Paths are relative to the study file.")
    kind = kind or KINDS.get(path.suffix.lower())
    if kind is None:
        raise wrong(where, f"cannot tell the format of {path.name}.", "Set data.format to jsonl or csv.")
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
            file.seek(0)
            start = next((line for line in file if line.strip()), b"")
    except OSError as error:
        raise wrong(where, f"{name} cannot be read ({error.strerror}).", "Check its permissions.") from None
    if not start:
        raise wrong(where, f"{name} is empty.", "Give at least a few rows.")
    return Source(name, _records(path, kind, start.removeprefix(b"\xef\xbb\xbf").lstrip(), name, where), digest,
                  path.stat().st_size, " row " if kind in ("parquet", "arrow") else ":")  # fmt: skip


def _records(path: Path, kind: str, start: bytes, name: str, where: str) -> Iterator[Record]:
    if kind in ("parquet", "arrow"):
        yield from enumerate(_table(path, kind, name, where), 1)
    elif kind == "csv":
        yield from _csv(_text(path, name, where, newline=""))
    elif kind == "jsonl" and start.startswith(b"["):
        raise wrong(where, f"{name} is one JSON array.", "Write one object per line (JSONL), or name the file .json.")
    elif kind == "jsonl":
        yield from _jsonl(_text(path, name, where))
    else:
        text = "".join(_text(path, name, where))  # JSON has no lines to go by: it is read whole
        # JSONL is often named so
        yield from _json(text, name, where) if start.startswith(b"[") or _one_object(text) else _jsonl(text.split("\n"))


def keep(name: str, split: str, where: str, folder: Path, *, called: str | None = None) -> Path:
    """Copies what one split is read from into a folder and returns the file; reading it gives the same rows and digest.

    Args:
        name, split, where: as in `load`.
        folder: where the copy goes.
        called: the copy's name; default the split's.
    """
    source = locate(name)
    whole = name.startswith(HUB) or source.is_dir()
    target = folder / f"{called or split}{'.jsonl' if whole else source.suffix}"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.{os.getpid()}")
        if whole:
            with aside.open("w", encoding="utf-8") as file:
                file.writelines(_lines(_data_set(name, source, split, where)))
        else:
            shutil.copyfile(source, aside)
        aside.rename(target)
    return target


def _text(path: Path, name: str, where: str, *, newline: str = "\n") -> Iterator[str]:
    """Yields the lines of a text file, line ends as they stand there; newline="" ends a line at a carriage return too."""
    said = f"{name}:{{}}: a NUL byte; this is not a text file."
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            for line, text in enumerate(file, 1):
                if "\0" in text:
                    raise wrong(where, said.format(line), "Give JSONL or CSV in UTF-8.")
                yield text
    except UnicodeDecodeError:
        pass
    else:
        return
    at = 0
    with path.open("rb") as file:  # what was decoded ahead does not tell the place
        for line, raw in enumerate(file, 1):
            if b"\0" in raw:
                raise wrong(where, said.format(line), "Give JSONL or CSV in UTF-8.")
            try:
                raw.decode()
            except UnicodeDecodeError as error:
                where_it_is = f"{name}:{line}: byte {at + error.start} is not UTF-8."
                raise wrong(where, where_it_is, "Convert the file to UTF-8.") from None
            at += len(raw)


def _csv(lines: Iterable[str]) -> Iterator[Record]:
    reader = csv.DictReader(lines, strict=True)
    try:
        for raw in reader:
            if None in raw:
                yield reader.line_num, "has more fields than the header."
            else:
                yield reader.line_num, raw
    except csv.Error as error:
        yield reader.reader.line_num, f"is not CSV ({error})."


def _jsonl(lines: Iterable[str]) -> Iterator[Record]:
    for line, raw in enumerate(lines, 1):
        if not raw.strip():
            continue
        try:
            record = json.loads(raw)
        except (ValueError, RecursionError):
            yield line, "is not JSON."
            continue
        yield line, record if isinstance(record, dict) else "is not a JSON object."


_SPACE = re.compile(r"\s*")
_DECODER = json.JSONDecoder()


def _one_object(text: str) -> bool:
    # JSONL has a second value after the first one, or the first one is a row by itself.
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(whole, dict) and any(isinstance(value, list) and value and isinstance(value[0], dict)
                                           for value in whole.values()) and not _is_a_conversation(whole)  # fmt: skip


def _is_a_conversation(record: dict) -> bool:
    # {"messages": [...]} on one line is JSONL with one row.
    return any({"role", "from"} & set(value[0]) for value in record.values()
               if isinstance(value, list) and value and isinstance(value[0], dict))  # fmt: skip


def _json(text: str, name: str, where: str) -> list[Record]:
    """Returns the elements of a JSON array, or of the one list of objects in an object, each with its line."""
    at = _SPACE.match(text).end()
    try:
        if text[at : at + 1] != "[":
            at = _start_of_list(text, name, where)
        found: list[Record] = []
        line, counted = 1, 0
        at = _SPACE.match(text, at + 1).end()
        while text[at : at + 1] != "]":
            line, counted = line + text.count("\n", counted, at), at
            record, at = _DECODER.raw_decode(text, at)
            found.append((line, record if isinstance(record, dict) else "is not a JSON object."))
            at = _SPACE.match(text, at).end()
            if text[at : at + 1] == ",":
                at = _SPACE.match(text, at + 1).end()
            elif text[at : at + 1] != "]":
                raise json.JSONDecodeError("no comma", text, at)
    except json.JSONDecodeError as error:
        raise wrong(where, f"{name}:{error.lineno}: is not JSON ({error.msg.lower()}).", "Correct it.") from None
    except RecursionError:
        raise wrong(where, f"{name} is not JSON that can be read (nested too deeply).", "Correct it.") from None
    return found


def _start_of_list(text: str, name: str, where: str) -> int:
    whole = json.loads(text)
    lists = [key for key, value in whole.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if len(lists) != 1:
        raise wrong(where, f"{name} has {len(lists)} lists of rows ({', '.join(lists)}).", "Keep one, or write JSONL.")
    at = _SPACE.match(text).end() + 1
    while True:
        key, at = _DECODER.raw_decode(text, _SPACE.match(text, at).end())
        at = _SPACE.match(text, _SPACE.match(text, at).end() + 1).end()  # over the colon
        if key == lists[0]:
            return at
        _, at = _DECODER.raw_decode(text, at)
        at = _SPACE.match(text, at).end() + 1  # over the comma


def _table(path: Path, kind: str, name: str, where: str) -> Iterator[dict]:
    import pyarrow as pa
    import pyarrow.ipc
    import pyarrow.parquet

    try:
        with pa.OSFile(str(path)) as file:
            if kind == "parquet":
                batches = pyarrow.parquet.ParquetFile(file).iter_batches(BATCH)
            else:
                batches = _arrow_batches(file)
            for batch in batches:
                for start in range(0, batch.num_rows, BATCH):
                    yield from batch.slice(start, BATCH).to_pylist()
    except (pa.ArrowException, OSError) as error:
        first = (str(error).splitlines() or [""])[0][:200]
        raise wrong(where, f"{name} is not {kind.capitalize()} ({first}).", "Write it again.") from None


def _arrow_batches(file: Any) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.ipc

    try:
        reader = pyarrow.ipc.open_file(file)
    except pa.ArrowInvalid:  # the stream format, in which Hugging Face keeps its data sets
        file.seek(0)
        yield from pyarrow.ipc.open_stream(file)
    else:
        yield from map(reader.get_batch, range(reader.num_record_batches))


def _data_set(name: str, path: Path, split: str, where: str) -> Any:
    """Returns the rows of one split of a Hugging Face data set: saved in a folder, files in a folder, or on the hub."""
    import datasets

    try:
        if name.startswith(HUB):
            parts = re.fullmatch(r"([^/@]+(?:/[^/@]+)?)(?:/([^/@]+))?(?:@(.+))?", name.removeprefix(HUB))
            if parts is None:
                raise wrong(where, f"{name} is no data set's id.", "Write hub:OWNER/NAME, with /CONFIGURATION or @REVISION.")
            found = datasets.load_dataset(parts[1], parts[2], revision=parts[3])
        elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            found = datasets.load_from_disk(str(path))
        else:
            found = _folder(name, path, where)
    except InputError:
        raise
    except Exception as error:  # the library raises many kinds, its dependencies more
        first = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise wrong(where, f"{name} cannot be read as a data set: {first}", "Try datasets.load_dataset on it.") from None
    if not isinstance(found, dict):  # DatasetDict is one
        return found
    for other in OTHER_NAMES[split]:
        if other in found:
            return found[other]
    if len(found) == 1:
        return next(iter(found.values()))
    raise wrong(where, f"{name} has no split for {split}; it has {', '.join(map(str, found))}.", "Name a file of its own.")


class _Files:
    """Rows of several files, one file after the other, as often as they are asked for."""

    def __init__(self, files: list[Path], where: str):
        self.files, self.where = files, where

    def __iter__(self) -> Iterator[dict]:
        for file in self.files:
            source, broken, first = load(str(file), "train", None, self.where), 0, ""
            for line, record in source.records:
                if isinstance(record, dict):
                    yield record
                    continue
                broken += 1
                first = first or f"{source.place(line)}: {record}"
            if broken:
                raise wrong(self.where, first, f"{broken} such lines. Correct or remove them.")


def _folder(name: str, path: Path, where: str) -> dict[str, _Files]:
    """Returns the rows of a folder's files by split, named as Hugging Face names them: train-00000-of-00002.parquet."""
    # Only here and one folder below: a folder named by mistake may hold a whole disk.
    files = [f for f in sorted([*path.glob("*"), *path.glob("data/*")]) if f.suffix.lower() in KINDS and f.is_file()]
    files = [f for f in files if f.suffix.lower() != ".json" or _SPLIT.search(f.stem.lower())]  # others describe the data
    if not files:
        raise wrong(where, f"{name} is a folder without a data set.", "Name a JSONL or CSV file.")
    found: dict[str, list[Path]] = {}
    for file in files:
        said = _SPLIT.search(file.stem.lower())
        found.setdefault(said[1] if said else "train", []).append(file)
    return {split: _Files(some, where) for split, some in found.items()}


_SPLIT = re.compile(r"(?:^|[^a-z])(train|validation|valid|val|dev|test)(?=[^a-z]|$)")


def _lines(rows: Iterable[dict]) -> Iterator[str]:
    return (json.dumps(row, ensure_ascii=True, default=_plain) + "\n" for row in rows)


def _plain(value: Any) -> Any:
    # What JSON has no word for: dates and exact numbers as text; bytes, images and sounds stay what no row may have.
    return str(value) if isinstance(value, (datetime.date, datetime.time, decimal.Decimal)) else {}
