"""What would run: the part of a study's checks that looks at the model, the data and the machine. Starts and writes nothing.

Owns: `load`, `inspect` and its `Findings`. Must not know: stores, runners.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hpo import gate
from hpo import spec as specs
from hpo.algorithms.auto import choose
from hpo.coherence import touches
from hpo.errors import InputError, Problem, SpecError
from hpo.space import Params, value_of
from hpo.spec import Loaded, Spec
from training import data as training_data
from training import memory, pace, retention
from training.beside import Seats, refusal, seats, takes
from training.data import Rows, Tokenized
from training.model import Shape, describe, load_tokenizer, match
from training.recipe import Recipe, clashes

NSGA2_PAYS = 300  # trials that nsga2 needs to be ahead of random search (benchmarks/search)
SAMPLED = 200  # random points of the space that the memory prediction is tried on
COMBINATIONS = 4096  # of the space's choices that are looked at, so that a space of many does not delay the start


@dataclass(frozen=True)
class Findings:
    """What was found out about a study without starting anything."""

    spec: Spec
    shape: Shape | None = None
    shapes: dict[str, Shape] = field(default_factory=dict)  # of all models that the space holds, the defaults' included
    longest: dict[str, int] = field(default_factory=dict)  # tokens of the longest training row, by model
    rows: Rows | None = None
    tokens_per_row: int = 0
    trained: pace.Rows | None = None
    seats: Seats | None = None
    cut: int = 0
    memory: memory.Memory | None = None
    smallest: int | None = None
    largest: int | None = None
    refused: float = 0.0
    example: str = ""
    notes: tuple[str, ...] = field(default=())


def load(
    source: str | Path | Mapping[str, Any], sets: Sequence[str] = (), *, trained_elsewhere: bool = False,
    also: Sequence[str] = (),
) -> tuple[Loaded, Findings]:  # fmt: skip
    """Returns a study as it was read, and what was found out about it.

    Args:
        source, sets, also: as `hpo.spec.load`.
        trained_elsewhere: as `inspect`.

    Raises:
        NotFound: no such bundled study and no such file.
        SpecError: with every problem, of the file itself and between it and model, rows and machine.
    """
    try:
        loaded = specs.load(source, sets, also=also)
    except SpecError as error:
        if error.sound is None:
            raise
        beyond, *_ = _look(error.sound, error.broken, trained_elsewhere)
        said = {problem.where for problem in error.problems}
        raise SpecError(*error.problems, *(p for p in beyond if p.where not in said)) from None
    return loaded, inspect(loaded.spec, trained_elsewhere=trained_elsewhere)


def inspect(spec: Spec, *, trained_elsewhere: bool = False) -> Findings:
    """Returns the shape of the model, the rows and what fits.

    Args:
        spec: the study.
        trained_elsewhere: a user's own train function does the training, so model and rows are its affair.

    Raises:
        SpecError: with every problem found.
    """
    found, shapes, rows, tokenized = _look(spec, frozenset(), trained_elsewhere)
    if found:
        raise SpecError(*found)
    return _predict(spec, shapes, rows, tokenized) if rows else Findings(spec, notes=advice(spec))


def advice(spec: Spec) -> tuple[str, ...]:
    """Returns what is to be known of the search algorithm beforehand: why it was chosen, or why another would do better."""
    name, trials = spec.algorithm.name, spec.budget.trials
    if name == "auto":
        chosen, why = choose(spec.space, len(spec.objectives), 0)
        return (f"algorithm: auto takes {chosen}: {why}",)
    if name == "nsga2" and trials < NSGA2_PAYS:
        return (f"nsga2 needs about {NSGA2_PAYS} trials to be ahead of random search, got {trials}: use algorithm: bayes",)
    return ()


def how_trials_run(spec: Spec, recipes: Sequence[Recipe], best: Seats | None = None) -> list[str]:
    """Returns how the trials of a study are run, and which of them cannot be run so, with the reason.

    Args:
        recipes: some of the space.
        best: how many trials one worker should train at a time, where that is known.
    """
    resources, parallel = spec.resources, spec.budget.parallel
    if resources.mode == "local" or spec.train != "loop":
        return []
    if resources.mode == "fresh":
        return ["mode: fresh starts a worker group for each trial"]
    alone = Counter(reason for recipe in recipes if (reason := takes(recipe, resources)))
    if len(recipes) == sum(alone.values()):
        return [f"a worker group is started for each trial: {next(iter(alone))}"]
    said = ["worker groups stay up and take trial after trial"]
    said += [f"{_share(count, recipes)} get a group of their own: {reason}" for reason, count in alone.most_common(3)]
    workers = None if os.environ.get("RAY_ADDRESS") else math.floor((os.cpu_count() or 1) / (resources.cpus or 1))
    chosen = best is not None and not parallel and not resources.seats and resources.mode == "packed"
    if chosen and best.count == 1:
        said[0] += f", one at a time: {best.why}"
    elif resources.mode == "packed" or (parallel and workers and parallel > workers):
        more = f": {parallel} at a time, and {workers} workers here" if parallel and workers else ""
        more = f": {best.why}" if chosen else more
        said[0] += f", several at once in each (packed){more}"
        unpacked = Counter(reason for recipe in recipes if (reason := refusal(recipe)) and not takes(recipe, resources))
        said += [f"{_share(count, recipes)} are trained alone, {reason}" for reason, count in unpacked.most_common(3)]
    return said


def _share(count: int, recipes: Sequence[Recipe]) -> str:
    return f"{100 * count / len(recipes):.0f} % of the trials" if count < len(recipes) else "all trials"


def _look(
    spec: Spec, broken: frozenset[str], trained_elsewhere: bool
) -> tuple[list[Problem], dict[str, Shape], Rows | None, Tokenized | None]:
    """Returns what is wrong between a study and the model, the rows and the machine, and what was read on the way.

    What is `broken` in the file was left out of `spec`, so nothing that would follow from it is looked at.
    """

    def sound(*paths: str) -> bool:
        return not touches(broken, *paths)

    found = [*(_machine(spec) if sound("resources") else ()), *(_storage(spec) if sound("storage") else ())]
    if spec.train != "loop" or trained_elsewhere or not sound("train"):
        return found, {}, None, None
    found += _clashes(spec) if sound("recipe", "space", "start", "resources") else []
    shapes: dict[str, Shape] = {}
    for model in _values(spec, "model") if sound("recipe.model", "recipe.revision", "space.model") else ():
        try:
            shapes[model] = describe(model, spec.recipe.revision)
        except InputError as error:
            found += _placed(error, spec, "model", model)
    for shape in shapes.values() if sound("recipe.targets", "space.targets") else ():
        found += _targets(spec, shape)
    rows = None
    try:
        rows = training_data.read(spec.data) if sound("data") else None
    except InputError as error:
        found += error.problems
    if spec.evaluation.retention is not None and sound("evaluation"):
        try:
            retention.read(spec.evaluation.retention)
        except InputError as error:
            found += error.problems
    if any(stage for stage in _values(spec, "zero_stage")) and importlib.util.find_spec("deepspeed") is None:
        found.append(
            Problem("recipe.zero_stage", "needs DeepSpeed, which is not installed.", "pip install 'paretune[deepspeed]'.")
        )
    shape, tokenized = shapes.get(spec.recipe.model) or next(iter(shapes.values()), None), None
    if shape and rows and sound("recipe.max_length", "space.max_length"):
        try:
            tokenized = _tokenized(spec, rows)
            found += _beyond_context(shape, tokenized)
        except InputError as error:
            found += error.problems
    return found, shapes, rows, tokenized


def _clashes(spec: Spec) -> list[Problem]:
    """Returns what does not go together: in the defaults, in a start, and values of the space with which no point is sound.

    A space that mixes methods may have points that clash beside sound ones: the gate refuses those one by one.
    """
    found = [Problem(f"recipe.{name}", rule, remedy) for name, rule, remedy in clashes(spec.recipe, spec.resources)]
    for i, point in enumerate(spec.start):
        found += [Problem(f"start[{i}]", f"{name}: {rule}", remedy) for name, rule, remedy in _clashes_at(spec, point)]
    sound, refused, points = set(), {}, list(itertools.islice(spec.space.walk(1), COMBINATIONS + 1))
    for point in points if len(points) <= COMBINATIONS else ():
        said = _clashes_at(spec, point)
        values = {(name, value) for name, value in point.items() if spec.space[name].type == "choice"}
        sound |= values if not said else set()
        for name, rule, remedy in said[:1]:
            refused |= {value: (name, rule, remedy) for value in values if value not in refused}
    for (dimension, value), (name, rule, remedy) in refused.items():
        # Where no point at all is sound, the dimension that the rule speaks of is told.
        if (dimension, value) not in sound and (sound or dimension == name):
            found.append(Problem(f"space.{dimension}", f"{value!r} goes with no other value here: {name}: {rule}", remedy))
    return found


def _clashes_at(spec: Spec, point: Params) -> list[tuple[str, str, str]]:
    try:
        return clashes(spec.space.resolve(point, spec.recipe), spec.resources)
    except (KeyError, TypeError, ValueError):  # no recipe at all, which is said already of the file itself
        return []


def _values(spec: Spec, name: str) -> list:
    dimension = spec.space.root.get(name)
    values = [getattr(spec.recipe, name)]
    if dimension is not None:
        values += [
            v for v in (dimension.values if dimension.type == "choice" else (dimension.low, dimension.high)) if v not in values
        ]
    return values


def _machine(spec: Spec) -> list[Problem]:
    """Returns what this machine cannot do, where the study would run on it alone."""
    if os.environ.get("RAY_ADDRESS") or spec.resources.mode == "local":
        return []
    found = []
    need, have = spec.resources.cpus * spec.resources.workers, os.cpu_count() or 1
    if need > have:
        found.append(Problem("resources", f"a trial needs {need:g} CPUs and this machine has {have}.",
                             "Lower resources.workers or resources.cpus, or set RAY_ADDRESS to a cluster."))  # fmt: skip
    if spec.resources.gpus:
        have = gpus()
        if (need := spec.resources.gpus * spec.resources.workers) > have:
            found.append(Problem("resources.gpus", f"a trial needs {need:g} GPUs and this machine has {have}.",
                                 "Set resources.gpus: 0, or RAY_ADDRESS to a cluster."))  # fmt: skip
    return found


def gpus() -> int:
    """Returns the number of NVIDIA GPUs of this machine, without loading torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) if Path("/proc/driver/nvidia/gpus").is_dir() else 0
    return min(present, len([v for v in visible.split(",") if v])) if visible is not None else present


