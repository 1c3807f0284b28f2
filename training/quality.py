"""What a data set is like before anything is trained on it.

Owns: `Quality` and `examine`: counts of what is wrong with file and line, rows on two sides, near-duplicates, lengths, labels.
Must not know: studies, models' weights.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import numpy as np

from training import data, duplicates, shelf
from training.recipe import DataConfig, Frozen
from training.rows import SHOWN, Entry, Finding, Row, divided, lenient, text_of
from training.splits import sketches

UNEVEN = 10  # times as many rows with the commonest label as with the rarest one are worth a note
SAMPLED = 20_000  # rows of a shelf whose tokens are counted
COMPARED = 100_000  # rows beyond which near-duplicates are not looked for; it would take minutes


class Lengths(Frozen):
    """How long rows are, in characters or tokens."""

    smallest: int
    median: float
    mean: float
    p95: int
    largest: int


class Side(Frozen):
    """One split: rows (of conversations: as they stand in the file) and answers, which is what is learned or scored."""

    rows: int
    answers: int
    characters: Lengths
    tokens: Lengths | None = None
    too_long: int | None = None
    labels: dict[str, int] = {}


class Quality(Frozen):
    """What a data set is like. `read` counts records by file, before anything was left out."""

    task: str
    digest: str
    read: dict[str, int]
    splits: dict[str, Side]
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def refused(self) -> bool:
        """Whether a study with these rows would be refused."""
        return any(found.action == "error" for found in self.findings)


def examine(config: DataConfig, *, tokenizer=None, max_length: int | None = None, seed: int = 0) -> Quality:
    """Returns what the data set is like. Rows that a study would refuse are counted, not raised.

    Args:
        config: the files and columns, and what happens to rows with a problem.
        tokenizer: counts tokens, prompt and end included, where one is given.
        max_length: tokens; longer rows are counted.
        seed: of the split.

    Raises:
        InputError: the files cannot be read, or no row is left.
    """
    sides = data.sides(config, seed=seed, clean=lenient(config.clean))
    ledger = sides.ledger
    notes = [note for note in sides.notes if "left out" not in note]  # the findings say it, with places
    if isinstance(sides, shelf.Sides):
        return _large(sides, config, tokenizer, max_length, notes)
    _repetitions(sides.parts["train"], config, ledger)
    if sum(map(len, sides.parts.values())) <= COMPARED:
        _likenesses(sides.parts, config, ledger)
    else:
        notes.append(f"near-duplicates are not looked for in more than {COMPARED:,} rows")
    splits = {name: _side(part, config, tokenizer, max_length) for name, part in sides.parts.items()}
    return _told(sides, config, splits, [*notes, *_imbalance(splits["train"].labels), *_forgotten(config, tokenizer)])


def _told(sides: data.Sides | shelf.Sides, config: DataConfig, splits: dict[str, Side], notes: list[str]) -> Quality:
    found = tuple(finding.model_copy(update={"action": _action(finding, config)}) for finding in sides.ledger.findings)
    return Quality(task=config.task, digest=sides.digest, read=sides.ledger.read, splits=splits, findings=found,
                   notes=tuple(notes))  # fmt: skip


def _large(sides: shelf.Sides, config: DataConfig, tokenizer, max_length: int | None, notes: list[str]) -> Quality:
    """Returns what rows on a shelf are like: from the numbers that were written with them, tokens from a sample."""
    kept, splits = sides.shelf, {}
    characters, labels = kept.numbers("characters"), kept.numbers("label")
    for name, chosen in sides.chosen.items():
        rows, tokens, over = sides.rows[name], None, None
        if tokenizer is not None:
            some = random.Random(0).sample(range(len(rows)), min(len(rows), SAMPLED))
            tokens, over = _tokens([rows[i] for i in some], config, tokenizer, max_length)
            over = round(over * len(rows) / len(some)) if over is not None else None
        counts = np.unique(labels[chosen], return_counts=True) if config.task == "classification" else ((), ())
        said = {kept.labels[label]: int(count) for label, count in zip(*counts, strict=True)}
        splits[name] = Side(rows=len(chosen), answers=len(rows), characters=_lengths(characters[chosen]), tokens=tokens,
                            too_long=over, labels=dict(sorted(said.items())))  # fmt: skip
        if over is not None and len(rows) > SAMPLED:
            notes.append(f"{name}: tokens are those of {SAMPLED:,} rows, chosen by seed")
    train = sides.chosen["train"]
    if config.clean.repeated == "keep":
        again = train[~shelf.first(kept.numbers("whole")[train])]
        what = "stand in the training rows before"
        sides.ledger.note("repeated", "train", what, "keep", map(kept.place, again[:SHOWN]), len(again))
    clash = train[_clash(kept.numbers("key")[train], kept.numbers("answer")[train])]
    what = "ask what another row asks and have another answer"
    sides.ledger.note("contradiction", "train", what, "keep", map(kept.place, clash[:SHOWN]), len(clash))
    if config.clean.near_repeated == "keep" or config.clean.near_leak == "keep":
        notes.append("near-duplicates are not looked for in rows that stay on disk, unless data.clean drops them")
    return _told(sides, config, splits, [*notes, *_imbalance(splits["train"].labels), *_forgotten(config, tokenizer)])


def _clash(keys: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Returns as a mask which rows have the key, but not the answer, of another one."""
    _, start, back = np.unique(keys, return_index=True, return_inverse=True)
    other = answers != answers[start][back]
    return np.isin(back, back[other])


