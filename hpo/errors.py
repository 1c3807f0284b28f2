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
from collections.abc import Iterable

from training.errors import InputError, Problem


class HpoError(Exception):
    """Base of the errors that hpo raises on purpose."""


class SpecError(HpoError, InputError):
    """A study file that cannot run; `problems` has all of them."""


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


__all__ = [
    "BackendError", "HpoError", "InputError", "NotFound", "Problem", "SpecError", "StoreError", "StudyBusy",
    "StudyChanged", "nearest",
]  # fmt: skip
