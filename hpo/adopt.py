"""From a training file of Axolotl, LLaMA-Factory or TRL to a study file.

Owns: `adopt`. Must not know: how their keys are called (dialects), stores, runners.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpo import dialects, spec, written
from hpo.dialects import Foreign
from hpo.errors import InputError, Problem
from training.model import describe
from training.recommend import SMALL

NOWHERE = "path/to/rows.jsonl"
PROGRAMS = {"axolotl": "Axolotl", "llamafactory": "LLaMA-Factory", "trl": "TRL"}


@dataclass(frozen=True)
class Adopted:
    """The text of a study file, what was concluded, and the keys without a counterpart as (key, value, what to do)."""

    text: str
    notes: tuple[str, ...]
    left: tuple[tuple[str, Any, str], ...]


def adopt(path: str | Path, *, name: str | None = None, folder: Path | None = None) -> Adopted:
    """Returns a study file whose defaults, the first trial, are what another program's file says.

    Args:
        path: YAML or JSON of Axolotl, LLaMA-Factory (train), or TRL (`trl sft --config`).
        name: of the study; default from the file's.
        folder: where the study file will lie; paths are written relative to it.

    Raises:
        InputError: no such file, not one of these programs', or a value that no recipe can have.
    """
    path, folder = Path(path), (folder or Path.cwd()).resolve()
    try:
        raw = written.parse(path.read_text(encoding="utf-8-sig"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(Problem("--from", f"{path} cannot be read ({error}).", "Name a YAML file.")) from None
    found = dialects.read(raw, registry=_registry(raw, path.parent))
    title = _name(name or path.stem)
    text = "\n".join(_lines(found, title, path, folder)) + "\n"
    spec.build(written.parse(text), folder)
    return Adopted(text, (f"a file of {PROGRAMS[found.program]}", *found.notes), found.left)


def _name(stem: str) -> str:
    kept = "".join(c if c.isalnum() or c in "._-" else "-" for c in stem.lower()).strip("-._")[:63]
    return kept or "study"


def _registry(raw: Mapping[str, Any], here: Path) -> dict[str, Any]:
    folder = str(raw.get("dataset_dir") or "data")
    for base in (Path.cwd(), here):
        try:
            return json.loads((base / folder / "dataset_info.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
    return {}


def _lines(found: Foreign, title: str, path: Path, folder: Path) -> list[str]:
    data = {"train": NOWHERE} | found.data
    for side in ("train", "validation"):
        if (source := data.get(side)) and not source.startswith(("hub:", "embedded:")) and source != NOWHERE:
            data[side] = os.path.relpath(Path(source).expanduser().resolve(), folder)
    lines = [f"# Written by `hpo init --from {path.name}`. Look it over, then: hpo check {title}.yaml && hpo run {title}.yaml",
             f"name: {title}", "data:"]  # fmt: skip
    lines += [f"  {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in data.items()]
    lines.append("recipe:          # the first trial: what the file says")
    lines += [f"  {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in found.recipe.items()]
    gpu = found.recipe.get("model") != "embedded" and not _small(found.recipe)
    lines += [*_space(found.recipe, gpu), "objectives: [accuracy, seconds, peak_bytes]", "algorithm: bayes",
              f"budget: {{trials: {40 if gpu else 20}}}",
              "resources: {workers: 1, gpus: 1, cpus: 4}" if gpu else "resources: {workers: 1, cpus: 1}"]  # fmt: skip
    if found.left:
        lines += ["", f"# Keys of {path.name} that have no counterpart here, and what to do:"]
        shown = [(key, json.dumps(value, ensure_ascii=False, default=str)[:60], what) for key, value, what in found.left]
        lines += [f"#   {key}: {value}  - {what}" for key, value, what in shown]
    return lines


def _small(recipe: Mapping[str, Any]) -> bool:
    try:
        return describe(recipe["model"], recipe.get("revision")).parameters < SMALL
    except (InputError, KeyError):
        return False  # not at hand, so it is one of the hub's


def _space(recipe: Mapping[str, Any], gpu: bool) -> list[str]:
    """Returns what is to vary: a bundled space, without what this recipe cannot have."""
    name = "tiny" if not gpu else "qlora" if recipe.get("bits") == 4 else "lora"
    varied = written.parse(spec.bundled("spaces")[name].read_text(encoding="utf-8"))
    if recipe.get("adapter") == "full":
        rate = recipe["learning_rate"]
        varied = {"learning_rate": {"type": "float", "low": rate / 10, "high": rate * 10, "log": True},
                  "batch_size": varied["batch_size"], "epochs": varied["epochs"]}  # fmt: skip
    elif name == "lora" and recipe.get("bits") != 16:
        varied.pop("bits", None)
    else:
        return [f"space: {name}"]
    return ["space:", *(f"  {key}: {json.dumps(value)}" for key, value in varied.items())]


__all__ = ["Adopted", "adopt"]
