"""Training on Ray Train worker groups. One of the three files that know Ray.

Owns: `run_group` (one job on a fresh group), `call_on_group` (any function on a group), the flag by which a run is ended.
Must not know: Tune, studies, searches.

A run ends cooperatively: its main worker reads a flag with every report and the loop returns normally. Only a run that does
not answer is killed, by removing its placement group, which frees its resources whether or not Ray's dashboard runs.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
import ray.train
from ray.train import ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util import get_current_placement_group, remove_placement_group

from training.loop import out_of_memory
from training.recipe import Job, Outcome, Progress, Resources

GRACE = 60.0  # seconds between asking a run to end and killing its group
# One health check takes part of every fresh group's start and end; Ray's own default of 2 s would add seconds per trial.
ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process less per group; nothing here reads its notices
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
}


class WorkersLost(Exception):
    """A worker process or its node died: not the recipe's fault."""


class WorkersFailed(Exception):
    """The training code raised: the same recipe would raise it again."""


@ray.remote(num_cpus=0)
class Flags:
    """Which runs are to end, and the placement group of each, so that it can be removed. Lives with its creator."""

    def __init__(self):
        self._stops: dict[str, tuple[str, float]] = {}
        self._groups: dict[str, Any] = {}

    def stop(self, run: str, reason: str) -> None:
        self._stops.setdefault(run, (reason, time.monotonic()))

    def reason(self, run: str) -> str | None:
        return self._stops.get(run, (None, 0.0))[0]

    def asked_for(self, run: str) -> float:
        """Returns the seconds since the run was asked to end, 0 if it was not."""
        return time.monotonic() - self._stops[run][1] if run in self._stops else 0.0

    def started(self, run: str, group: Any) -> None:
        self._groups[run] = group

    def group(self, run: str) -> Any:
        return self._groups.get(run)

    def forget(self, run: str) -> None:
        self._stops.pop(run, None)
        self._groups.pop(run, None)


def run_group(
    job: Job,
    run: str,
    flags: Any,
    *,
    storage: str,
    callbacks: list | None = None,
    train: Callable | None = None,
    grace: float = GRACE,
) -> Outcome:
    """Returns the outcome of one job on a fresh worker group; the group is gone when this returns.

    Args:
        job: what to train.
        run: name of this run, unique in the cluster.
        flags: a Flags actor.
        storage: folder for Ray Train's own files.
        callbacks: Ray Train callbacks, such as the one that passes reports on to Tune.
        train: the train function; default `training.loop.train`. Must be picklable.
        grace: seconds that a run has to end after it was asked to.

    Raises:
        WorkersLost: a worker or its node died.
        WorkersFailed: the training code raised.
    """
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"job": job.model_dump_json(), "run": run, "flags": flags, "train": train},
        **_group(job.resources, run, storage, callbacks),
    )
    box: dict[str, Any] = {}
    thread = threading.Thread(target=_fit, args=(trainer, box), daemon=True)
    thread.start()
    killed = False
    while thread.is_alive():
        thread.join(0.5)
        if not killed and thread.is_alive() and ray.get(flags.asked_for.remote(run)) > grace:
            killed = True
            if (group := ray.get(flags.group.remote(run))) is not None:
                remove_placement_group(group)
    reason = ray.get(flags.reason.remote(run))
    ray.get(flags.forget.remote(run))
    if "error" not in box:
        return Outcome.model_validate_json(box["value"])
    if killed:
        return Outcome(ended="stopped", reason=f"{reason} (killed: it did not end within {grace:.0f} s)", share=0)
    return _classify(box["error"])


def _group(resources: Resources, run: str, storage: str, callbacks: list | None) -> dict:
    each = {"CPU": resources.cpus} | ({"GPU": resources.gpus} if resources.gpus else {})
    return {
        "scaling_config": ScalingConfig(num_workers=resources.workers, use_gpu=resources.gpus > 0, resources_per_worker=each),
        "torch_config": TorchConfig(backend="nccl" if resources.gpus else "gloo"),
        "run_config": ray.train.RunConfig(name=run, storage_path=storage, callbacks=callbacks or []),
    }


def _fit(trainer: TorchTrainer, box: dict) -> None:
    try:
        box["value"] = trainer.fit().return_value
    except BaseException as error:  # handed to the thread that waits
        box["error"] = error


def _train_worker(config: dict) -> str:
    quiet()
    from training import loop

    job, run, flags = Job.model_validate_json(config["job"]), config["run"], config["flags"]
    main = ray.train.get_context().get_world_rank() == 0
    if main:
        ray.get(flags.started.remote(run, get_current_placement_group()))

    def report(progress: Progress) -> str | None:
        ray.train.report({"progress": progress.model_dump_json()})
        return ray.get(flags.reason.remote(run)) if main else None

    return (config["train"] or loop.train)(job, report).model_dump_json()


def call_on_group(function: str, payload: dict[str, Any], resources: Resources, *, run: str, storage: str) -> Any:
    """Returns `function(**payload)` as called by the main worker of a fresh group of one worker with these resources.

    Args:
        function: dotted name, for example training.measure.time_alone. What it takes and returns must be JSON.
    """
    one = resources.model_copy(update={"workers": 1})
    trainer = TorchTrainer(
        _call_worker,
        train_loop_config={"function": function, "payload": json.dumps(payload)},
        **_group(one, run, storage, None),
    )
    return json.loads(trainer.fit().return_value)


def _call_worker(config: dict) -> str:
    quiet()
    module, _, name = config["function"].rpartition(".")
    return json.dumps(getattr(importlib.import_module(module), name)(**json.loads(config["payload"])))


def quiet() -> None:
    """Keeps this process to one torch thread per CPU it was given, and libraries' chatter out of its output."""
    import torch
    from transformers.utils import logging as transformers_logging

    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _classify(error: BaseException) -> Outcome:
    """Returns an outcome for what is a result, and raises what is not."""
    failures = list(getattr(error, "worker_failures", {}).values()) or [error]
    for failure in failures:
        cause = getattr(failure, "cause", None) or failure
        if out_of_memory(failure) or (isinstance(cause, BaseException) and out_of_memory(cause)):
            return Outcome(ended="infeasible", reason=f"out of memory: {str(cause).splitlines()[-1][:200]}", share=0)
    lost = ("ActorDiedError", "ActorUnavailableError", "NodeDiedError", "WorkerCrashedError", "RayActorError", "PreemptionError")
    said = "; ".join(f"{type(f).__name__}: {(str(f).strip().splitlines() or [''])[-1][:300]}" for f in failures[:2])
    if any(name in f"{type(f).__name__} {type(f).__mro__}" for f in (*failures, error) for name in lost):
        raise WorkersLost(said)
    raise WorkersFailed(said)


@contextlib.contextmanager
def flags_of(namespace: str):
    """Yields a new Flags actor that ends with the block."""
    actor = Flags.options(name=f"paretune-flags-{namespace}-{os.getpid()}-{time.monotonic_ns()}").remote()
    try:
        yield actor
    finally:
        ray.kill(actor)
