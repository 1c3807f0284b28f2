"""Everything that can end a call into hpo, as one tree.

InputError (training.errors)      the user's mistake: where, rule, value, remedy; exit code 2
HpoError
+- SpecError (also InputError)    a study file that cannot run, with all its problems
+- NotFound                       no such study, trial or bundled file
+- StudyChanged                   the same name with another space, data, model or objectives
+- StudyBusy                      another live process runs this study
+- StoreError                     the database cannot be opened, read or written
+- BackendError                   Ray did not do what the study needs
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from training.errors import InputError, Problem


class HpoError(Exception):
    """Base of the errors that hpo raises on purpose."""


class SpecError(HpoError, InputError):
    """A study file that cannot run; `problems` has all of them.

    Attributes:
        sound: the study (a `Spec`) without what is broken, so that the rest can be checked too; None where nothing is left.
        broken: the paths that were left out of it.
    """

    def __init__(self, *problems: Problem, sound: Any = None, broken: frozenset[str] = frozenset()):
        super().__init__(*problems)
        self.sound, self.broken = sound, broken


class NotFound(HpoError):
    """There is no such thing; the message names those that exist."""


class StudyChanged(HpoError, InputError):
    """The study exists and what was written now differs in what may not change."""


class StudyBusy(HpoError):
    """Another live process holds the study."""


class StoreError(HpoError):
    """The record of studies cannot be used."""


class BackendError(HpoError):
    """The cluster cannot run this."""


# What people type, and what it is called here.
SYNONYMS = {
    "time": "seconds", "duration": "seconds", "memory": "peak_bytes", "vram": "peak_bytes", "lr": "learning_rate",
    "r": "rank", "lora_r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "num_epochs": "epochs",
    "num_train_epochs": "epochs", "per_device_train_batch_size": "micro_batch", "target_modules": "targets",
    "lora_target_modules": "targets", "base_model": "model", "qlora": "lora", "tpe": "bayes", "optuna": "bayes",
    "bayesian": "bayes", "nsga": "nsga2", "nsgaii": "nsga2", "evolutionary": "nsga2", "n_trials": "trials",
    "num_samples": "trials", "max_concurrent_trials": "parallel", "acc": "accuracy",
}  # fmt: skip


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns "Did you mean x? " or "", from synonyms first and spelling second."""
    known = list(known)
    guess = SYNONYMS.get(str(name).lower())
    if guess not in known:
        guess = next(iter(difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)), None)
    hint = f"Did you mean {guess}? " if guess else ""
    if str(name).lower() == "qlora":
        hint = "QLoRA is adapter: lora with bits: 4. "
    return hint


_RULES = {
    "dict_type": "must be a mapping", "model_type": "must be a mapping", "model_attributes_type": "must be a mapping",
    "tuple_type": "must be a list", "list_type": "must be a list", "too_short": "must not be empty",
    "string_type": "must be text", "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters", "int_type": "must be a whole number",
    "int_parsing": "must be a whole number", "int_parsing_size": "must be a whole number of at most 18 digits",
    "int_from_float": "must be a whole number", "float_type": "must be a number", "float_parsing": "must be a number",
    "finite_number": "must be a finite number", "bool_type": "must be true or false",
    "greater_than_equal": "must be at least {ge}", "greater_than": "must be above {gt}",
    "less_than_equal": "must be at most {le}", "less_than": "must be below {lt}",
}  # fmt: skip


def rule_of(error: Mapping[str, Any]) -> str:
    """Returns the rule that a value breaks, in words of a study file.

    Args:
        error: one of `pydantic.ValidationError.errors()`.
    """
    limits = {n: f"{v:.0f}" if isinstance(v, float) and v.is_integer() else v for n, v in error.get("ctx", {}).items()}
    if error["type"] in _RULES:
        return _RULES[error["type"]].format(**limits)
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return message[0].lower() + message[1:]


__all__ = [
    "BackendError", "HpoError", "InputError", "NotFound", "Problem", "SpecError", "StoreError", "StudyBusy",
    "StudyChanged", "nearest", "rule_of",
]  # fmt: skip
