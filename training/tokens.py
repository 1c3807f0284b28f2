"""From rows to token ids, in memory or on disk.

Owns: `tokenize`, what becomes of rows that are too long, and the cache that all trials of a machine read through a memory map.
Must not know: files of rows, splits, models' weights, studies.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import random
import shutil
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from training import tasks
from training.errors import wrong
from training.recipe import DataConfig
from training.rows import Row
from training.templates import prompt_of, prompts_of, writes_start

if TYPE_CHECKING:
    from training.data import Rows

CHUNK = 8192  # rows that are text at one time
VERSION = 2  # of the cache; 1 was JSON
FILES = {"ids": np.int32, "starts": np.int64, "prompts": np.int32}


class Numbers(Sequence):
    """Whole numbers in an array, that come out as Python's."""

    def __init__(self, numbers: np.ndarray):
        self.array = numbers

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, i):
        return self.array[i].tolist()

    def __iter__(self) -> Iterator[int]:
        return itertools.chain.from_iterable(self[i : i + CHUNK] for i in range(0, len(self), CHUNK))

    def __eq__(self, other) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None


class Ids(Sequence):
    """Rows of token ids, one after the other in a flat array, which may lie on disk. A row comes out as a list."""

    def __init__(self, flat: np.ndarray, starts: np.ndarray):
        self.flat, self.starts = flat, starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        return self.flat[self.starts[i] : self.starts[i + 1]].tolist()

    def __eq__(self, other) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None


class _Both(Sequence):
    """One sequence after another."""

    def __init__(self, first: Sequence, second: Sequence):
        self.first, self.second = first, second

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        return self.first[i] if i < len(self.first) else self.second[i - len(self.first)]

    __eq__ = Numbers.__eq__
    __hash__ = None


@dataclass(frozen=True)
class Tokenized:
    """Rows as token ids: `ids[i][:prompt_lengths[i]]` is the prompt, the rest is the response and end of sequence.

    `cut` rows lost a part because they were too long, `dropped` ones are not here at all. Where rows come from several named
    sources, `parts` says which and how many, in their order, and `weights` how often each is drawn.
    """

    ids: Sequence[list[int]]
    prompt_lengths: Sequence[int]
    cut: int = 0
    dropped: int = 0
    parts: tuple[tuple[str, int], ...] = ()
    weights: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def __add__(self, other: Tokenized) -> Tokenized:
        return Tokenized(_Both(self.ids, other.ids), _Both(self.prompt_lengths, other.prompt_lengths), self.cut + other.cut,
                         self.dropped + other.dropped, self.parts + other.parts, self.weights)  # fmt: skip

    def lengths(self) -> np.ndarray:
        """Returns the tokens of each row, without reading them where they lie on disk."""
        if isinstance(self.ids, Ids):
            return np.diff(self.ids.starts)
        return np.array([len(row) for row in self.ids], dtype=np.int64)


@dataclass(frozen=True)
class Prepared:
    """Tokenized rows by split; `labels` has the token ids of each label of a classification task."""

    train: Tokenized
    validation: Tokenized
    test: Tokenized
    labels: list[list[int]] = field(default_factory=list)


class _Writer:
    """Takes rows of token ids, into memory or into files `NAME.ids`, `NAME.starts`, `NAME.prompts` of a folder."""

    def __init__(self, folder: Path | None, name: str):
        self.open = {kind: (folder / f"{name}.{kind}").open("wb") for kind in FILES} if folder else {}
        self.folder, self.name, self.tokens = folder, name, 0
        self.held = {"ids": array("i"), "starts": array("q", [0]), "prompts": array("i")}

    def add(self, prompt: list[int], response: list[int]) -> None:
        self.held["ids"].extend(prompt)
        self.held["ids"].extend(response)
        self.tokens += len(prompt) + len(response)
        self.held["starts"].append(self.tokens)
        self.held["prompts"].append(len(prompt))

    def flush(self) -> None:
        for kind, file in self.open.items():
            self.held[kind].tofile(file)
            self.held[kind] = array(self.held[kind].typecode)

    def close(self) -> tuple[Ids, Numbers]:
        self.flush()
        for file in self.open.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        if self.folder:
            return mapped(self.folder, self.name)
        whole = {kind: np.frombuffer(self.held[kind], dtype=dtype) for kind, dtype in FILES.items()}
        return Ids(whole["ids"], whole["starts"]), Numbers(whole["prompts"])


