"""From files to tokenized rows.

Owns: the way from files to three splits and on to token ids, and the cache of these. Files are read by `training.sources`,
records become rows in `training.rows`, sides are chosen in `training.splits`, prompts written in `training.templates`.
Must not know: models' weights, recipes' rates, studies.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path

from training import rows as row_words
from training import sources, splits, tasks
from training.errors import InputError, Problem, wrong
from training.recipe import Clean, DataConfig
from training.rows import SHOWN, Entry, Finding, Ledger, Row
from training.sources import EMBEDDED, HUB, locate
from training.templates import chat_template_of, prompt_of, prompts_of, template_problems, writes_start

__all__ = [
    "EMBEDDED", "HUB", "Prepared", "Row", "Rows", "Tokenized", "chat_template_of", "locate", "prepare", "prompt_of", "read",
    "sample", "template_problems", "tokenize",
]  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """Validated rows by split, each a dict with the task's columns, and what was noticed on the way.

    `found` counts what is wrong with rows that was let pass, or that took them out; `read` has the records by file.
    """

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    digest: str = ""
    found: tuple[Finding, ...] = ()
    read: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Tokenized:
    """Rows as token ids: `ids[i][:prompt_lengths[i]]` is the prompt, the rest is the response and end of sequence.

    `cut` rows lost a part because they were too long, `dropped` ones are not here at all.
    """

    ids: list[list[int]]
    prompt_lengths: list[int]
    cut: int = 0
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def __add__(self, other: Tokenized) -> Tokenized:
        return Tokenized(self.ids + other.ids, self.prompt_lengths + other.prompt_lengths, self.cut + other.cut,
                         self.dropped + other.dropped)  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """Tokenized rows by split; `labels` has the token ids of each label of a classification task."""

    train: Tokenized
    validation: Tokenized
    test: Tokenized
    labels: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class Sides:
    """The three splits before conversations are divided into rows, and what was found on the way."""

    parts: dict[str, list[Entry]]
    labels: tuple[str, ...]
    notes: tuple[str, ...]
    digest: str
    ledger: Ledger


def read(config: DataConfig, *, seed: int = 0) -> Rows:
    """Returns the rows of all three splits; arguments and errors as `sides`."""
    found = sides(config, seed=seed)
    learned = {name: row_words.divided([entry.row for entry in part], config) for name, part in found.parts.items()}
    return Rows(**learned, labels=found.labels, notes=found.notes, digest=found.digest, found=tuple(found.ledger.findings),
                read=found.ledger.read)  # fmt: skip


def sides(config: DataConfig, *, seed: int = 0, clean: Clean | None = None) -> Sides:
    """Returns the three splits as they stand in the files.

    Args:
        config: the files and columns.
        seed: of the split, where validation or test rows are cut from the training rows.
        clean: stands in for `config.clean`, to look at rows that a study refuses; the digest stays the study's.

    Raises:
        InputError: with every problem found, by file and line.
    """
    found: list[Problem] = []
    said = json.dumps(config.identity() | {"seed": seed}, sort_keys=True)
    config = config.model_copy(update={"clean": clean or config.clean})
    parts: dict[str, list[Entry]] = {}
    digest, ledger = hashlib.sha256(), Ledger()
    for name in ("train", "validation", "test"):
        if (given := getattr(config, name)) is None:
            continue
        try:
            source = sources.load(given, name, config.format, f"data.{name}")
            parts[name] = row_words.entries(source, config, name, ledger)
            digest.update(name.encode() + source.digest)
        except InputError as error:
            found += error.problems
    if found:
        raise InputError(*found)
    digest.update(said.encode())
    parts["train"] = splits.repeated(parts["train"], config, ledger)
    notes = splits.hold_out(parts, config, random.Random(seed)) + splits.separate(parts, config, ledger)
    labels = _labels(config, parts) if config.task == "classification" else ()
    if config.limit and config.limit < len(parts["train"]):  # a seeded choice, because files are often sorted by label
        chosen = sorted(random.Random(seed).sample(range(len(parts["train"])), config.limit))
        parts["train"] = [parts["train"][i] for i in chosen]
    for name, entries in parts.items():
        if not entries:
            raise wrong(f"data.{name}", "no row is left.", "Give more rows, or a file of its own for this split.")
    notes += [f"{f.split}: {f.count} rows left out: {f.what}" for f in ledger.findings
              if f.action == "drop" and f.kind not in ("leak", "near_leak")]  # fmt: skip
    return Sides(parts, labels, tuple(notes), digest.hexdigest(), ledger)


def _labels(config: DataConfig, parts: dict[str, list[Entry]]) -> tuple[str, ...]:
    labels = config.labels or tuple(sorted({entry.row["label"] for entry in parts["train"]}))
    if len(labels) < 2:
        raise wrong("data.labels", f"classification needs two labels, got {list(labels)}.", "Check data.columns.label.")
    for name, entries in parts.items():
        if strange := {entry.row["label"] for entry in entries} - set(labels):
            raise wrong(
                f"data.{name}", f"labels that are not in data.labels: {sorted(strange)[:SHOWN]}.", "Add them, or remove the rows."
            )
    return labels


def tokenize(rows: list[Row], config: DataConfig, tokenizer, max_length: int) -> Tokenized:
    """Returns the rows as token ids; one longer than `max_length` is counted, and `config.too_long` says what becomes of it.

    `cut_prompt`: it loses the beginning of its prompt, and a response that is too long by itself its end. `cut_end`: it loses
    its end, where that leaves some of the response, and otherwise as before. `drop`: it is left out.

    Raises:
        InputError: `error`, or every row is dropped.
    """
    task = tasks.load(config.task)
    prompts = prompts_of(rows, config, tokenizer)
    responses = [_joined(prompt, row[task.RESPONSE]) for prompt, row in zip(prompts, rows, strict=True)]
    ids, lengths, cut = [], [], 0
    heads = tokenizer(prompts, add_special_tokens=False)["input_ids"] if prompts else []
    tails = tokenizer(responses, add_special_tokens=False)["input_ids"] if responses else []
    # A chat template writes its own special tokens; elsewhere the tokenizer adds those it was trained with.
    start = [tokenizer.bos_token_id] if not writes_start(config, tokenizer) and _adds_bos(tokenizer) else []
    longest = 0
    for head, tail in zip(heads, tails, strict=True):
        whole = len(start) + len(head) + len(tail) + 1
        longest = max(longest, whole)
        cut += whole > max_length
        if whole > max_length and config.too_long in ("drop", "error"):
            continue
        tail = tail + [tokenizer.eos_token_id]
        if whole > max_length and (config.too_long != "cut_end" or len(start) + len(head) >= max_length):
            tail = tail[: max_length - len(start) - 1]
            head = head[-(max_length - len(tail) - len(start)) :]
        head = start + head
        ids.append((head + tail)[:max_length])
        lengths.append(len(head))
    if cut and (config.too_long == "error" or not ids):
        remedy = f"Set recipe.max_length: {longest}, or data.too_long: cut_prompt."
        raise wrong("recipe.max_length", f"{cut} of {len(rows)} rows are longer than {max_length} tokens.", remedy)
    dropped = cut if config.too_long == "drop" else 0
    return Tokenized(ids, lengths, cut - dropped, dropped)


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
    # Held-out rows are the same whatever the length, and keep their answers: trials of several lengths must compare.
    held = config if config.too_long == "error" else config.model_copy(update={"too_long": "cut_prompt"})
    parts = {name: tokenize(getattr(rows, name), config if name == "train" else held, tokenizer, max_length)
             for name in ("train", "validation", "test")}  # fmt: skip
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
        raw = {name: asdict(part) for name, part in parts.items()}
        aside.write_text(json.dumps(raw | {"labels": labels}))
        aside.rename(path)
    return Prepared(**parts, labels=labels)


def sample(rows: Tokenized, count: int, *, seed: int) -> Tokenized:
    """Returns at most `count` rows by a seeded choice, in their order."""
    if len(rows) <= count:
        return rows
    chosen = sorted(random.Random(seed).sample(range(len(rows)), count))
    return Tokenized([rows.ids[i] for i in chosen], [rows.prompt_lengths[i] for i in chosen])
