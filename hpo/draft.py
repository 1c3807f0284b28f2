"""From a data file and a model to a study file that runs.

Owns: `draft`, which looks at the rows, the model and this machine. Must not know: stores, runners.
"""

from __future__ import annotations

import json
import os
import random
import re
from dataclasses import dataclass
from pathlib import Path

from hpo import check, spec, written
from hpo.errors import InputError, Problem, SpecError
from training import data as training_data
from training import recommend, tasks
from training.model import Shape, describe, load_tokenizer, match
from training.recipe import Clean, DataConfig, Recipe

NAMED = (training_data.HUB, training_data.EMBEDDED)  # what is no path
FEW_LABELS = 50  # a label column with at most so many values, each seen several times, is a classification task
SAMPLED = 20_000  # rows whose tokens are counted
HEADROOM = 0.9  # of a GPU's memory


@dataclass(frozen=True)
class Draft:
    """The text of a study file and what was noticed on the way."""

    text: str
    notes: tuple[str, ...]


def draft(file: str, model: str, *, name: str | None = None, folder: Path | None = None) -> Draft:
    """Returns a study file for a data file and a model, checked to run.

    Args:
        file: rows as JSONL, JSON, CSV, Parquet or Arrow, a folder with a data set, or `hub:OWNER/NAME`.
        model: `embedded`, a folder or a Hugging Face id.
        name: of the study; default from the file's.
        folder: where the study file will lie; paths are written relative to it.

    Raises:
        InputError: the file or the model cannot be used.
    """
    folder = (folder or Path.cwd()).resolve()
    shape = describe(model)
    config, about = guess(file)
    rows = training_data.read(config)
    tokenizer = load_tokenizer(Recipe(model=model))
    some = random.Random(0).sample(range(len(rows.train)), min(len(rows.train), SAMPLED))
    lengths = sorted(training_data.tokenize((rows.train[i] for i in some), config, tokenizer, 1_000_000).lengths().tolist())
    limit = int(shape.config.get("max_position_embeddings") or shape.config.get("n_positions") or 1_000_000)
    max_length = min(limit, -(-lengths[int(0.995 * (len(lengths) - 1))] // 32) * 32)
    gpus = check.gpus()
    notes = [
        *about,
        f"{len(rows.train)} training, {len(rows.validation)} validation, {len(rows.test)} test rows",
        f"tokens per row: median {lengths[len(lengths) // 2]}, longest {lengths[-1]}; max_length {max_length}",
        *rows.notes,
    ]
    advised = recommend.recommend(
        shape, config.task, rows=len(rows.train), tokens_per_row=max_length, device="cuda" if gpus else "cpu",
        capacity=_gpu_memory() if gpus else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )  # fmt: skip
    all_advice = advised.advice | {"space": advised.space}
    notes += [f"{name}: {advice.value}, because {advice.why}" for name, advice in all_advice.items()]
    if advised.memory is None:
        notes.append(f"this is not predicted to fit into {recommend.FRACTION:.0%} of the memory")
    lines = _lines(_name(name or Path(file).stem), file, model, folder, config, shape, advised, gpus, tokenizer, rows)
    text = "\n".join(lines) + "\n"
    loaded = spec.build(written.parse(text), folder)
    findings = check.inspect(loaded)
    notes.append(f"predicted peak: {findings.memory.total / 1e6:,.0f} MB for the defaults, "
                 f"{findings.smallest / 1e6:,.0f} to {findings.largest / 1e6:,.0f} MB over the space")  # fmt: skip
    return Draft(text, tuple(notes))


def _name(stem: str) -> str:
    name = re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("-._")[:63]
    return name or "study"


def guess(file: str, clean: Clean | None = None) -> tuple[DataConfig, list[str]]:
    """Returns the data configuration that fits the file's columns, and a sentence on why.

    Args:
        file: as in `draft`.
        clean: what to do about rows with a problem; by default they are refused.

    Raises:
        SpecError: no task fits.
    """
    tried: list[Problem] = []
    train = file if file.startswith(NAMED) else str(Path(file).resolve())
    for task in ("chat", "classification", "instruction", "completion"):
        config = DataConfig(train=train, task=task, clean=clean or Clean())
        try:
            rows = training_data.read(config)
        except InputError as error:
            tried += error.problems
            continue
        if task == "classification":
            known = len({row["label"] for row in rows.train})
            if known > FEW_LABELS or known * 3 > len(rows.train) or max(len(label) for label in rows.labels) > 60:
                continue  # long or mostly distinct "labels" are responses
            return config, [f"task classification: {known} labels"]
        return config, [f"task {task}: columns {', '.join(sorted(rows.train[0]))}"]
    wrong = [p for p in tried if "no column" not in p.rule] or tried
    raise SpecError(*dict.fromkeys(wrong))


def _lines(name, file, model, folder, config, shape: Shape, advised, gpus, tokenizer, rows) -> list[str]:
    data = file if file.startswith(NAMED) else os.path.relpath(Path(file).resolve(), folder)
    model_path = os.path.relpath(Path(model).resolve(), folder) if Path(model).is_dir() else model
    if model_path != model and not model_path.startswith("."):
        model_path = f"./{model_path}"
    template = config.template or (None if tokenizer.chat_template else _default_template(config, rows))
    lines = [
        f"# Written by `hpo init`. Look it over, then: hpo check {name}.yaml && hpo run {name}.yaml",
        f"name: {name}",
        "data:",
        f"  train: {_quoted(data)}          # validation and test rows are cut from it by seed; or name files of their own",
        f"  task: {config.task}",
    ]
    if template:
        lines.append(f"  template: {_quoted(template)}")
    else:
        lines.append("  # the prompt is the tokenizer's chat template; `template: ...` would replace it")
    if len(rows.train) > 20_000:
        lines.append("  limit: 20000                # a search needs fewer rows than the final training")
    lines += [
        "recipe:",
        f"  model: {_quoted(model_path)}",
        *(f"  {f'{name}: {_written(advice.value)}':28} # {advice.why}" for name, advice in advised.advice.items()),
        f"# {advised.space.why}",
    ]
    lines += _space(advised.space.value, shape)
    lines += ["objectives: [accuracy, seconds, peak_bytes]", "algorithm: bayes"]
    if gpus:
        memory = _gpu_memory()
        if memory:
            lines.append(f"limits: {{peak_bytes: {int(memory * HEADROOM)}}}   # {HEADROOM:.0%} of the GPU")
        lines += ["budget: {trials: 40}", "resources: {workers: 1, gpus: 1, cpus: 4}"]
    else:
        lines += ["budget: {trials: 20}", "resources: {workers: 1, cpus: 1}"]
    return lines


def _written(value: object) -> str:
    """Returns a value as YAML reads it back: 2e-05 without a point would be text."""
    if isinstance(value, float):
        mantissa, _, exponent = repr(value).partition("e")
        return f"{mantissa if '.' in mantissa else mantissa + '.0'}{'e' + exponent if exponent else ''}"
    return value if isinstance(value, str) else json.dumps(value)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # YAML reads JSON's pairs of surrogates as two characters


def _default_template(config: DataConfig, rows) -> str:
    task = tasks.load(config.task)
    template = task.TEMPLATE
    return template if any(row.get("input") for row in rows.train) else template.replace("{input}\n", "")


def _space(name: str, shape: Shape) -> list[str]:
    """Returns the space of the study: a bundled one, or one written out where the model is too narrow for its ranks."""
    bundled = written.parse(spec.bundled("spaces")[name].read_text())
    if "rank" not in bundled:
        return [f"space: {name}"]
    narrow = min(min(size) for size in match("all-linear", shape).values())
    ranks = [rank for rank in bundled["rank"]["values"] if rank <= narrow]
    if len(ranks) == len(bundled["rank"]["values"]):
        return [f"space: {name}"]
    if narrow < 16:
        raise SpecError(
            Problem(
                "recipe.rank",
                f"the model's narrowest linear layer has {narrow} rows.",
                "Write the study by hand, with rank below it.",
            )
        )
    bundled["rank"]["values"] = ranks
    return ["space:", *(f"  {dimension}: {json.dumps(value)}" for dimension, value in bundled.items())]


def _gpu_memory() -> int | None:
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