def mapped(folder: Path, name: str) -> tuple[Ids, Numbers]:
    """Returns rows that lie in a folder; what is not asked for is not read."""
    found = {}
    for kind, dtype in FILES.items():
        path = folder / f"{name}.{kind}"  # an empty file cannot be mapped
        found[kind] = np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)
    return Ids(found["ids"], found["starts"]), Numbers(found["prompts"])


def tokenize(rows: Iterable[Row], config: DataConfig, tokenizer, max_length: int, *, parts: Iterable[tuple[str, int]] = (),
             into: Path | None = None, name: str = "rows") -> Tokenized:  # fmt: skip
    """Returns the rows as token ids; one longer than `max_length` is counted, and `config.too_long` says what becomes of it.

    `cut_prompt`: it loses the beginning of its prompt, and a response that is too long by itself its end. `cut_end`: it loses
    its end, where that leaves some of the response, and otherwise as before. `cut_both`: it loses the beginning of its prompt
    and the end of its response, in proportion to their lengths. `drop`: it is left out. The beginning of sequence is never
    cut; a response that lost its end does not end, so it has no end of sequence.

    Args:
        rows: with the columns of the task; looked at once, some thousands at a time.
        config: the task, the template and `too_long`.
        tokenizer: of the model.
        max_length: tokens, start and end of sequence included.
        parts: names of sources and how many of the rows come from each, in the rows' order; none where there is one source.
        into: folder for files of this `name`; None keeps the ids in memory.

    Raises:
        InputError: `error`, or every row is dropped.
    """
    writer, cut, longest, seen = _Writer(into, name), 0, 0, 0
    parts = tuple(parts)
    every = [itertools.repeat(source, count) for source, count in parts]
    origins = itertools.chain.from_iterable(every) if every else itertools.repeat("")
    kept: dict[str, int] = {}
    # A chat template writes its own special tokens; elsewhere the tokenizer adds those it was trained with.
    start = [tokenizer.bos_token_id] if not writes_start(config, tokenizer) and _adds_bos(tokenizer) else []
    for heads, tails in _encoded(rows, config, tokenizer):
        for head, tail, origin in zip(heads, tails, origins):  # noqa: B905  origins goes on for ever where there are none
            head, tail = start + head, [*tail, tokenizer.eos_token_id]
            whole = len(head) + len(tail)
            longest = max(longest, whole)
            if whole > max_length:
                cut += 1
                if config.too_long in ("drop", "error"):
                    continue
                head, tail = _cut(start, head[len(start) :], tail, max_length, config.too_long)
            writer.add(head, tail)
            kept[origin] = kept.get(origin, 0) + 1
        seen += len(heads)
        writer.flush()
    ids, lengths = writer.close()
    if cut and (config.too_long == "error" or not len(ids)):
        remedy = f"Set recipe.max_length: {longest}, or data.too_long: cut_prompt."
        raise wrong("recipe.max_length", f"{cut} of {seen} rows are longer than {max_length} tokens.", remedy)
    dropped = cut if config.too_long == "drop" else 0
    return Tokenized(ids, lengths, cut - dropped, dropped, tuple(kept.items()) if parts else ())


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    some = iter(rows)
    while chunk := list(itertools.islice(some, CHUNK)):
        yield chunk


def _encoded(rows: Iterable[Row], config: DataConfig, tokenizer) -> Iterator[tuple[list[list[int]], list[list[int]]]]:
    """Yields the token ids of the prompts and of the responses of some rows, without special tokens of the sequence.

    The tokenizer, which needs no Python, works on some rows while the next ones are rendered.
    """
    response = tasks.load(config.task).RESPONSE
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()

    def encode(texts: list[str]) -> list:
        return backend.encode_batch_fast(texts, add_special_tokens=False)

    with ThreadPoolExecutor(1) as pool:
        ahead: deque = deque()
        for chunk in _chunks(rows):
            prompts = prompts_of(chunk, config, tokenizer)
            responses = [_joined(prompt, row[response]) for prompt, row in zip(prompts, chunk, strict=True)]
            ahead.append(pool.submit(encode, prompts + responses))
            while len(ahead) > 1:
                yield _halves(ahead.popleft().result())
        while ahead:
            yield _halves(ahead.popleft().result())


