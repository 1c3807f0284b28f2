"""A study as a user writes it.

Owns: `Spec`, reading it by name or path, `--set`, what an existing study may not change. Must not know: stores, runners.

All problems of a file are found at once, each with its path in the file, the rule, the value and the remedy: those of a single
value are pydantic's (`hpo.wording`), those between values are `hpo.coherence`'s.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from hpo import extensions, objectives
from hpo.choosing import Choose
from hpo.coherence import incoherent, touches
from hpo.errors import NotFound, Problem, SpecError, nearest
from hpo.space import LENGTHS, Params, Space, in_recipe
from hpo.verdict import Certify
from hpo.wording import model_at, problem_of
from hpo.written import SIZE_LIMIT, parse, plain, typed
from serving.endpoint import EngineSettings
from serving.endpoint import Limits as ServingLimits
from training import data as training_data
from training import metrics
from training.recipe import DataConfig, EvaluationConfig, Frozen, Limits, Number, Recipe, Resources, Whole, one_of

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
DATABASE = re.compile(r"[a-z0-9]+(\+[a-z0-9_]+)?://.*")


class Algorithm(Frozen):
    """Which search algorithm, with its options."""

    name: str = "bayes"
    options: dict[str, Any] = Field(default_factory=dict)


class Stopping(Frozen):
    """Which rule ends trials that have nothing left to win, with its options."""

    name: Literal["none", "front", "asha", "fixed"] = Field(
        "none", description="front: its optimistic end is dominated; asha: successive halving; fixed: judged at one share"
    )
    options: dict[str, Any] = Field(default_factory=dict)


class Stall(Frozen):
    """The end of a search that finds nothing more."""

    trials: Whole = Field(20, ge=1, le=100_000, description="so many trials in a row")
    gain: Number = Field(0.01, gt=0, le=1, description="that together grew the hypervolume by less than this part of it")


class Prior(Frozen):
    """What is known before the first trial: written as a name or a list of them; see hpo/prior.py."""

    sources: tuple[str, ...] = Field((), description="earlier studies in the same storage, and lora for what is known of LoRA")
    points: tuple[Params, ...] = Field((), description="what came of the sources; written into the record when a study begins")


class Budget(Frozen):
    """How much may be spent. Raising it later continues the study."""

    trials: Whole = Field(20, ge=1, le=100_000)
    hours: Number | None = Field(None, gt=0, description="wall-clock hours over all sessions of the study")
    cost: Number | None = Field(None, gt=0, description="of all trials together, at resources.price")
    stall: Stall | None = Field(None, description="no more trials are started once the hypervolume stopped growing")
    order: Literal["finished", "number"] = Field(
        "finished", description="number: a trial learns only from those `parallel` numbers before it, whatever ends first"
    )
    parallel: Whole | None = Field(None, ge=1, le=1024, description="trials at a time; default: what the cluster can grow to")
    retries: Whole = Field(2, ge=0, le=100, description="how often a trial whose worker died is tried again")


class Promote(Frozen):
    """How the winner becomes a model that may be served."""

    model: str | None = Field(None, description="name on the register; default: the study's")
    rows: Literal["all", "train"] = Field("all", description="what it is retrained on; all adds the validation rows")
    precision: Literal["fp32", "bf16", "fp16"] | None = Field(None, description="that is served; default: the recipe's")
    accuracy: Number = Field(0, ge=0, le=1, description="least accuracy on the test rows; below it a model is not deployed")
    gain: Number = Field(0, ge=-1, le=1, description="the gain over the untuned base must be above this, on the test rows")
    retention: Number | None = Field(
        None, ge=0, description="largest relative rise of the perplexity on evaluation.retention that may be deployed"
    )

    @field_validator("model")
    @classmethod
    def _name(cls, value: str | None) -> str | None:
        if value is not None and not NAME.fullmatch(value):
            raise ValueError("must be 1 to 63 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit")
        return value


class Serving(Frozen):
    """How the model is served."""

    engine: EngineSettings = EngineSettings()
    limits: ServingLimits = ServingLimits()
    filters: str | None = Field(
        None, pattern=r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", description="module:function of a content filter, text -> reason or None"
    )


Keep = Literal["front", "all", "best", "none"]


class Spec(Frozen):
    """One study: what varies, on what, towards what, for how long."""

    name: str
    description: str = ""
    storage: str = Field(
        default_factory=lambda: os.environ.get("HPO_STORAGE", "~/paretune"),
        validate_default=True,
        description="folder that every node sees",
    )
    database: str | None = Field(None, description="SQLAlchemy URL; default: hpo.db in the storage folder")
    data: DataConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    recipe: Recipe = Recipe()
    space: Space
    start: tuple[Params, ...] = Field((), description="points to try after the defaults")
    objectives: tuple[str, ...] = Field(("accuracy", "seconds", "peak_bytes"), min_length=1)
    limits: Limits = Limits()
    algorithm: Algorithm = Algorithm()
    stopping: Stopping = Stopping()
    prior: Prior = Prior()
    budget: Budget = Budget()
    resources: Resources = Resources()
    keep: Keep = Field(
        "front", description="adapters of trials that stay: of the front (and the defaults), all, best (the winner's), none"
    )
    choose: Choose = Choose()
    certify: Certify = Certify()
    promote: Promote = Promote()
    serving: Serving = Serving()
    train: one_of(lambda: ["loop", "simulated"]) = Field(
        "loop", description="loop trains; simulated computes a closed form; or module:function of one's own"
    )
    seed: Whole = Field(0, ge=0, le=2**31 - 1)

    @field_validator("name")
    @classmethod
    def _safe_name(cls, value: str) -> str:
        if not NAME.fullmatch(value):
            raise ValueError("must be 1 to 63 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit")
        if value.startswith("hpo.db"):
            raise ValueError("must not begin with hpo.db, which is the record's own file in the storage folder")
        return value

    @field_validator("storage")
    @classmethod
    def _absolute(cls, value: str) -> str:
        if "://" in value:
            raise ValueError("must be a folder; mount the bucket on every node and name the mount")
        path = _expanded(value)
        if not path.is_absolute() or "\0" in value:
            raise ValueError("must be absolute or begin with ~, because a submitted job runs in a temporary folder")
        return str(path)

    @field_validator("database")
    @classmethod
    def _url(cls, value: str | None) -> str | None:
        if value is not None and not DATABASE.fullmatch(value):
            raise ValueError("must be a SQLAlchemy URL such as postgresql://user@host/name")
        if value is not None and value.startswith("sqlite") and not value.partition("://")[2].startswith("//"):
            raise ValueError("must be an absolute path: four slashes, as in sqlite:////data/hpo.db")
        return value

    @property
    def targets(self) -> tuple[objectives.Objective, ...]:
        """The objectives themselves."""
        return objectives.named(self.objectives, extensions.goals(self), price=self.price)

    @property
    def scoring(self) -> EvaluationConfig:
        """How trials are scored: an objective that is a metric is measured whether or not it is listed as one."""
        listed = self.evaluation.metrics
        more = [name for name in self.objectives if name in metrics.METRICS and name not in listed]
        return self.evaluation.model_copy(update={"metrics": (*listed, *more)})

    @property
    def price(self) -> float | None:
        """Currency units of an hour of one worker: `resources.price` times its devices."""
        price, gpus = self.resources.price, self.resources.gpus
        return None if price is None else price * (gpus or 1)

    @property
    def limits_of_losses(self) -> dict[str, float | None]:
        """The limits by the objective that they are on."""
        return {"peak_bytes": self.limits.peak_bytes, "seconds": self.seconds_limit, "cost": self.limits.cost}

    @property
    def seconds_limit(self) -> float | None:
        """Training seconds that a trial may use, by `limits.seconds` and by `limits.cost`."""
        limits, price = self.limits, self.price
        bought = limits.cost * 3600 / (price * self.resources.workers) if limits.cost is not None and price else None
        return min((value for value in (limits.seconds, bought) if value is not None), default=None)

    @property
    def folder(self) -> Path:
        """Where the study keeps its files."""
        return Path(self.storage) / self.name


@dataclass(frozen=True)
class Loaded:
    """A Spec with what the user wrote (for comparison with an earlier run) and where."""

    spec: Spec
    written: dict[str, Any]
    source: str


def bundled(kind: str) -> dict[str, Path]:
    """Returns name -> file of what ships with the package; kind is `studies` or `spaces`."""
    here = Path(__file__).parent
    installed = {"studies": here / "studies", "spaces": here.parent / "search_spaces"}[kind]
    folder = installed if installed.is_dir() else here.parent / "examples" / "studies"  # a checkout
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load(source: str | Path | Mapping[str, Any], sets: Sequence[str] = (), *, also: Sequence[str] = ()) -> Loaded:
    """Returns a study from a bundled name, a path, or a dict.

    Args:
        source: `quickstart`, `my/study.yaml`, or the parsed content.
        sets: overrides as `path.in.file=value`, the value in YAML.
        also: metrics that were arguments, added to those of the study.

    Raises:
        NotFound: no such bundled study and no such file.
        SpecError: with every problem found.
    """
    folder = Path.cwd()
    if isinstance(source, Mapping):
        raw, where = plain(source), "dict"
    else:
        text, folder, where = _text(source)
        raw = parse(text, where)
    for item in sets:
        _set(raw, item)
    _add_metrics(raw, also)
    written = plain(raw)
    return Loaded(build(raw, folder), written, where)


def _text(source: str | Path) -> tuple[str, Path, str]:
    path = Path(source)
    if _is_file(path):
        if path.stat().st_size > SIZE_LIMIT:
            raise SpecError(
                Problem(str(path), f"is {path.stat().st_size} bytes, over {SIZE_LIMIT}.", "A study file is a few kilobytes.")
            )
        try:
            return path.read_text(encoding="utf-8-sig"), path.resolve().parent, str(path)
        except UnicodeDecodeError as error:
            raise SpecError(Problem(str(path), f"byte {error.start} is not UTF-8.", "Save it as UTF-8.")) from None
    known = bundled("studies")
    if str(source) in known:
        return known[str(source)].read_text(encoding="utf-8"), Path.cwd(), str(source)
    raise NotFound(
        f"No study file and no bundled study {str(source)!r}. {nearest(str(source), known)}Bundled: {', '.join(known)}."
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # longer than a path can be
        return False


def _expanded(value: str) -> Path:
    """Returns a path with variables and ~ replaced; a user that does not exist stays as written."""
    path = Path(os.path.expandvars(value))
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def _set(raw: dict, item: str) -> None:
    path, equals, text = item.partition("=")
    if not equals or not path:
        raise SpecError(Problem(f"--set {item}", "must be path.in.file=value.", "For example --set budget.trials=30."))
    value = typed(text, f"--set {path}") if text else None
    *parents, last = path.split(".")
    for name in parents:
        child = raw.setdefault(name, {})
        if isinstance(child, str) and name in ("space", "algorithm", "stopping"):  # a name stands for a mapping: open it
            child = raw[name] = _space_named(child) if name == "space" else {"name": child}
        if not isinstance(child, dict):
            raise SpecError(Problem(f"--set {item}", f"{name} is no mapping.", "Name a field that exists."))
        raw = child
    if parents == ["recipe"] and last in LENGTHS and value is not None:  # what is said last of a run's length holds
        for other in LENGTHS:
            raw.pop(other, None)
    raw[last] = value


def _add_metrics(raw: dict, also: Sequence[str]) -> None:
    section = raw.setdefault("evaluation", {}) if also else None
    if isinstance(section, dict) and isinstance(listed := section.setdefault("metrics", []), list):
        listed += [name for name in also if name not in listed]


def _space_named(name: str) -> dict:
    known = bundled("spaces")
    if name not in known:
        raise SpecError(
            Problem(
                "space", f"no bundled space {name!r}.", f"{nearest(name, known)}Bundled: {', '.join(known)}; or write it out."
            )
        )
    return parse(known[name].read_text(encoding="utf-8"), f"search_spaces/{name}")


def build(raw: dict[str, Any], folder: Path) -> Spec:
    """Returns the Spec of a parsed study file; relative data and model paths are taken from `folder`.

    Raises:
        SpecError: with every problem found.
    """
    raw = dict(raw)
    found: list[Problem] = []
    for section, model in (("algorithm", Algorithm), ("stopping", Stopping)):
        if isinstance(raw.get(section), str):
            raw[section] = {"name": raw[section]}
        elif isinstance(raw.get(section), dict) and "options" not in raw[section]:
            options = {name: value for name, value in raw[section].items() if name != "name"}
            raw[section] = {"name": raw[section].get("name", model().name), "options": options}
    if isinstance(raw.get("prior"), (str, list)):
        raw["prior"] = {"sources": [raw["prior"]] if isinstance(raw["prior"], str) else raw["prior"]}
    if raw.get("prior", {}) in (None, {"sources": ["none"]}):
        del raw["prior"]
    if isinstance(raw.get("space"), str):
        try:
            raw["space"] = _space_named(raw["space"])
        except SpecError as error:
            found += error.problems
            raw["space"] = {"rank": {"type": "int", "low": 1, "high": 2}}
    for name, dimension in list(raw["space"].items()) if isinstance(raw.get("space"), dict) else []:
        if not in_recipe(name):
            found.append(
                Problem(
                    f"space.{name}",
                    "is no field of a recipe.",
                    nearest(name, Recipe.model_fields).strip() or "See `hpo schema recipe`.",
                )
            )
        if isinstance(dimension, list):
            raw["space"] = raw["space"] | {name: {"type": "choice", "values": dimension}}
    _anchor(raw, folder)
    try:
        spec, broken = Spec.model_validate(raw), frozenset()
    except ValidationError as error:
        said: dict[str, Problem] = {}
        for problem in (problem_of(each, Spec) for each in error.errors(include_url=False)):
            said.setdefault(problem.where, problem)  # a value that fits no member of a union is refused by each of them
        found += said.values()
        spec, broken = _what_is_sound(raw, error)
    # What is sound is checked too, so that the user sees everything at once.
    found += [p for p in (incoherent(spec, broken) if spec else []) if not touches(broken, p.where)]
    if found:
        raise SpecError(*found, sound=spec, broken=broken)
    return spec


def _what_is_sound(raw: dict, error: ValidationError) -> tuple[Spec | None, frozenset[str]]:
    """Returns the study without what is broken, and the paths that were left out: one field, or its section where need be."""
    stand_in = {"name": "stand-in", "data": {"train": "stand-in"}, "space": {"seed": {"type": "int", "low": 0, "high": 1}}}
    places = [tuple(str(part) for part in e["loc"]) for e in error.errors(include_url=False) if e["loc"]]
    for depth in (2, 1):
        broken = frozenset(
            ".".join(place[: depth if model_at(place[:1], Spec) is not Spec and isinstance(raw.get(place[0]), dict) else 1])
            for place in places
        )
        kept = {name: _without(value, name, broken) for name, value in raw.items() if name not in broken}
        try:
            return Spec.model_validate(stand_in | kept), broken
        except ValidationError:
            continue
    return None, broken


def _without(value: Any, section: str, broken: frozenset[str]) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: child for name, child in value.items() if f"{section}.{name}" not in broken}


def _anchor(raw: dict, folder: Path) -> None:
    """Makes relative paths of data files and of a model folder absolute."""
    if isinstance(raw.get("data"), dict):
        raw["data"] = dict(raw["data"])
        for name in ("train", "validation", "test"):
            value = raw["data"].get(name)
            if isinstance(value, dict):  # a mixture
                origins = {source: said for source, said in value.items() if isinstance(said, dict) and "file" in said}
                raw["data"][name] = value | {s: {**said, "file": _placed(said["file"], folder)} for s, said in origins.items()}
            elif name in raw["data"]:
                raw["data"][name] = _placed(value, folder)
    if isinstance(raw.get("recipe"), dict) and isinstance(model := raw["recipe"].get("model"), str):
        expanded = _expanded(model)
        if model and model != "embedded" and (model.startswith((".", "~", "$")) or (folder / expanded).is_dir()):
            raw["recipe"] = raw["recipe"] | {"model": str(folder / expanded)}
    if isinstance(raw.get("evaluation"), dict) and isinstance(text := raw["evaluation"].get("retention"), str):
        if text and not text.startswith((training_data.EMBEDDED, training_data.HUB)):
            raw["evaluation"] = raw["evaluation"] | {"retention": str(folder / _expanded(text))}


def _placed(value: Any, folder: Path) -> Any:
    named = not isinstance(value, str) or not value or value.startswith((training_data.EMBEDDED, training_data.HUB))
    return value if named else str(folder / _expanded(value))


# What an existing study may not change on the way; the rest (budget, resources, evaluation batch, ...) may.
FIXED = ("data", "recipe", "space", "start", "objectives", "limits", "seed", "train", "evaluation")


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Problem]:
    """Returns what a user wrote differently in the parts that an existing study may not change."""

    def walk(path: str, a: Any, b: Any) -> list[Problem]:
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            return [p for name in [*a, *(n for n in b if n not in a)] for p in walk(f"{path}.{name}", a.get(name), b.get(name))]
        if a == b:
            return []
        before, now = ("not written" if value is None else repr(value) for value in (a, b))
        return [Problem(path, f"was {before} and is now {now}.")]

    found = []
    for name in FIXED:
        a, b = old.get(name), new.get(name)
        if isinstance(a, Mapping) or isinstance(b, Mapping):  # a section that was not written has none of its fields
            a, b = ({} if value is None else value for value in (a, b))
        found += walk(name, a, b)
    return found
