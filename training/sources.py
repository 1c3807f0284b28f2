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
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
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
Record = tuple[int, dict | str]  # line and record, or line and what is wrong there


@dataclass(frozen=True)
class Source:
    """Records of one file or folder; `digest` is of its content, `unit` stands between its name and a record's number."""

    name: str
    records: list[Record]
    digest: bytes
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
        content = _lines(_data_set(name, path, split, where))
        return Source(name, list(_jsonl(content)), hashlib.sha256(content.encode()).digest(), " row ")
    if not path.exists():
        raise wrong(where, f"no such file: {name}.", "Paths are relative to the study file.")
    kind = kind or KINDS.get(path.suffix.lower())
    if kind is None:
        raise wrong(where, f"cannot tell the format of {path.name}.", "Set data.format to jsonl or csv.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise wrong(where, f"{name} cannot be read ({error.strerror}).", "Check its permissions.") from None
    if not content.strip():
        raise wrong(where, f"{name} is empty.", "Give at least a few rows.")
    digest = hashlib.sha256(content).digest()
    if kind in ("parquet", "arrow"):
        return Source(name, list(enumerate(_table(content, kind, name, where), 1)), digest, " row ")
    text = _text(content, name, where)
    if kind == "json" and not text.lstrip().startswith("[") and not _one_object(text):
        kind = "jsonl"  # a usual name for it
    if kind == "jsonl" and text.lstrip().startswith("["):
        raise wrong(where, f"{name} is one JSON array.", "Write one object per line (JSONL), or name the file .json.")
    readers = {"jsonl": _jsonl, "csv": _csv}
    return Source(name, list(readers[kind](text)) if kind in readers else _json(text, name, where), digest)


def keep(name: str, split: str, where: str, folder: Path) -> Path:
    """Copies what one split is read from into a folder and returns the file; reading it gives the same rows and digest."""
    source = locate(name)
    whole = name.startswith(HUB) or source.is_dir()
    target = folder / f"{split}{'.jsonl' if whole else source.suffix}"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.{os.getpid()}")
        if whole:
            aside.write_text(_lines(_data_set(name, source, split, where)), encoding="utf-8")
        else:
            shutil.copyfile(source, aside)
        aside.rename(target)
    return target


def _text(content: bytes, name: str, where: str) -> str:
    if b"\0" in content:
        line = content[: content.index(b"\0")].count(b"\n") + 1
        raise wrong(where, f"{name}:{line}: a NUL byte; this is not a text file.", "Give JSONL or CSV in UTF-8.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise wrong(where, f"{name}:{line}: byte {error.start} is not UTF-8.", "Convert the file to UTF-8.") from None


def _csv(text: str) -> Iterator[Record]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for raw in reader:
            if None in raw:
                yield reader.line_num, "has more fields than the header."
            else:
                yield reader.line_num, raw
    except csv.Error as error:
        yield reader.reader.line_num, f"is not CSV ({error})."


def _jsonl(text: str) -> Iterator[Record]:
    for line, raw in enumerate(text.split("\n"), 1):
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


def _table(content: bytes, kind: str, name: str, where: str) -> list[dict]:
    import pyarrow as pa
    import pyarrow.ipc
    import pyarrow.parquet

    try:
        if kind == "parquet":
            return pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
        try:
            return pyarrow.ipc.open_file(content).read_all().to_pylist()
        except pa.ArrowInvalid:  # the stream format, in which Hugging Face keeps its data sets
            return pyarrow.ipc.open_stream(content).read_all().to_pylist()
    except (pa.ArrowException, OSError) as error:
        first = (str(error).splitlines() or [""])[0][:200]
        raise wrong(where, f"{name} is not {kind.capitalize()} ({first}).", "Write it again.") from None


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
            found = datasets.load_from_disk(str(path), keep_in_memory=True)
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


def _folder(name: str, path: Path, where: str) -> dict[str, list[dict]]:
    """Returns the rows of a folder's files by split, named as Hugging Face names them: train-00000-of-00002.parquet."""
    # Only here and one folder below: a folder named by mistake may hold a whole disk.
    files = [f for f in sorted([*path.glob("*"), *path.glob("data/*")]) if f.suffix.lower() in KINDS and f.is_file()]
    files = [f for f in files if f.suffix.lower() != ".json" or _SPLIT.search(f.stem.lower())]  # others describe the data
    if not files:
        raise wrong(where, f"{name} is a folder without a data set.", "Name a JSONL or CSV file.")
    found: dict[str, list[dict]] = {}
    for file in files:
        said = _SPLIT.search(file.stem.lower())
        source = load(str(file), "train", None, where)
        if broken := [f"{source.place(line)}: {what}" for line, what in source.records if isinstance(what, str)]:
            raise wrong(where, broken[0], f"{len(broken)} such lines. Correct or remove them.")
        found.setdefault(said[1] if said else "train", []).extend(record for _, record in source.records)
    return found


_SPLIT = re.compile(r"(?:^|[^a-z])(train|validation|valid|val|dev|test)(?=[^a-z]|$)")


def _lines(rows: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=True, default=_plain) + "\n" for row in rows)


def _plain(value: Any) -> Any:
    # What JSON has no word for: dates and exact numbers as text; bytes, images and sounds stay what no row may have.
    return str(value) if isinstance(value, (datetime.date, datetime.time, decimal.Decimal)) else {}
