"""A study file, and everything that can be wrong with it.

Owns: `Spec`, reading it from YAML by name or path, `--set`, the checks that need no model, no data and no cluster.
Must not know: stores, runners.

All problems of a file are found at once, each with its path in the file, the rule, the value and the remedy.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator

from hpo import algorithms, choosing, extensions, objectives, stopping
from hpo.choosing import Choose
from hpo.errors import NotFound, Problem, SpecError, nearest, rule_of
from hpo.space import LENGTHS, Params, Space, in_recipe, problems
from hpo.verdict import Certify
from serving.endpoint import EngineSettings
from serving.endpoint import Limits as ServingLimits
from training import data as training_data
from training import metrics
from training.recipe import DataConfig, EvaluationConfig, Frozen, Limits, Number, Origin, Recipe, Resources, Whole, one_of

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
DATABASE = re.compile(r"[a-z0-9]+(\+[a-z0-9_]+)?://.*")
SIZE_LIMIT = 262_144  # bytes of a study file; a parser in Python takes seconds for more
NODE_LIMIT = 20_000  # values in a study file, aliases counted as often as they are used
DEPTH_LIMIT = 50  # mappings and lists inside one another
GRID_LIMIT = 100_000


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


# What an existing study may not change on the way; the rest (budget, resources, evaluation batch, ...) may.
FIXED = ("data", "recipe", "space", "start", "objectives", "limits", "seed", "train", "evaluation")


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
        raw, where = _plain(source), "dict"
    else:
        text, folder, where = _text(source)
        raw = parse(text, where)
    for item in sets:
        _set(raw, item)
    _add_metrics(raw, also)
    written = _plain(raw)
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


def parse(text: str, where: str = "study") -> dict[str, Any]:
    """Returns the YAML 1.2 mapping in a text, as plain Python; tags that build objects and duplicate keys are refused."""
    raw = _yaml(text, where)
    if not isinstance(raw, dict):
        shown = "nothing" if raw is None else "a list" if isinstance(raw, list) else "one value"
        raise SpecError(Problem(where, f"must be a mapping of fields, got {shown}.", "Begin with `name: my-study`."))
    return raw


def _yaml(text: str, where: str) -> Any:
    from ruamel.yaml import YAML, YAMLError

    yaml = YAML(typ="safe", pure=True)
    yaml.allow_duplicate_keys = False
    try:
        raw = yaml.load(text)
    except (YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        at = f"{where}:{mark.line + 1}" if mark else where
        said = (getattr(error, "problem", None) or str(error).split("\n")[0]).strip()
        if isinstance(error, RecursionError):
            said = f"nested more than {DEPTH_LIMIT} levels deep"
        elif said.startswith("Exceeds the limit"):
            said = "a number has more than 4300 digits"
        raise SpecError(Problem(at, f"is not valid YAML: {said}.", _yaml_remedy(said, where))) from None
    if _nodes(raw, NODE_LIMIT, DEPTH_LIMIT, where) <= 0:
        raise SpecError(Problem(where, f"has more than {NODE_LIMIT} values.", "Use fewer aliases and shorter lists."))
    return _plain(raw)


def _yaml_remedy(said: str, where: str) -> str:
    remedies = {"tag": "Write plain values; nothing is built from tags.", "duplicate": "Keep one of the two.",
                "'\\t'": "Indent with spaces.", "another document": "Write one study per file.",
                "levels deep": "A study file needs three or four.", "digits": "Write a smaller number."}  # fmt: skip
    other = "The value is YAML, as in the file." if where.startswith("--set") else "Look at the line, and the one before it."
    return next((remedy for word, remedy in remedies.items() if word in said), other)


def _nodes(value: Any, left: int, depth: int, where: str) -> int:
    """Returns how many more values there may be; an alias inside what it stands for is endlessly deep."""
    if depth < 0:
        raise SpecError(Problem(where, f"is nested more than {DEPTH_LIMIT} levels deep.", _yaml_remedy("levels deep", where)))
    left -= 1
    children = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    for child in children:
        if left <= 0:
            return left
        left = _nodes(child, left, depth - 1, where)
    return left


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(child) for name, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(child) for child in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


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
    value = _yaml(text, f"--set {path}") if text else None
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


def value_of(text: str, where: str) -> Any:
    """Returns a value that was typed for a field, as YAML reads it, and numbers as people write them (1e-4)."""
    value = _yaml(text, f"--set {where}") if text else None
    try:
        return float(value) if isinstance(value, str) and value[:1].isdigit() else value
    except ValueError:
        return value


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
        for problem in map(_problem, error.errors(include_url=False)):
            said.setdefault(problem.where, problem)  # a value that fits no member of a union is refused by each of them
        found += said.values()
        spec, broken = _what_is_sound(raw, error)
    # What is sound is checked too, so that the user sees everything at once.
    found += [p for p in (_cross_checks(spec, broken) if spec else []) if not touches(broken, p.where)]
    if found:
        raise SpecError(*found, sound=spec, broken=broken)
    return spec


def recheck(spec: Spec) -> list[Problem]:
    """Returns what is wrong with a study that was changed after it was read."""
    return _cross_checks(spec)


def touches(broken: Iterable[str], *paths: str) -> bool:
    """Says whether one of the paths lies in what is broken, or holds some of it."""
    parts = [re.split(r"[.\[]", path) for path in paths]
    return any(a[: len(b)] == b[: len(a)] for path in broken for a in [path.split(".")] for b in parts)


def _what_is_sound(raw: dict, error: ValidationError) -> tuple[Spec | None, frozenset[str]]:
    """Returns the study without what is broken, and the paths that were left out: one field, or its section where need be."""
    stand_in = {"name": "stand-in", "data": {"train": "stand-in"}, "space": {"seed": {"type": "int", "low": 0, "high": 1}}}
    places = [tuple(str(part) for part in e["loc"]) for e in error.errors(include_url=False) if e["loc"]]
    for depth in (2, 1):
        broken = frozenset(
            ".".join(place[: depth if _model_at(place[:1]) is not Spec and isinstance(raw.get(place[0]), dict) else 1])
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


def _model_at(path: Sequence[str | int]) -> type[BaseModel]:
    """Returns the model of the section that a place lies in, as deep as there are sections."""
    model: type[BaseModel] = Spec
    for part in path:
        found = model.model_fields.get(str(part))
        if found is None or not (isinstance(found.annotation, type) and issubclass(found.annotation, BaseModel)):
            break
        model = found.annotation
    return model


# The members of the unions that a study file has, as pydantic names them in the place of an error.
_MEMBERS = {"bool", "int", "float", "str", "choice", "tuple[str, ...]", "tuple[union[bool,int,float,str], ...]"}
_DIMENSION = ["type", "low", "high", "log", "step", "values", "times", "when"]


def _problem(error: Any) -> Problem:
    """Returns a pydantic error in our words: path, rule with the value, remedy."""
    members = [i for i, part in enumerate(error["loc"]) if part in _MEMBERS and i and error["loc"][0] not in ("data",)]
    forms = [2] if error["loc"][:2] == ("data", "train") else []  # a file's name, or a mixture
    path = [part for i, part in enumerate(error["loc"]) if i not in members and i not in forms]
    path = path[:2] if path[:2] == ["recipe", "targets"] else path
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".") or "study"
    kind, value = error["type"], error.get("input")
    if path[-1] == "[key]":
        rule = "must be a name of letters, digits, - and _, 40 at most."
        return Problem(where.removesuffix(".[key]"), rule, "Give the source another name.")
    if kind == "extra_forbidden":
        known = list(_model_at(path[:-1]).model_fields) if path[0] != "space" or len(path) == 1 else _DIMENSION
        known = list(Origin.model_fields) if forms else known
        return Problem(where, "unknown field.", nearest(str(path[-1]), known).strip() or f"Known: {', '.join(known)}.")
    if kind == "missing":
        return Problem(where, "is required.", _example(path))
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        written = value.get("type") if isinstance(value, dict) else None
        shown = f", got {written!r}" if written is not None else ""
        hint = nearest(str(written), ("float", "int", "choice"))
        return Problem(f"{where}.type", f"must be float, int or choice{shown}.", f"{hint}{_example(path)}")
    rule = rule_of(error)
    if path[:2] == ["recipe", "targets"]:
        rule = "must be a name or a list of names"
    elif members and path[0] != "space" or len(members) > 1:
        rule = "must be a finite number, text, true or false"
    shown = "" if ", got " in rule or isinstance(value, (dict, list)) else f", got {'nothing' if value is None else repr(value)}"
    expected = error.get("ctx", {}).get("expected", "")
    hint = nearest(value, re.findall(r"'([^']+)'", str(expected))) if isinstance(value, str) else ""
    return Problem(where, f"{rule}{shown}.", hint.strip() or (_example(path) if "mapping" in rule or "list" in rule else ""))


def _example(path: Sequence[str | int]) -> str:
    if path[0] == "space" and len(path) > 1:
        return "For example {type: choice, values: [8, 16]} or {type: float, low: 1.0e-4, high: 1.0e-2, log: true}."
    return _EXAMPLES.get(".".join(str(part) for part in path), "")


_EXAMPLES = {
    "name": "For example name: my-study.",
    "data": "For example data: {train: my.jsonl}.",
    "data.train": "Name a JSONL or CSV file, or several: {code: {file: a.jsonl, weight: 2}, chat: {file: b.jsonl}}.",
    "data.columns": "For example columns: {instruction: question}.",
    "data.labels": "For example labels: [yes, no].",
    "recipe": "For example recipe: {rank: 16}.",
    "recipe.targets": "For example targets: all-linear.",
    "space": "Name a bundled space (space: lora) or write one out.",
    "start": "For example start: [{rank: 8}], with every dimension of the space.",
    "objectives": "For example objectives: [accuracy, seconds].",
    "algorithm": "For example algorithm: bayes.",
    "prior": "For example prior: [an-earlier-study, lora].",
    "stopping": "For example stopping: front.",
    "budget": "For example budget: {trials: 30}.",
    "resources": "For example resources: {workers: 1}.",
    "evaluation": "For example evaluation: {rows: 200}.",
    "evaluation.metrics": "For example metrics: [perplexity, rouge_l].",
    "limits": "For example limits: {peak_bytes: 8000000000}.",
    "choose": "For example choose: {by: knee}.",
    "certify": "For example certify: {extra: 0.3}.",
    "promote": "For example promote: {accuracy: 0.9}.",
    "serving": "For example serving: {engine: {replicas: 2}}.",
}


def _mix_problems(spec: Spec) -> list[Problem]:
    """Returns which weights of a recipe or a space belong to no source of the data."""
    known = [name for name in spec.data.origins() if name]
    given = {f"recipe.mix.{name}": name for name in spec.recipe.mix or {}}
    given |= {f"space.{name}": name.removeprefix("mix.") for name in spec.space if name.startswith("mix.")}
    sources = f"Sources: {', '.join(known)}." if known else "Write data.train: {NAME: {file: ..., weight: ...}, ...}."
    return [Problem(where, f"{name!r} is no source of data.train.", f"{nearest(name, known)}{sources}")
            for where, name in given.items() if name not in known]  # fmt: skip


def _cross_checks(spec: Spec, broken: frozenset[str] = frozenset()) -> list[Problem]:
    wrong = problems(spec.space, spec.recipe)
    if touches(broken, "space"):  # what a dimension refers to may be what was left out
        wrong = [(where, said) for where, said in wrong if not re.search(r"\.(when|times)\b", where)]
    found = [Problem(f"space.{where}", f"{_plainly(said)}.", _remedy(spec, where)) for where, said in wrong]
    if not len(spec.space):
        found.append(Problem("space", "has no dimension.", "Name at least one field of the recipe with its range."))
    own_problems = extensions.problems(spec)
    found += own_problems + ([] if touches(broken, "data.train") else _mix_problems(spec))
    if not any(problem.where == "data.task" for problem in own_problems):
        found += training_data.template_problems(spec.data)
    found += _objective_problems(spec)
    found += choosing.problems(spec.choose, spec.objectives) if not touches(broken, "choose", "objectives") else []
    found += _algorithm_problems(spec)
    said = stopping.check_options(spec.stopping.name, spec.stopping.options)
    found += [Problem(f"stopping.{option}", f"{rule}.", "") for option, rule in said]
    for i, point in enumerate(() if touches(broken, "space") else spec.start):
        found += _start_problems(spec, f"start[{i}]", point)
    workers = spec.resources.workers
    for value in () if touches(broken, "recipe.batch_size", "space.batch_size") else _values(spec, "batch_size"):
        if value % workers:
            found.append(
                Problem("resources.workers", f"must divide batch_size, got {workers} and {value}.", "Change one of them.")
            )
            break
    if workers > 1 and spec.resources.mode == "local" and spec.train == "loop":
        found.append(
            Problem("resources.workers", f"must be 1 with mode: local, which trains in one process, got {workers}.",
                    "Leave mode out, or workers.")
        )  # fmt: skip
    if spec.budget.order == "number" and spec.budget.parallel is None:
        rule = "is needed with order: number, and must stay the same from machine to machine."
        found.append(Problem("budget.parallel", rule, "Set it to the trials that are to run at a time."))
    for where, asked in (("limits.cost", spec.limits.cost is not None), ("budget.cost", spec.budget.cost is not None),
                         ("objectives", "cost" in spec.objectives)):  # fmt: skip
        if asked and spec.resources.price is None:
            rule = "cost is asked for, and nothing says what an hour costs."
            found.append(Problem(where, rule, "Set resources.price, in currency units per device hour."))
    return found


def _plainly(said: str) -> str:
    said = said.replace("input should be", "must be")
    return said.replace("a valid integer, got a number with a fractional part", "a whole number")


def _remedy(spec: Spec, where: str) -> str:
    """Returns the remedy for a dimension that does not fit, where it can be told from the place."""
    name, _, part = where.partition(".")
    if part == "times" and spec.space[name].times not in Recipe.model_fields:
        return nearest(spec.space[name].times, Recipe.model_fields).strip() or "For example times: rank."
    if part.startswith("when"):
        choices = [other for other, d in spec.space.items() if d.type == "choice" and not d.when and other != name]
        return f"Choices of this space: {', '.join(choices)}." if choices else "This space has no choice to depend on."
    if part == "type":
        return "Use type: int, or type: choice."
    return "See `hpo schema recipe`." if part else ""


def _start_problems(spec: Spec, where: str, point: Params) -> list[Problem]:
    found = []
    for name, value in point.items():
        if name not in spec.space.root:
            hint = nearest(name, spec.space).strip() or f"Dimensions: {', '.join(spec.space)}."
            found.append(Problem(f"{where}.{name}", "is no dimension of the space.", hint))
        elif not spec.space[name].contains(value):
            dimension = spec.space[name]
            known = f"one of {list(dimension.values)}" if dimension.type == "choice" else f"{dimension.low} to {dimension.high}"
            known += f", to be multiplied by {dimension.times}" if dimension.times else ""
            found.append(Problem(f"{where}.{name}", f"lies outside the space, got {value!r}.", f"Give {known}."))
    active = spec.space.active(point)
    if missing := [name for name in active if name not in point]:
        found.append(Problem(where, f"lacks {', '.join(missing)}.", "Give a value for every dimension."))
    if idle := [name for name in point if name in spec.space.root and name not in active]:
        found.append(Problem(where, f"has {', '.join(idle)}, which do not exist at this point.", "Leave them out."))
    return found


def _values(spec: Spec, field: str) -> list[Any]:
    """Returns the values that a field can take: those of its dimension (ends, for a range) and the default."""
    values = [getattr(spec.recipe, field)]
    if (dimension := spec.space.root.get(field)) is not None:
        # Of a range the second value too: the ends may share a divisor that the rest does not.
        ends = (dimension.low, dimension.low + _step(dimension), dimension.high) if dimension.type != "choice" else ()
        values += ends or dimension.values
    return [value for value in values if value is not None]


def _step(dimension: Any) -> int:
    return dimension.step if dimension.type == "int" else 0


def _objective_problems(spec: Spec) -> list[Problem]:
    found, known = [], extensions.scores(spec)
    for i, name in enumerate(spec.objectives):
        if name not in known:
            found.append(Problem(f"objectives[{i}]", f"unknown objective {name!r}.",
                                 f"{nearest(name, known)}Known: {', '.join(known)}."))  # fmt: skip
    if len(set(spec.objectives)) < len(spec.objectives):
        found.append(Problem("objectives", f"must differ, got {list(spec.objectives)}.", "Remove the repeated one."))
    return found


def _algorithm_problems(spec: Spec) -> list[Problem]:
    name, options = spec.algorithm.name, spec.algorithm.options
    if name not in algorithms.names():
        return [
            Problem(
                "algorithm",
                f"unknown algorithm {name!r}.",
                f"{nearest(name, algorithms.names())}Known: {', '.join(algorithms.names())}.",
            )
        ]
    found = [Problem(f"algorithm.{option}", f"{said}.", "") for option, said in algorithms.check_options(name, options)]
    if name == "nsga2" and len(spec.objectives) < 2:
        found.append(
            Problem("objectives", f"nsga2 needs at least two, got {list(spec.objectives)}.", "Add one, or use algorithm: bayes.")
        )
    if name == "grid" and not found:
        levels = options.get("levels", algorithms.defaults("grid")["levels"])
        # Counted no further than needed, however large the grid is.
        size = sum(1 for _ in itertools.islice(spec.space.walk(levels), GRID_LIMIT))
        if size > spec.budget.trials:
            more = "+" if size == GRID_LIMIT else ""
            found.append(Problem("budget.trials", f"the grid has {size}{more} points, over {spec.budget.trials} trials.",
                                 "Raise budget.trials, lower algorithm.levels, or use algorithm: bayes."))  # fmt: skip
    return found


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
