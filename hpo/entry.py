"""How a study comes onto the record, or goes on from there: what may change, its own copy of the rows, what they are like.

Owns: `enter`, `continued`, `snapshot`, `quality_of`. Must not know: how trials run, doors.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

from hpo import prior
from hpo import spec as specs
from hpo.errors import NotFound, Problem, StudyChanged
from hpo.spec import Loaded, Spec
from hpo.store import Record, Store
from training import retention, sources
from training.recipe import DataConfig


def enter(store: Store, loaded: Loaded, digest: str, hidden: int | None = None) -> tuple[Record, DataConfig]:
    """Adds the study to the record, or finds it there unchanged; returns it with its own copy of the rows."""
    spec = loaded.spec
    try:
        old = store.study(spec.name)
    except NotFound:
        old = None
    if old is not None:
        with store.hold(old.id):
            pass  # whoever is refused because the study is being run must not have changed its record
        spec = continued(old, loaded, digest)
    elif spec.prior.sources:
        spec = spec.model_copy(update={"prior": _known_before(store, spec, hidden)})
    data = snapshot(spec, digest) if digest else spec.data
    spec = _with_general_text(spec) if digest else spec
    return store.add_study(spec, loaded.written, digest), data


def _known_before(store: Store, spec: Spec, hidden: int | None) -> specs.Prior:
    """Returns the prior with its points, which stay what they are whatever becomes of the studies they are from."""
    earlier = [store.trials(store.study(name).id) for name in spec.prior.sources if name != prior.LORA]
    found = prior.points(
        spec.space, spec.targets, spec.recipe, earlier,
        limit=prior.count(spec.budget.trials), lora=prior.LORA in spec.prior.sources, hidden=hidden,
    )  # fmt: skip
    return spec.prior.model_copy(update={"points": tuple(found)})


def continued(old: Record, loaded: Loaded, digest: str) -> Spec:
    """Returns the Spec to continue with: what may not change from the record, the rest as it is now.

    Raises:
        StudyChanged: with each difference in what may not change. Writing a default out is no change.
    """
    same = {name for name in specs.FIXED if name != "data" and _fixed(old.spec, name) == _fixed(loaded.spec, name)}
    changed = specs.changes(_without_paths(old.written), _without_paths(loaded.written))
    found = [p for p in changed if p.where.partition(".")[0] not in same or p.where == "recipe.model"]
    if old.digest != digest:
        found.append(Problem("data", f"the rows have changed (SHA-256 {old.digest[:12]} is now {digest[:12]}).", ""))
    if found:
        rule = "is an existing study, and this may not change on the way."
        raise StudyChanged(*found, Problem(loaded.spec.name, rule, "Give it another name, or undo the change."))
    fixed = {name: getattr(old.spec, name) for name in specs.FIXED if name != "data"}
    fixed["recipe"] = old.spec.recipe.model_copy(update={"model": loaded.spec.recipe.model})
    fixed["prior"] = old.spec.prior  # it was what was known before the first trial
    fixed["evaluation"] = old.spec.evaluation.model_copy(
        update={name: getattr(loaded.spec.evaluation, name) for name in FREE["evaluation"]}
    )
    return loaded.spec.model_copy(update=fixed)


# A model's folder may be found elsewhere each time (what was written for it is compared); how many rows are scored at once
# changes no score of a trial, nor does the general text.
FREE = {"recipe": {"model"}, "evaluation": {"batch_size", "retention"}}


def _fixed(spec: Spec, name: str) -> Any:
    value, free = getattr(spec, name), FREE.get(name)
    return value.model_dump(exclude=free) if free else value


def _without_paths(written: Mapping[str, Any]) -> dict[str, Any]:
    # A submitted job finds its files in another folder each time; the rows themselves are compared by their digest.
    data = {name: value for name, value in written.get("data", {}).items() if name not in ("train", "validation", "test")}
    return {**written, "data": data}


def snapshot(spec: Spec, digest: str) -> DataConfig:
    """Copies the data files (of folders and the hub: their rows) into the study's folder, where every node sees them."""
    folder = spec.folder / "data" / digest[:16]
    update: dict[str, Any] = {}
    for name in ("train", "validation", "test"):
        for source, origin in spec.data.origins(name).items():
            where, called = (f"data.{name}.{source}", f"{name}-{source}") if source else (f"data.{name}", name)
            kept = str(sources.keep(origin.file, name, where, folder, called=called))
            update[name] = kept if not source else update.get(name, {}) | {source: origin.model_copy(update={"file": kept})}
    return spec.data.model_copy(update=update)


def _with_general_text(spec: Spec) -> Spec:
    """Copies the general text into the study's folder, where every node sees it, and names the copy."""
    if (given := spec.evaluation.retention) is None:
        return spec
    name = hashlib.sha256("\n".join(retention.read(given)).encode()).hexdigest()[:16]
    kept = str(sources.keep(given, "train", "evaluation.retention", spec.folder / "data" / name))
    return spec.model_copy(update={"evaluation": spec.evaluation.model_copy(update={"retention": kept})})


def keep_quality(spec: Spec, digest: str) -> None:
    """Writes what the rows are like into the study's folder, once for each state of the rows."""
    from training import quality
    from training.model import load_tokenizer

    known = quality_of(spec)
    if not digest or (known is not None and known.digest == digest):
        return
    found = quality.examine(spec.data, tokenizer=load_tokenizer(spec.recipe), max_length=spec.recipe.max_length)
    spec.folder.mkdir(parents=True, exist_ok=True)
    aside = spec.folder / f".quality.{os.getpid()}.json"
    aside.write_text(found.model_dump_json(indent=1), encoding="utf-8")
    aside.rename(spec.folder / "quality.json")


def quality_of(spec: Spec):
    """Returns what the rows are like, as it was kept; None for a study from before this was looked at."""
    from training.quality import Quality

    try:
        return Quality.model_validate_json((spec.folder / "quality.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
