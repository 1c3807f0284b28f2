"""From files to tokenized rows.

Owns: reading JSONL and CSV with every problem by file and line, columns, prompts, the three splits, tokenization and its
cache. Must not know: models' weights, recipes' rates, studies.

The splits never share a row: a row (by its text) that stands in the test rows is taken out of validation and training, one
that stands in validation out of training, and the counts are kept in `Rows.notes`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from training import tasks
from training.errors import InputError, Problem, wrong
from training.recipe import DataConfig

EMBEDDED = "embedded:"
SHARE = 0.1  # of the training rows, for each split that the user did not give
SHOWN = 3  # problems of one kind and file that are listed; the rest is counted
Row = dict[str, str]


@dataclass(frozen=True)
class Rows:
    """Validated rows by split, each a dict with the task's columns, and what was noticed on the way."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    digest: str = ""


@dataclass(frozen=True)
class Tokenized:
    """Rows as token ids: `ids[i][:prompt_lengths[i]]` is the prompt, the rest is the response and end of sequence."""

    ids: list[list[int]]
    prompt_lengths: list[int]
    cut: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def __add__(self, other: Tokenized) -> Tokenized:
        return Tokenized(self.ids + other.ids, self.prompt_lengths + other.prompt_lengths, self.cut + other.cut)


@dataclass(frozen=True)
class Prepared:
    """Tokenized rows by split; `labels` has the token ids of each label of a classification task."""

    train: Tokenized
    validation: Tokenized
    test: Tokenized
    labels: list[list[int]] = field(default_factory=list)


def locate(name: str) -> Path:
    """Returns the path of a data file; `embedded:FILE` is one that ships with the package."""
    if name.startswith(EMBEDDED):
        return Path(__file__).parent / "embedded" / Path(name.removeprefix(EMBEDDED)).name
    return Path(os.path.expandvars(name)).expanduser()


def read(config: DataConfig, *, seed: int = 0) -> Rows:
    """Returns the rows of all three splits.

    Args:
        config: the files and columns.
        seed: of the split, where validation or test rows are cut from the training rows.

    Raises:
        InputError: with every problem found, by file and line.
    """
    found: list[Problem] = []
    splits: dict[str, list[Row]] = {}
    digest = hashlib.sha256()
    for name in ("train", "validation", "test"):
        if (given := getattr(config, name)) is None:
            continue
        try:
            splits[name], content = _read_file(given, config, f"data.{name}")
            digest.update(name.encode() + content)
        except InputError as error:
            found += error.problems
    if found:
        raise InputError(*found)
    rest = config.model_dump(exclude={"train", "validation", "test"}) | {"seed": seed}
    digest.update(json.dumps(rest, sort_keys=True).encode())
    notes = _split(splits, random.Random(seed))
    labels = _labels(config, splits) if config.task == "classification" else ()
    if config.limit and config.limit < len(splits["train"]):  # a seeded choice, because files are often sorted by label
        chosen = sorted(random.Random(seed).sample(range(len(splits["train"])), config.limit))
        splits["train"] = [splits["train"][i] for i in chosen]
    for name, rows in splits.items():
        if not rows:
            raise wrong(f"data.{name}", "no row is left.", "Give more rows, or a file of its own for this split.")
    return Rows(splits["train"], splits["validation"], splits["test"], labels, tuple(notes), digest.hexdigest())


