"""A study in the form of other programs: Optuna's storage, and training files of Axolotl, LLaMA-Factory and TRL.

Owns: `to_optuna`, `to_file`. Must not know: stores, the command line.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo import dialects
from hpo.errors import InputError, Problem
from hpo.objectives import Objective, losses
from hpo.pareto import eligible
from hpo.space import Choice, Float, Int, Space
from hpo.trial import Trial
from training.recipe import DataConfig, Recipe

if TYPE_CHECKING:
    import optuna


def to_optuna(
    name: str, space: Space, objectives: Sequence[Objective], trials: Sequence[Trial], storage: str | None = None
) -> optuna.Study:
    """Returns the study as one of Optuna's, with every trial that has ended; in memory unless a storage is named.

    Complete trials are COMPLETE with their values, stopped ones PRUNED, all others FAIL; our own number, state, origin, error
    and recipe are user attributes. Into a storage that has the study already, only what is new is written.

    Args:
        space: in which the trials lie; one outside it has no parameters there, only its recipe.
        storage: SQLAlchemy URL as Optuna takes it, for example sqlite:///trials.db.

    Raises:
        InputError: the storage cannot be opened, or holds another study of this name.
    """
    import optuna

    directions = [objective.goal for objective in objectives]
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(storage=storage, study_name=name, directions=directions, load_if_exists=True)
        found = [direction.name.lower() for direction in study.directions]
        if found != directions:
            rule = f"has a study {name} with other goals: {', '.join(found)}, and here {', '.join(directions)}."
            raise InputError(Problem(str(storage), rule, "Name another storage."))
        known = {trial.user_attrs.get("number") for trial in study.get_trials(deepcopy=False)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([objective.name for objective in objectives])
        study.add_trials([_trial(t, space, objectives) for t in trials if t.final and t.number not in known])
    except (ImportError, ValueError, optuna.exceptions.StorageInternalError) as error:
        raise InputError(Problem(str(storage), f"cannot be used ({error}).", "For example sqlite:///trials.db.")) from None
    except Exception as error:
        if type(error).__module__.split(".")[0] != "sqlalchemy":
            raise
        said = str(error).splitlines()[0]
        raise InputError(Problem(str(storage), f"cannot be used ({said}).", "For example sqlite:///trials.db.")) from None
    finally:
        optuna.logging.set_verbosity(before)
    return study


def _trial(trial: Trial, space: Space, objectives: Sequence[Objective]) -> optuna.trial.FrozenTrial:
    from optuna.trial import FrozenTrial, TrialState

    inside = space.contains(trial.params)
    done = eligible(trial) and losses(trial, objectives) is not None
    state = TrialState.COMPLETE if done else TrialState.PRUNED if trial.state == "stopped" else TrialState.FAIL
    told = {"number": trial.number, "state": trial.state, "origin": trial.origin, "error": trial.error,
            "recipe": json.dumps(trial.recipe.model_dump(mode="json"))}  # fmt: skip
    began, ended = (datetime.fromtimestamp(at or 0) for at in (trial.started, trial.finished))
    return FrozenTrial(
        number=-1, trial_id=-1, state=state, value=None,
        values=[objective.of(trial.outcome) for objective in objectives] if done else None,
        datetime_start=began, datetime_complete=ended, intermediate_values={}, system_attrs={}, user_attrs=told,
        params=dict(trial.params) if inside else {},
        distributions={n: _distribution(space[n]) for n in trial.params} if inside else {},
    )  # fmt: skip


def _distribution(dimension: Float | Int | Choice) -> optuna.distributions.BaseDistribution:
    import optuna

    if isinstance(dimension, Choice):
        return optuna.distributions.CategoricalDistribution(dimension.values)
    if isinstance(dimension, Int):
        return optuna.distributions.IntDistribution(dimension.low, dimension.high, step=dimension.step, log=dimension.log)
    return optuna.distributions.FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def to_file(program: str, recipe: Recipe, data: DataConfig, path: Path, *, workers: int = 1, title: str = "") -> list[str]:
    """Writes a recipe as a training file of another program; returns what that program cannot say.

    LLaMA-Factory also gets a dataset_info.json, in a folder of the file's own name.

    Raises:
        InputError: the program is not known, or a file is there already.
    """
    from ruamel.yaml import YAML

    if program not in dialects.NAMES:
        raise InputError(Problem("--to", f"must be {', '.join(dialects.NAMES)}, got {program}.", ""))
    out, more, wrong = dialects.write(program, recipe, data, workers=workers)
    info = path.with_suffix("") / "dataset_info.json"
    for file in (path, *([info] if more else [])):
        if file.exists():
            raise InputError(Problem(str(file), "exists.", "Name another file with --out, or remove it."))
    if more:
        info.parent.mkdir(parents=True, exist_ok=True)
        info.write_text(json.dumps(more, indent=2) + "\n", encoding="utf-8")
        out["dataset_dir"] = str(info.parent)
    out |= {"output_dir": f"./{path.stem}-output"}
    yaml = YAML()
    yaml.default_flow_style = False
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f"# {line}\n" for line in [*([title] if title else []), *(f"Not said here: {one}" for one in wrong)])
        yaml.dump(out, file)
    return wrong


__all__: list[Any] = ["to_file", "to_optuna"]