def _halves(found: list) -> tuple[list[list[int]], list[list[int]]]:
    ids = [one.ids for one in found]
    return ids[: len(ids) // 2], ids[len(ids) // 2 :]


def _cut(start: list[int], head: list[int], tail: list[int], most: int, how: str) -> tuple[list[int], list[int]]:
    """Returns prompt and response that together have at most `most` tokens; `start` stays."""
    room = most - len(start)
    if how == "cut_both":
        kept = max(1, round(room * len(tail) / (len(head) + len(tail))))
        return start + head[len(head) - (room - kept) :], tail[:kept]
    if how == "cut_end" and len(head) < room:
        return start + head, tail[: room - len(head)]
    tail = tail[: room - 1]  # one token of the prompt stays
    return start + head[-(room - len(tail)) :], tail


def _joined(prompt: str, response: str) -> str:
    return response if not prompt or prompt[-1].isspace() else " " + response


def _adds_bos(tokenizer) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def home() -> Path:
    """Returns this machine's folder for rows and tokens of large files, which may be deleted at any time."""
    given = os.environ.get("PARETUNE_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paretune"


@contextmanager
def made(folder: Path) -> Iterator[Path | None]:
    """Yields a new folder that becomes `folder` at the end; None where that is there, made now by another process or before."""
    if folder.exists():
        yield None
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock, aside = folder.with_name(f".{folder.name}.lock"), folder.with_name(f".{folder.name}.{os.getpid()}")
    with lock.open("w") as file:
        with suppress(OSError):  # a file system without locks: then two may make it, and the first one stays
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            if folder.exists():
                yield None
                return
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            yield aside
            with suppress(OSError):
                aside.rename(folder)
            if not folder.exists():
                raise OSError(f"{folder} cannot be written")
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            lock.unlink(missing_ok=True)


def prepare(rows: Rows, config: DataConfig, tokenizer, max_length: int, *, cache: str | None = None) -> Prepared:
    """Returns all splits tokenized, from the cache where the same rows were tokenized by the same tokenizer before.

    Args:
        rows: of all splits.
        config: as in `tokenize`.
        tokenizer: of the model.
        max_length: tokens of a row.
        cache: folder; rows of large files are kept in this machine's own (`home`) instead, because they are read from it.
    """
    root = home() / "tokens" if rows.large else Path(cache) if cache else None
    if root is None:
        parts, labels = _splits(rows, config, tokenizer, max_length, None), _labels(rows, config, tokenizer, max_length)
        return Prepared(**parts, labels=labels)
    identity = [VERSION, rows.digest, tokenizer.backend_tokenizer.to_str(), str(tokenizer.chat_template), max_length]
    folder = root / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    with made(folder) as new:
        if new is not None:
            labels = _labels(rows, config, tokenizer, max_length)
            parts = _splits(rows, config, tokenizer, max_length, new)
            said = {name: {"cut": part.cut, "dropped": part.dropped, "parts": part.parts} for name, part in parts.items()}
            (new / "made.json").write_text(json.dumps({"splits": said, "labels": labels}))
    return _kept(folder, rows.weights)


def _kept(folder: Path, weights: dict[str, float]) -> Prepared:
    raw: dict[str, Any] = json.loads((folder / "made.json").read_text())
    parts = {}
    for name, said in raw["splits"].items():
        said["parts"] = tuple((source, count) for source, count in said["parts"])
        parts[name] = Tokenized(*mapped(folder, name), **said, weights=weights)
    return Prepared(**parts, labels=raw["labels"])


def _splits(rows: Rows, config: DataConfig, tokenizer, max_length: int, into: Path | None) -> dict[str, Tokenized]:
    # Held-out rows are the same whatever the length, and keep their answers: trials of several lengths must compare.
    held = config if config.too_long == "error" else config.model_copy(update={"too_long": "cut_prompt"})
    found = {}
    for name in ("train", "validation", "test"):
        how = config if name == "train" else held
        done = tokenize(getattr(rows, name), how, tokenizer, max_length, parts=rows.parts.get(name, ()), into=into, name=name)
        found[name] = replace(done, weights=rows.weights)
    return found


def _labels(rows: Rows, config: DataConfig, tokenizer, max_length: int) -> list[list[int]]:
    if not rows.labels:
        return []
    prompt, labels = prompt_of(rows.train[0], config, tokenizer), []
    for label in rows.labels:
        ids = tokenizer(_joined(prompt, label), add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        if len(ids) + 2 > max_length:  # the start and one token of the prompt
            raise wrong("recipe.max_length", f"the label {label!r} alone has {len(ids)} tokens, max_length is {max_length}.",
                        "Raise max_length or shorten the label.")  # fmt: skip
        labels.append(ids)
    return labels


def sample(rows: Tokenized, count: int, *, seed: int) -> Tokenized:
    """Returns at most `count` rows by a seeded choice, in their order."""
    if len(rows) <= count:
        return rows
    chosen = sorted(random.Random(seed).sample(range(len(rows)), count))
    return Tokenized([rows.ids[i] for i in chosen], [rows.prompt_lengths[i] for i in chosen])
