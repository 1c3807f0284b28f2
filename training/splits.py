"""Three splits that share no row.

Owns: what is held out (by seed, by stratum, by group), and which rows leave because they stand on another side too.
Must not know: files, tokens.

A row (by its `key`) that stands in the test rows is taken out of validation and training, one that stands in validation out
of training, and the counts are kept.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable

from training import duplicates
from training.errors import InputError, Problem, wrong
from training.recipe import DataConfig
from training.rows import SHOWN, Entry, Ledger, text_of

Bag = dict[str, Entry]  # what stays on one side: the first entry of each key


def hold_out(splits: dict[str, list[Entry]], config: DataConfig, seed: int) -> list[str]:
    """Fills in the missing splits from the training rows, in place, without a shared row; returns notes.

    Of a mixture each source gives its share by a seed of its own, so that neither weights nor other sources change it.
    """
    missing = [name for name in ("test", "validation") if name not in splits]
    whole = {origin: list(some) for origin, some in itertools.groupby(splits["train"], lambda entry: entry.origin)}
    splits |= {name: [] for name in (*missing, "train")}
    for origin, entries in whole.items():
        parts = _parted(entries, missing, config, random.Random(f"{seed} {origin}" if origin else seed))
        for name, part in parts.items():
            splits[name] += part
    each = " of each source" if len(whole) > 1 else ""
    return [f"{name}: {len(splits[name])} rows cut from the training rows{each} {how(config)}" for name in missing]


def _parted(entries: list[Entry], missing: list[str], config: DataConfig, rng: random.Random) -> dict[str, list[Entry]]:
    """Returns the entries of one source as train and the missing splits."""
    names = _bag_names(entries, config) if missing else []
    bag_of = {id(entry): name for entry, name in zip(entries, names, strict=bool(missing))}
    parts = {}
    for name in missing:
        bags: dict[object, Bag] = {}
        for entry in entries:
            bags.setdefault(bag_of[id(entry)], {}).setdefault(entry.key, entry)
        chosen = _chosen(list(bags.values()), getattr(config.split, name), config, rng)
        parts[name] = [entry for bag in chosen for entry in bag.values()]
        held = {bag_of[id(next(iter(bag.values())))] for bag in chosen}
        entries = [entry for entry in entries if bag_of[id(entry)] not in held]
    return parts | {"train": entries}


def sketches(entries: list[Entry]) -> list[duplicates.Sketch]:
    """Returns what rows are compared by."""
    return duplicates.sketch([text_of(entry.row) for entry in entries])


def how(config: DataConfig) -> str:
    """Returns in words how rows are held out."""
    by = {"seed": "by seed", "group": f"by groups of {config.split.column}",
          "stratified": f"by seed, stratified by {config.split.column or 'label'}"}[config.split.by]  # fmt: skip
    return by + (", near-duplicates on one side" if config.split.together == "near" else "")


def _bag_names(entries: list[Entry], config: DataConfig) -> list[object]:
    """Returns the name of each entry's bag: entries with the same key, group or near-duplicate cluster share one."""
    links: list[list[object]] = [[("key", entry.key)] for entry in entries]
    if config.split.by == "group":
        for link, entry in zip(links, entries, strict=True):
            link.append(("group", entry.group))
    if config.split.together == "near":
        for link, cluster in zip(links, duplicates.clusters(sketches(entries)), strict=True):
            link.append(("cluster", cluster))
    if all(len(link) == 1 for link in links):
        return [link[0] for link in links]
    parents: dict[object, object] = {}

    def root(name: object) -> object:
        while parents.setdefault(name, name) != name:
            parents[name] = name = parents[parents[name]]
        return name

    for first, *others in links:
        for other in others:
            parents[root(other)] = root(first)
    return [root(link[0]) for link in links]


def _chosen(bags: list[Bag], share: float, config: DataConfig, rng: random.Random) -> list[Bag]:
    if config.split.by != "stratified":
        rng.shuffle(bags)
        return _filled(bags, max(1, round(sum(map(len, bags)) * share)))
    strata: dict[str, list[Bag]] = {}
    for bag in bags:
        first = next(iter(bag.values()))
        strata.setdefault(first.group if first.group is not None else first.row.get("label", ""), []).append(bag)
    wanted = {name: share * sum(map(len, own)) for name, own in strata.items()}
    take = {name: int(value) for name, value in wanted.items()}
    # Largest remainders, so that the shares add up to the whole.
    rest = max(1, round(sum(wanted.values()))) - sum(take.values())
    for name in sorted(wanted, key=lambda name: (take[name] - wanted[name], name))[:rest]:
        take[name] += 1
    chosen = []
    for name in sorted(strata):
        rng.shuffle(strata[name])
        chosen += _filled(strata[name], take[name]) if take[name] else []
    return chosen