def _action(found: Finding, config: DataConfig) -> str:
    return getattr(config.clean, found.kind, found.action)


def _repetitions(train: list[Entry], config: DataConfig, ledger) -> None:
    if config.clean.repeated == "keep":
        seen: set[tuple] = set()
        again = [e.place for e in train if (said := tuple(v.strip() for v in e.row.values())) in seen or seen.add(said)]
        ledger.note("repeated", "train", "stand in the training rows before", "keep", again)
    answers: dict[str, set[str]] = {}
    for entry in train:
        answers.setdefault(entry.key, set()).add((entry.row.get("label") or entry.row.get("response") or "").strip())
    clash = [entry.place for entry in train if len(answers[entry.key]) > 1]
    ledger.note("contradiction", "train", "ask what another row asks and have another answer", "keep", clash)


def _likenesses(parts: dict[str, list[Entry]], config: DataConfig, ledger) -> None:
    train = sketches(parts["train"])
    if config.clean.near_leak == "keep":
        for name in ("validation", "test"):
            found = duplicates.like(train, sketches(parts[name]))
            places = [f"{entry.place} ~ {parts[name][other].place}"
                      for entry, other in zip(parts["train"], found, strict=True) if other is not None]  # fmt: skip
            ledger.note("near_leak", "train", f"are much like a row of {name}", "keep", places)
    if config.clean.near_repeated == "keep":
        entries, first = parts["train"], duplicates.clusters(train)
        places = [f"{entries[i].place} ~ {entries[j].place}" for i, j in enumerate(first)
                  if i != j and entries[i].row != entries[j].row]  # fmt: skip
        ledger.note("near_repeated", "train", "are much like a training row before", "keep", places)


def _side(part: list[Entry], config: DataConfig, tokenizer, max_length: int | None) -> Side:
    rows = divided([entry.row for entry in part], config)
    whole = _lengths([sum(map(len, entry.row.values())) if config.task != "chat" else len(text_of(entry.row)) for entry in part])
    tokens, over = _tokens(rows, config, tokenizer, max_length) if tokenizer is not None else (None, None)
    labels = Counter(entry.row["label"] for entry in part) if config.task == "classification" else {}
    return Side(rows=len(part), answers=len(rows), characters=whole, tokens=tokens, too_long=over,
                labels=dict(sorted(labels.items())))  # fmt: skip


def _tokens(rows: Sequence[Row], config: DataConfig, tokenizer, max_length: int | None) -> tuple[Lengths, int | None]:
    whole = config.model_copy(update={"too_long": "cut_prompt"})
    counted = data.tokenize(rows, whole, tokenizer, 1_000_000).lengths()
    return _lengths(counted), int((counted > max_length).sum()) if max_length else None


def _lengths(counts: Sequence[int] | np.ndarray) -> Lengths:
    ordered = np.sort(np.asarray(counts, dtype=np.int64))
    return Lengths(smallest=int(ordered[0]), median=float(np.median(ordered)), mean=round(float(ordered.mean()), 1),
                   p95=int(ordered[int(0.95 * (len(ordered) - 1))]), largest=int(ordered[-1]))  # fmt: skip


def _imbalance(labels: dict[str, int]) -> list[str]:
    if not labels or max(labels.values()) < UNEVEN * min(labels.values()):
        return []
    most, least = max(labels, key=labels.__getitem__), min(labels, key=labels.__getitem__)
    rest = f" ({sum(count == labels[least] for count in labels.values())} labels)" if len(labels) > SHOWN else ""
    return [f"labels are uneven: {labels[most]} training rows are {most!r}, {labels[least]} are {least!r}{rest}"]


def _forgotten(config: DataConfig, tokenizer) -> list[str]:
    """Returns what the chat template leaves out of a conversation, found by asking with and without it."""
    if config.task != "chat" or tokenizer is None:
        return []
    import json

    turns = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}, {"role": "user", "content": "Three?"}]
    system = [{"role": "system", "content": "Four."}]
    rows = [{"messages": json.dumps(messages), "response": ""} for messages in (turns, turns[2:], system + turns)]
    try:
        whole, last, with_system = data.prompts_of(rows, config, tokenizer)
    except data.InputError:
        return ["the chat template refuses some conversations (a system message, or turns)"]
    said = ["the chat template leaves out earlier turns"] if whole == last else []
    return said + (["the chat template leaves out the system message"] if whole == with_system else [])