def _storage(spec: Spec) -> list[Problem]:
    """Returns why the storage folder cannot be written, if so; leaves nothing behind."""
    folder = Path(spec.storage)
    made = []
    try:
        for part in [*reversed(folder.parents), folder]:
            if not part.exists():
                part.mkdir()
                made.append(part)
        probe = folder / f".writable.{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        return [Problem("storage", f"{folder} cannot be written ({error.strerror}).", "Name a folder that every node can write.")]
    finally:
        for part in reversed(made):
            part.rmdir()
    return []


def _targets(spec: Spec, shape: Shape) -> list[Problem]:
    found, seen = [], set()
    for targets in _values(spec, "targets"):
        try:
            chosen = match(targets, shape)
        except InputError as error:
            found += _placed(error, spec, "targets", targets)
            continue
        limit = min(min(size) for size in chosen.values())
        for rank in _values(spec, "rank"):
            if rank > limit and rank not in seen:
                seen.add(rank)
                where = "recipe.rank" if rank == spec.recipe.rank else "space.rank"
                narrow = next(name for name, size in chosen.items() if min(size) == limit)
                found.append(
                    Problem(where, f"rank {rank} is beyond the narrowest target, {narrow} ({limit}).", f"Use at most {limit}.")
                )
    return found


def _placed(error: InputError, spec: Spec, field: str, value: object) -> list[Problem]:
    """Returns the problems of a value where the user wrote it: in the space, unless it is the recipe's."""
    where = f"{'recipe' if value == getattr(spec.recipe, field) else 'space'}.{field}"
    return [replace(problem, where=where) for problem in error.problems]


