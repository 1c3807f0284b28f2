"""From files to rows in three splits.

Owns: the way there, and the door to all of data. Files are read by `training.sources`, records become rows in `training.rows`,
sides are chosen in `training.splits`, prompts written in `training.templates`, ids made in `training.tokens`; what is too large
to be held in memory takes the same way through `training.shelf`.
Must not know: models' weights, recipes' rates, studies.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from training import rows as row_words
from training import shelf, sources, splits
from training.errors import InputError, Problem
from training.recipe import Clean, DataConfig
from training.rows import Entry, Finding, Ledger, Row
from training.sources import EMBEDDED, HUB, locate
from training.splits import labels_of, left_out, mixed
from training.templates import chat_template_of, prompt_of, prompts_of, template_problems
from training.tokens import Prepared, Tokenized, prepare, sample, tokenize

__all__ = [
    "EMBEDDED", "HUB", "Prepared", "Row", "Rows", "Tokenized", "chat_template_of", "locate", "prepare", "prompt_of",
    "prompts_of", "read", "sample", "template_problems", "tokenize",
]  # fmt: skip


SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Rows:
    """Validated rows by split, each a dict with the task's columns, and what was noticed on the way.

    `found` counts what is wrong with rows that was let pass, or that took them out; `read` has the records by split. Of a
    mixture, `parts` has the sources of each split with their rows, in order, and `weights` those of data.train. `large` rows
    lie on disk and are read when they are asked for.
    """

    train: Sequence[Row]
    validation: Sequence[Row]
    test: Sequence[Row]
    labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    digest: str = ""
    found: tuple[Finding, ...] = ()
    read: dict[str, int] = field(default_factory=dict)
    parts: dict[str, tuple[tuple[str, int], ...]] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    large: bool = False


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
    weights = {name: origin.weight for name, origin in config.origins().items() if name}
    said = {"labels": found.labels, "notes": found.notes, "digest": found.digest, "found": tuple(found.ledger.findings),
            "read": found.ledger.read, "weights": weights}  # fmt: skip
    if isinstance(found, shelf.Sides):
        return Rows(**found.rows, **said, parts=found.sources if weights else {}, large=True)
    learned = {name: row_words.divided([entry.row for entry in part], config) for name, part in found.parts.items()}
    parts = {name: _origins(part, config) for name, part in found.parts.items()} if weights else {}
    return Rows(**learned, **said, parts=parts)


def _origins(entries: list[Entry], config: DataConfig) -> tuple[tuple[str, int], ...]:
    return tuple((name, len(row_words.divided([entry.row for entry in some], config)))
                 for name, some in itertools.groupby(entries, lambda entry: entry.origin))  # fmt: skip


def sides(config: DataConfig, *, seed: int = 0, clean: Clean | None = None) -> Sides | shelf.Sides:
    """Returns the three splits as they stand in the files.

    Args:
        config: the files and columns.
        seed: of the split, where validation or test rows are cut from the training rows.
        clean: stands in for `config.clean`, to look at rows that a study refuses; the digest stays the study's.

    Raises:
        InputError: with every problem found, by file and line.
    """
    said = json.dumps(config.identity() | {"seed": seed}, sort_keys=True)
    config = config.model_copy(update={"clean": clean or config.clean})
    given, unread = _loaded(config)
    digest = hashlib.sha256()
    for name, loaded in given.items():
        for origin, (source, _) in loaded.items():
            digest.update(f"{name} {origin}".rstrip().encode() + source.digest)
    digest.update(said.encode())
    if sum(source.size for loaded in given.values() for source, _ in loaded.values()) > config.stream_above:
        digest.update(b"on disk")  # where other rows are held out
        if unread:
            raise InputError(*unread)
        return shelf.sides(given, config, seed, digest.hexdigest())
    return _held(given, config, seed, digest.hexdigest(), unread)


Given = dict[str, dict[str, tuple[sources.Source, DataConfig]]]  # by split and name: what is read, and its own columns


def _loaded(config: DataConfig) -> tuple[Given, list[Problem]]:
    """Returns what can be read, and what is wrong with the rest."""
    found: list[Problem] = []
    given: Given = {}
    for name in SPLITS:
        for origin, said in config.origins(name).items():
            try:
                where = f"data.{name}.{origin}.file" if origin else f"data.{name}"
                source = sources.load(said.file, name, config.format, where)
            except InputError as error:
                found += error.problems
                continue
            own = config.model_copy(update={"columns": config.columns | said.columns})
            given.setdefault(name, {})[origin] = source, own
    return given, found


def _held(given: Given, config: DataConfig, seed: int, digest: str, unread: list[Problem]) -> Sides:
    """Returns the sides of rows that are held in memory."""
    found = list(unread)
    parts: dict[str, list[Entry]] = {}
    ledger = Ledger()
    for name, loaded in given.items():
        parts[name] = []
        for origin, (source, own) in loaded.items():
            try:
                parts[name] += row_words.entries(source, own, name, ledger, origin)
            except InputError as error:
                found += error.problems
    if found:
        raise InputError(*sorted(found, key=lambda one: next((i for i, name in enumerate(SPLITS) if name in one.where), 0)))
    parts["train"] = splits.repeated(parts["train"], config, ledger)
    notes = splits.hold_out(parts, config, seed) + splits.separate(parts, config, ledger)
    labels = labels_of(config, {name: {entry.row.get("label", "") for entry in part} for name, part in parts.items()})
    parts["train"] = _limited(parts["train"], config, seed)
    splits.check({name: [entry.origin for entry in part] for name, part in parts.items()}, config)
    notes += mixed(config, Counter(entry.origin for entry in parts["train"]).items())
    return Sides(parts, labels, (*notes, *left_out(ledger)), digest, ledger)


def _limited(entries: list[Entry], config: DataConfig, seed: int) -> list[Entry]:
    """Returns the training rows that the limits leave: a seeded choice, because files are often sorted by label."""

    def some(of: list[Entry], limit: int | None) -> list[Entry]:
        if not limit or limit >= len(of):
            return of
        return [of[i] for i in sorted(random.Random(seed).sample(range(len(of)), limit))]

    limits = {name: origin.limit for name, origin in config.origins().items()}
    by = itertools.groupby(entries, lambda entry: entry.origin)
    return some([entry for name, own in by for entry in some(list(own), limits[name])], config.limit)
