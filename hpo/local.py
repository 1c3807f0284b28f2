"""Runs a search in this process, one trial after another: the specification of the loop.

Owns: `run_search` and `call`. Must not know: Ray.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from hpo.errors import HpoError, InputError
from hpo.search import Search, job_of
from training import preemption
from training.recipe import DataConfig, Outcome, Resources, Train


def run_search(
    search: Search, train: Train, data: DataConfig, *, on_change: Callable[[Search], None] = lambda search: None
) -> None:
    """Runs trials until the search has no more.

    Args:
        search: says which trial is next and keeps what came of it.
        train: trains one.
        data: the study's own copy of the rows.
        on_change: is called after every report and every result.
    """
    while (trial := search.ask()) is not None:

        def report(progress, number=trial.number):
            reason = search.report(number, progress)
            on_change(search)
            return reason

        try:
            outcome = train(job_of(trial, search.spec, data), report)
            if not isinstance(outcome, Outcome):
                raise TypeError(f"the train function must return an Outcome, got {type(outcome).__name__}")
        except (InputError, HpoError):
            raise  # the user's mistake, which every other trial would meet too; or the record's, raised by the report
        except KeyboardInterrupt:
            search.stop("interrupted", resume=True)
            search.put_back(trial.number)
            raise
        except Exception as error:
            search.fail(trial.number, f"{type(error).__name__}: {error}", retry=False)
        else:
            if outcome.ended == "paused" and preemption.noticed():
                search.stop("this process was told to end", resume=True)
            search.tell(trial.number, outcome)
        on_change(search)


def call(function: str, payload: dict[str, Any], resources: Resources) -> Any:
    """Returns `function(**payload)`, called here; `function` is a dotted name such as training.measure.time_alone."""
    module, _, name = function.rpartition(".")
    return getattr(importlib.import_module(module), name)(**payload)