def _beyond_context(shape: Shape, tokenized: Tokenized) -> list[Problem]:
    longest = int(tokenized.lengths().max())
    context = shape.config.get("max_position_embeddings") or shape.config.get("n_positions")
    if not context or longest <= context:
        return []
    rule = f"rows of {longest} tokens are beyond the model's context of {context}."
    return [Problem("recipe.max_length", rule, f"Set recipe.max_length: {context}, which cuts the beginning of long prompts.")]


def _longest(spec: Spec, rows: Rows, models: Iterable[str], tokenized: Tokenized) -> dict[str, int]:
    """Returns the tokens of the longest training row by model: each has a tokenizer of its own."""
    found = {spec.recipe.model: _most(tokenized)}
    for model in models:
        if model not in found:
            other = spec.model_copy(update={"recipe": spec.recipe.model_copy(update={"model": model})})
            found[model] = _most(_tokenized(other, rows))
    return found


def _most(tokenized: Tokenized) -> int:
    return int(tokenized.lengths().max())


def _predict(spec: Spec, shapes: dict[str, Shape], rows: Rows, tokenized: Tokenized) -> Findings:
    lengths = _longest(spec, rows, shapes, tokenized)
    shape, longest = shapes[spec.recipe.model], lengths[spec.recipe.model]
    rng = random.Random(spec.seed)
    totals, refusals, example, recipes = [], 0, "", []
    for _ in range(SAMPLED):
        recipe = spec.space.resolve(spec.space.sample(rng), spec.recipe)
        recipes.append(recipe)
        verdict = gate.judge(recipe, shapes[recipe.model], spec.limits, spec.resources, lengths[recipe.model])
        refusals += verdict.refusal is not None
        example = example or (f"{_brief(recipe, spec)}: {verdict.refusal}" if verdict.refusal else "")
        totals += [verdict.predicted] if verdict.predicted else []
    trained = pace.Rows(len(tokenized), int(tokenized.lengths().sum()))
    device = "cuda" if spec.resources.gpus else "cpu"
    usual = memory.predict(spec.recipe, shape, workers=spec.resources.workers, tokens_per_row=longest, device=device)
    best = seats(spec.recipe, shape, trained.mean, spec.resources, memory=usual, room=spec.limits.peak_bytes)
    notes = [*advice(spec), *how_trials_run(spec, recipes, best), *rows.notes]
    if tokenized.cut:
        notes.append(
            f"{tokenized.cut} of {len(tokenized)} training prompts are longer than recipe.max_length and lose their "
            f"{'end' if spec.data.too_long == 'cut_end' else 'beginning'}"
        )
    if tokenized.dropped:
        notes.append(f"{tokenized.dropped} training rows are longer than recipe.max_length and left out")
    return Findings(
        spec=spec, shape=shape, shapes=shapes, longest=lengths, rows=rows, tokens_per_row=longest, cut=tokenized.cut,
        trained=trained, seats=best, memory=usual,
        smallest=min(totals, default=None), largest=max(totals, default=None), refused=refusals / SAMPLED, example=example,
        notes=tuple(notes),
    )  # fmt: skip


def _brief(recipe: Recipe, spec: Spec) -> str:
    return ", ".join(f"{name} {value_of(recipe, name)}" for name in spec.space)


def _tokenized(spec: Spec, rows: Rows) -> Tokenized:
    try:
        tokenizer = load_tokenizer(spec.recipe)
    except (OSError, ValueError) as error:  # what transformers raises where the tokenizer's files are missing or unknown
        first = (str(error).splitlines() or [""])[0][:200]
        problem = Problem(
            "recipe.model", f"{spec.recipe.model} has no tokenizer that loads: {first}", "Download the model again."
        )
        raise SpecError(problem) from None
    if rows.large:  # into the cache that the trials read from
        return training_data.prepare(rows, spec.data, tokenizer, spec.recipe.max_length).train
    return training_data.tokenize(rows.train, spec.data, tokenizer, spec.recipe.max_length)
