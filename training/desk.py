"""Where runs are handed in: to warm groups, or to a fresh one each.

Owns: `Groups`, `run_warm`, `call_warm`. Loads neither torch nor transformers: each trial of a search has a process that does no
more than this. Must not know: Tune, studies, searches.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from training.beside import key_of, takes
from training.errors import InputError, Problem, WorkersFailed, WorkersLost
from training.mailbox import GRACE, LOOK
from training.recipe import Job, Outcome, Progress, Resources


@dataclass(frozen=True)
class Groups:
    """Where runs are done: `warm` groups that take one after another, or a fresh group for each. Other processes can have it."""

    mailbox: Any
    resources: Resources
    storage: str
    warm: bool

    def train(self, job: Job, run: str, *, on_progress: Callable[[Progress], None] = lambda progress: None,
              train: Callable | None = None, grace: float = GRACE, alone: bool = True) -> Outcome:  # fmt: skip
        """Returns the outcome of one job; arguments and errors as `training.workers.run_group` and `training.pool.run_warm`."""
        if self.warm and takes(job.recipe, job.resources) is None:
            return run_warm(job, run, self.mailbox, on_progress=on_progress, grace=grace, alone=alone)
        from training import workers

        return workers.run_group(job, run, self.mailbox, storage=self.storage, on_progress=on_progress, train=train, grace=grace)

    def call(self, function: str, payload: dict[str, Any], run: str) -> Any:
        """Returns `function(**payload)`; arguments and errors as `training.workers.call_on_group`."""
        if self.warm:
            return call_warm(function, payload, run, self.mailbox)
        from training import workers

        return workers.call_on_group(function, payload, self.resources, run=run, storage=self.storage)


def run_warm(
    job: Job, run: str, mailbox: Any, *, on_progress: Callable[[Progress], None] = lambda progress: None, grace: float = GRACE,
    alone: bool = False,
) -> Outcome:  # fmt: skip
    """Returns the outcome of one job on a warm group of the pool behind the mailbox; arguments and errors as `run_group`.

    Args:
        alone: not beside others, also where groups have several seats.
    """
    ray.get(mailbox.submit.remote(run, {"job": job.model_dump_json(), "pack": None if alone else key_of(job)}))
    return _awaited(run, mailbox, on_progress, grace)


def call_warm(function: str, payload: dict[str, Any], run: str, mailbox: Any) -> Any:
    """Returns `function(**payload)` as called on a warm group; arguments and errors as `call_on_group`."""
    ray.get(mailbox.submit.remote(run, {"function": function, "payload": json.dumps(payload)}))
    return _awaited(run, mailbox, lambda progress: None, GRACE)


def _awaited(run: str, mailbox: Any, on_progress: Callable[[Progress], None], grace: float) -> Any:
    killed = False
    while True:
        reports, reason, asked, result = ray.get(mailbox.poll.remote(run, LOOK))
        for report in reports:
            on_progress(Progress.model_validate_json(report))
        if result is not None:
            break
        if asked > grace and not killed:
            killed = True
            ray.get(mailbox.free.remote(run))
        if asked > 2 * grace:
            result = {"lost": "its group did not end"}
            break
    ray.get(mailbox.forget.remote(run))
    if killed and "lost" in result:
        return Outcome(ended="stopped", reason=f"{reason} (killed: it did not end within {grace:g} s)", share=0)
    return _result(result)


def _result(result: dict) -> Any:
    if "outcome" in result:
        return Outcome.model_validate_json(result["outcome"])
    if "value" in result:
        return json.loads(result["value"])
    if "stopped" in result:
        return Outcome(ended="stopped", reason=result["stopped"], share=0)
    if "wrong" in result:
        raise InputError(*(Problem(*said) for said in result["wrong"]))
    if "failed" in result:
        raise WorkersFailed(result["failed"])
    raise WorkersLost(result["lost"])