def _read_file(name: str, config: DataConfig, where: str) -> tuple[list[Row], bytes]:
    path = locate(name)
    if not path.exists():
        raise wrong(where, f"no such file: {name}.", "Paths are relative to the study file.")
    if path.is_dir():
        raise wrong(where, f"{name} is a folder.", "Name a JSONL or CSV file.")
    kind = config.format or {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv"}.get(path.suffix.lower())
    if kind is None:
        raise wrong(where, f"cannot tell the format of {path.name}.", "Set data.format to jsonl or csv.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise wrong(where, f"{name} cannot be read ({error.strerror}).", "Check its permissions.") from None
    if not content.strip():
        raise wrong(where, f"{name} is empty.", "Give at least a few rows.")
    if b"\0" in content:
        line = content[: content.index(b"\0")].count(b"\n") + 1
        raise wrong(where, f"{name}:{line}: a NUL byte; this is not a text file.", "Give JSONL or CSV in UTF-8.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise wrong(where, f"{name}:{line}: byte {error.start} is not UTF-8.", "Convert the file to UTF-8.") from None
    return _rows(text, kind, config, name, where), hashlib.sha256(content).digest()


def _rows(text: str, kind: str, config: DataConfig, name: str, where: str) -> list[Row]:
    found: dict[str, list[int]] = {}
    rows: list[Row] = []
    task = tasks.load(config.task)
    records = list(_records(text, kind, where, name))
    columns = _columns([raw for _, raw in records if isinstance(raw, dict)], config, task, where)
    for line, raw in records:
        if isinstance(raw, str):
            found.setdefault(raw, []).append(line)
            continue
        row: Row = {}
        for ours, theirs in columns.items():
            value = raw.get(theirs)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and ours == task.RESPONSE:
                value = str(value)
            if value is None and ours in task.OPTIONAL:
                value = ""
            if not isinstance(value, str):
                what = "is missing" if value is None else f"must be text, got {type(value).__name__}"
                found.setdefault(f"the field {theirs!r} {what}.", []).append(line)
            elif not value.strip() and ours not in task.OPTIONAL:
                found.setdefault(f"the field {theirs!r} is empty.", []).append(line)
            elif any("\ud800" <= character <= "\udfff" for character in value):
                found.setdefault(f"the field {theirs!r} has half a character (a lone surrogate).", []).append(line)
            else:
                row[ours] = value.strip() if config.task == "classification" else value
        if len(row) < len(columns):
            continue
        if config.task == "completion":
            row = task.divide(row, config.separator)
            if row is None:
                found.setdefault(f"no text after data.separator {config.separator!r}.", []).append(line)
                continue
        rows.append(row)
    if found:
        raise InputError(*(_listed(where, name, what, lines) for what, lines in found.items()))
    return rows


def _listed(where: str, name: str, what: str, lines: list[int]) -> Problem:
    shown = ", ".join(f"{name}:{line}" for line in lines[:SHOWN])
    more = f" and {len(lines) - SHOWN} more lines" if len(lines) > SHOWN else ""
    return Problem(where, f"{shown}{more}: {what}", "Correct or remove the rows, or name other columns in data.columns.")


def _records(text: str, kind: str, where: str, name: str) -> Iterator[tuple[int, dict | str]]:
    """Yields (line, record), or (line, what is wrong) for a line that is no record."""
    if kind == "csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            for raw in reader:
                if None in raw:
                    yield reader.line_num, "has more fields than the header."
                else:
                    yield reader.line_num, raw
        except csv.Error as error:
            yield reader.reader.line_num, f"is not CSV ({error})."
        return
    if text.lstrip().startswith("["):
        raise wrong(where, f"{name} is one JSON array.", "Write one object per line (JSONL).")
    for line, raw in enumerate(text.split("\n"), 1):
        if not raw.strip():
            continue
        try:
            record = json.loads(raw)
        except (ValueError, RecursionError):
            yield line, "is not JSON."
            continue
        yield line, record if isinstance(record, dict) else "is not a JSON object."


def _columns(records: list[dict], config: DataConfig, task, where: str) -> dict[str, str]:
    """Returns our name -> the file's, from the user first and the usual names second.

    A column must stand in the first record; an optional one may come later.
    """
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


def _split(splits: dict[str, list[Row]], rng: random.Random) -> list[str]:
    """Fills in the missing splits from the training rows, in place, without a shared row; returns notes."""
    notes = []
    for name in ("test", "validation"):
        if name not in splits:
            rows = splits["train"]
            groups: dict[str, list[Row]] = {}
            for row in rows:
                groups.setdefault(_identity(row), []).append(row)
            keys = list(groups)
            rng.shuffle(keys)
            take = max(1, round(len(keys) * SHARE))
            chosen = set(keys[:take])
            splits[name] = [groups[key][0] for key in keys[:take]]
            splits["train"] = [row for row in rows if _identity(row) not in chosen]
            notes.append(f"{name}: {len(splits[name])} rows cut from the training rows by seed")
    for keep, lose in (("test", "validation"), ("test", "train"), ("validation", "train")):
        known = {_identity(row) for row in splits[keep]}
        left = [row for row in splits[lose] if _identity(row) not in known]
        if dropped := len(splits[lose]) - len(left):
            splits[lose] = left
            notes.append(f"{lose}: {dropped} rows left out because they also stand in {keep}")
    return notes


def _identity(row: Row) -> str:
    shown = {name: value.strip() for name, value in row.items() if name != "label"}
    if row.get("instruction"):
        del shown["response"]
    return json.dumps({name: value for name, value in shown.items() if value}, sort_keys=True)


def _labels(config: DataConfig, splits: dict[str, list[Row]]) -> tuple[str, ...]:
    labels = config.labels or tuple(sorted({row["label"] for row in splits["train"]}))
    if len(labels) < 2:
        raise wrong("data.labels", f"classification needs two labels, got {list(labels)}.", "Check data.columns.label.")
    for name, rows in splits.items():
        if strange := {row["label"] for row in rows} - set(labels):
            raise wrong(
                f"data.{name}", f"labels that are not in data.labels: {sorted(strange)[:SHOWN]}.", "Add them, or remove the rows."
            )
    return labels


def _chats(config: DataConfig, tokenizer) -> bool:
    # Plain text that is continued is no conversation.
    return config.template is None and config.task != "completion" and tokenizer is not None and bool(tokenizer.chat_template)


def prompt_of(row: Row, config: DataConfig, tokenizer) -> str:
    """Returns the rendered prompt: the user's template, else the tokenizer's chat template, else the task's default."""
    task = tasks.load(config.task)
    if _chats(config, tokenizer):
        body = "\n".join(value for name, value in row.items() if name != task.RESPONSE and value)
        message = [{"role": "user", "content": body}]
        return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    template = config.template if config.template is not None else task.TEMPLATE
    if config.template is None and not row.get("input"):
        template = template.replace("{input}\n", "")
    # Only {column} is replaced: str.format would reach attributes of values, and braces in rows stay as they are.
    return re.sub(r"\{(\w+)\}", lambda match: row.get(match[1], ""), template)


def chat_template_of(config: DataConfig, tokenizer) -> str | None:
    """Returns a chat template that asks as the rows did, for a model that was tuned on them; None: the tokenizer's own does.

    It renders the last user message where the main column was; other columns stay empty. A completion model gets the text of
    all messages as it is.
    """
    if _chats(config, tokenizer):
        return None
    start = "{{ bos_token }}" if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else ""
    if config.task == "completion" and config.template is None:
        return start + "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    task = tasks.load(config.task)
    template = (config.template if config.template is not None else task.TEMPLATE).replace("{input}\n", "")
    before, name, after = re.split(r"\{(\w+)\}", template, maxsplit=1)
    before, after = (re.sub(r"\{\w+\}", "", part) for part in (before, after))
    asked = "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
    return f"{asked}{start}{{{{ {json.dumps(before)} + asked[-1]['content'] + {json.dumps(after)} }}}}"


def template_problems(config: DataConfig) -> list[Problem]:
    """Returns what is wrong with the user's template: unknown columns, or none at all."""
    if config.template is None:
        return []
    task = tasks.load(config.task)
    known = re.findall(r"\{(\w+)\}", task.TEMPLATE)
    used = re.findall(r"\{(\w+)\}", config.template)
    found = [
        Problem("data.template", f"unknown column {{{name}}}.", f"Known: {', '.join(known)}.")
        for name in used
        if name not in known
    ]
    if not used:
        found.append(Problem("data.template", "names no column, so every prompt would be the same.", f"Use {{{known[0]}}}."))
    return found


def tokenize(rows: list[Row], config: DataConfig, tokenizer, max_length: int) -> Tokenized:
    """Returns the rows as token ids; a row longer than `max_length` is counted and loses the beginning of its prompt.

    A response that is too long by itself loses its end.
    """
    task = tasks.load(config.task)
    # A chat template writes its own special tokens; elsewhere the tokenizer adds those it was trained with.
    special = not _chats(config, tokenizer)
    prompts = [prompt_of(row, config, tokenizer) for row in rows]
    responses = [_joined(prompt, row[task.RESPONSE]) for prompt, row in zip(prompts, rows, strict=True)]
    ids, lengths, cut = [], [], 0
    heads = tokenizer(prompts, add_special_tokens=False)["input_ids"] if prompts else []
    tails = tokenizer(responses, add_special_tokens=False)["input_ids"] if responses else []
    start = [tokenizer.bos_token_id] if special and _adds_bos(tokenizer) else []
    for head, tail in zip(heads, tails, strict=True):
        whole = len(start) + len(head) + len(tail) + 1
        cut += whole > max_length
        tail = (tail + [tokenizer.eos_token_id])[: max_length - len(start) - 1]
        room = max_length - len(tail) - len(start)
        head = start + head[-room:]
        ids.append(head + tail)
        lengths.append(len(head))
    return Tokenized(ids, lengths, cut)


def _joined(prompt: str, response: str) -> str:
    return response if not prompt or prompt[-1].isspace() else " " + response


def _adds_bos(tokenizer) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def prepare(rows: Rows, config: DataConfig, tokenizer, max_length: int, *, cache: str | None = None) -> Prepared:
    """Returns all splits tokenized, from the cache where the same rows were tokenized by the same tokenizer before."""
    path = None
    if cache:
        identity = json.dumps([rows.digest, tokenizer.backend_tokenizer.to_str(), str(tokenizer.chat_template), max_length])
        path = Path(cache) / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"
        if path.exists():
            raw = json.loads(path.read_text())
            return Prepared(*(Tokenized(**raw[name]) for name in ("train", "validation", "test")), labels=raw["labels"])
    splits = {name: tokenize(getattr(rows, name), config, tokenizer, max_length) for name in ("train", "validation", "test")}
    labels = []
    if rows.labels:
        prompt = prompt_of(rows.train[0], config, tokenizer)
        labels = [
            tokenizer(_joined(prompt, label), add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            for label in rows.labels
        ]
        for label, ids in zip(rows.labels, labels, strict=True):
            if len(ids) + 2 > max_length:  # the start and one token of the prompt
                raise wrong("recipe.max_length", f"the label {label!r} alone has {len(ids)} tokens, max_length is {max_length}.",
                            "Raise max_length or shorten the label.")  # fmt: skip
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}")
        raw = {name: {"ids": s.ids, "prompt_lengths": s.prompt_lengths, "cut": s.cut} for name, s in splits.items()}
        aside.write_text(json.dumps(raw | {"labels": labels}))
        aside.rename(path)
    return Prepared(**splits, labels=labels)


def sample(rows: Tokenized, count: int, *, seed: int) -> Tokenized:
    """Returns at most `count` rows by a seeded choice, in their order."""
    if len(rows) <= count:
        return rows
    chosen = sorted(random.Random(seed).sample(range(len(rows)), count))
    return Tokenized([rows.ids[i] for i in chosen], [rows.prompt_lengths[i] for i in chosen])