def _filled(bags: list[Bag], rows: int) -> list[Bag]:
    """Returns the first bags that together have at most `rows` rows; the smallest one, where all have more."""
    chosen, count = [], 0
    for bag in bags:
        if count + len(bag) <= rows:
            chosen.append(bag)
            count += len(bag)
    return chosen or [min(bags, key=len)] if bags else []


def repeated(entries: list[Entry], config: DataConfig, ledger: Ledger) -> list[Entry]:
    """Returns the training rows without those that `config.clean` says stood there before, exactly or nearly."""
    clean = config.clean
    if clean.repeated != "keep":
        seen: set[tuple] = set()
        again = [entry for entry in entries if (said := _whole(entry)) in seen or seen.add(said)]
        entries = _without(entries, again, "repeated", clean.repeated, "stand in the training rows before", ledger)
    if clean.near_repeated != "keep":
        first = duplicates.clusters(sketches(entries))
        again = [entry for i, entry in enumerate(entries) if first[i] != i]
        entries = _without(entries, again, "near_repeated", clean.near_repeated, "are much like one before", ledger)
    return entries


def _whole(entry: Entry) -> tuple:
    return tuple(value.strip() for value in entry.row.values())


def separate(splits: dict[str, list[Entry]], config: DataConfig, ledger: Ledger) -> list[str]:
    """Takes rows that stand on two sides out of the one that is learned or looked at more, in place; returns notes."""
    notes = []
    for kept, lost in (("test", "validation"), ("test", "train"), ("validation", "train")):
        known = {entry.key for entry in splits[kept]}
        shared = [entry for entry in splits[lost] if entry.key in known]
        splits[lost] = _without(splits[lost], shared, "leak", config.clean.leak, f"also stand in {kept}", ledger, lost)
        if shared:
            notes.append(f"{lost}: {len(shared)} rows left out because they also stand in {kept}")
    if config.clean.near_leak != "keep":
        held = [entry for name in ("test", "validation") for entry in splits[name]]
        found = duplicates.like(sketches(splits["train"]), sketches(held))
        shared = [entry for entry, other in zip(splits["train"], found, strict=True) if other is not None]
        splits["train"] = _without(
            splits["train"], shared, "near_leak", config.clean.near_leak, "are much like a held-out row", ledger
        )
        if shared:
            notes.append(f"train: {len(shared)} rows left out because they are much like a held-out row")
    return notes


def _without(
    entries: list[Entry], lost: Iterable[Entry], kind: str, action: str, what: str, ledger: Ledger, split: str = "train"
) -> list[Entry]:
    lost = list(lost)
    ledger.note(kind, split, what, action, (entry.place for entry in lost))
    if lost and action == "error":
        places = ", ".join(entry.place for entry in lost[:3])
        raise wrong(f"data.{split}", f"{len(lost)} rows {what} ({places}).", f"Remove them, or set data.clean.{kind}: drop.")
    gone = {id(entry) for entry in lost}
    return [entry for entry in entries if id(entry) not in gone] if gone else entries


def labels_of(config: DataConfig, present: dict[str, set[str]]) -> tuple[str, ...]:
    """Returns the labels of a classification task, given those of each split; none of other tasks."""
    if config.task != "classification":
        return ()
    labels = config.labels or tuple(sorted(present["train"]))
    if len(labels) < 2:
        raise wrong("data.labels", f"classification needs two labels, got {list(labels)}.", "Check data.columns.label.")
    for name, some in present.items():
        if strange := some - set(labels):
            raise wrong(
                f"data.{name}", f"labels that are not in data.labels: {sorted(strange)[:SHOWN]}.", "Add them, or remove the rows."
            )
    return labels


def check(origins: dict[str, Iterable[str]], config: DataConfig) -> None:
    """Raises InputError where a split, or a source that training rows should come from, has no row; given the sources of all."""
    remedy = "Give more rows, or a file of its own for this split."
    present = {name: set(some) for name, some in origins.items()}
    found = [Problem(f"data.{name}", "no row is left.", remedy) for name, some in present.items() if not some]
    if present["train"]:
        empty = [name for name in config.origins() if name not in present["train"]]
        found += [Problem(f"data.train.{name}", "no row is left.", remedy) for name in empty]
    if found:
        raise InputError(*found)


def mixed(config: DataConfig, counts: Iterable[tuple[str, int]]) -> list[str]:
    """Returns a note on what training rows are mixed of, given the rows of each source; none where there is one file."""
    weights = {name: origin.weight for name, origin in config.origins().items() if name}
    said = [f"{name} {count} (weight {weights[name]:g})" for name, count in counts if name in weights]
    return [f"train: rows of {', '.join(said)}"] if said else []


def left_out(ledger: Ledger) -> list[str]:
    """Returns notes on the rows that `config.clean` took out."""
    return [f"{f.split}: {f.count} rows left out: {f.what}" for f in ledger.findings
            if f.action == "drop" and f.kind not in ("leak", "near_leak")]  # fmt: skip
