"""Training on fresh Ray Train worker groups, one for each job.

Owns: `run_group` (one job on a fresh group), `call_on_group` (any function on a group), `Fit` (one group, of any kind).
Must not know: Tune, studies, searches.

A run ends cooperatively: every report of its main worker is answered with the reason to end, if there is one, and the loop
returns normally; where it is only to pause, or a worker gets SIGTERM, or its node is about to be taken away, it leaves a
checkpoint at its next step. Only a run that does not answer is killed, by removing its placement group, which frees its resources
whether or not Ray's dashboard runs.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import torch
from ray.exceptions import NodeDiedError, RayActorError, WorkerCrashedError
from ray.train import ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.util import get_current_placement_group

from training import own, preemption
from training.errors import InputError, WorkersFailed, WorkersLost
from training.ledger import out_of_memory
from training.mailbox import GRACE
from training.recipe import Job, Outcome, Pause, Progress, Resources
from training.world import World

POLL = 0.25  # seconds between two looks at a run
HEARING = 1.0  # seconds between two times that a worker asks whether it is to pause
# One health check takes part of every fresh group's start and end; Ray's own default of 2 s would add seconds per trial. The
# preemption watcher would be one more process per group; a node that is taken away shows as lost workers all the same.
ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
}
# What Ray Train calls a worker or a group that was lost, by name: not all of these can be imported from a public place.
LOST = {"PreemptionError", "WorkerHealthCheckTimeoutError", "WorkerGroupStartupFailedError"}
# What a worker says whose neighbour died: the neighbour's death is the cause, whichever of the two is seen first.
BEREFT = ("connection closed by peer", "connection reset by peer", "socket closed", "broken pipe", "nccl error",
          "remote process exited")  # fmt: skip


class Raised(Exception):
    """What the training code raised, in words: its own exception might not survive the way to the driver."""


def run_group(
    job: Job,
    run: str,
    mailbox: Any,
    *,
    storage: str,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    train: Callable | None = None,
    grace: float = GRACE,
) -> Outcome:
    """Returns the outcome of one job on a fresh worker group; the group is gone when this returns.

    Waits for the resources of a group as long as it takes, unless the run is asked to end.

    Args:
        job: what to train.
        run: name of this run, unique in the cluster.
        mailbox: a Mailbox actor.
        storage: folder for Ray Train's own files.
        on_progress: is handed every report of the main worker, in order, by this thread.
        train: the train function; default `training.loop.train`. Must be picklable.
        grace: seconds that a run has to end after it was asked to.

    Raises:
        WorkersLost: a worker or its node died.
        WorkersFailed: the training code raised.
        InputError: the training code found the user's mistake.
    """
    config = {"job": job.model_dump_json(), "run": run, "mailbox": mailbox, "train": train, "own": own.now()}
    fit = Fit(_train_worker, config, job.resources, run, storage)
    killed, reason = False, None

    def look() -> float:
        nonlocal reason
        reports, reason, asked, _ = ray.get(mailbox.poll.remote(run))
        for report in reports:
            on_progress(Progress.model_validate_json(report))
        return asked

    while fit.running():
        asked = look()
        if reason:
            fit.leave()
        if asked > grace and not killed:
            killed = True
            ray.get(mailbox.free.remote(run))
        if asked > 2 * grace:
            break  # no workers were there to be killed; should they still come, the mailbox tells them to end
    else:
        look()
        ray.get(mailbox.forget.remote(run))
    if fit.value is not None:
        return Outcome.model_validate_json(fit.value)
    if killed or fit.left:
        said = f"{reason} (killed: it did not end within {grace:g} s)" if killed else reason
        return Outcome(ended="stopped", reason=said, share=0)
    return classify(fit.error)


def call_on_group(function: str, payload: dict[str, Any], resources: Resources, *, run: str, storage: str) -> Any:
    """Returns `function(**payload)` as called by the main worker of a fresh group of one worker with these resources.

    Args:
        function: dotted name, for example training.measure.time_alone. What it takes and returns must be JSON.

    Raises:
        WorkersLost, WorkersFailed, InputError: as `run_group`. What ran out of memory counts as failed.
    """
    config = {"function": function, "payload": json.dumps(payload), "threads": threads_of(resources), "own": own.now()}
    fit = Fit(_call_worker, config, resources.model_copy(update={"workers": 1}), run, storage)
    while fit.running():
        pass
    if fit.error is not None:
        raise WorkersFailed(classify(fit.error).reason)
    return json.loads(fit.value)


class Fit:
    """One Ray Train run in a thread of its own.

    In a thread for two reasons: its caller can look after other things meanwhile, and in the main thread Ray Train would
    take Ctrl-C over, for good.
    """

    def __init__(self, function: Callable, config: dict, resources: Resources, run: str, storage: str):
        self.value: str | None = None
        self.error: BaseException | None = None
        self.left = False  # ended because it was told to, while it waited for resources
        self._leave, self._ended = threading.Event(), threading.Event()
        each = {"CPU": resources.cpus} | ({"GPU": resources.gpus} if resources.gpus else {})
        # One run is one group: whether to try again is decided by the caller, on the record.
        once = ray.train.FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0)
        self._trainer = lambda: TorchTrainer(
            function,
            train_loop_config=config,
            scaling_config=ScalingConfig(num_workers=resources.workers, use_gpu=resources.gpus > 0, resources_per_worker=each),
            torch_config=_Torch(backend="nccl" if resources.gpus else "gloo"),
            run_config=ray.train.RunConfig(name=run, storage_path=storage, failure_config=once),
        )
        threading.Thread(target=self._work, name=f"fit-{run}", daemon=True).start()

    @property
    def ended(self) -> bool:
        """Whether it is over, with a value or an error."""
        return self._ended.is_set()

    def running(self) -> bool:
        """Says whether it still runs, after waiting for a moment."""
        return not self._ended.wait(POLL)

    def leave(self) -> None:
        """Makes this the last time that it waits for resources."""
        self._leave.set()

    def _work(self) -> None:
        try:
            while not self.left:
                try:
                    self.value = self._trainer().fit().return_value
                    return
                except ray.train.ControllerError as error:
                    # No resources within RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S (60 s): other trials have them, or a node
                    # is on its way. Ray Train has removed the placement group, so nothing is left behind by leaving here.
                    if type(error.controller_failure).__name__ != "WorkerGroupStartupTimeoutError":
                        raise
                    self.left = self._leave.is_set()
        except BaseException as error:  # handed to the thread that waits
            self.error = error
        finally:
            self._ended.set()


def _train_worker(config: dict) -> str:
    job, run, mailbox = Job.model_validate_json(config["job"]), config["run"], config["mailbox"]
    main = ray.train.get_context().get_world_rank() == 0
    reason = ray.get(mailbox.started.remote(run, get_current_placement_group())) if main else None
    if reason := World.join().agree(reason):
        return Outcome(ended="stopped", reason=reason, share=0).model_dump_json()
    torch.set_num_threads(threads_of(job.resources))
    threading.Thread(target=_listen, args=(mailbox if main else None, run), name="listen", daemon=True).start()

    def report(progress: Progress) -> str | None:
        return ray.get(mailbox.report.remote(run, progress.model_dump_json())) if main else None

    with _in_words(), own.given(config["own"]):
        return trained(job, config["train"], report).model_dump_json()


def trained(job: Job, train: Callable | None, report: Callable[[Progress], str | None]) -> Outcome:
    """Returns what the train function, by default our loop, makes of a job."""
    if train is None:
        from training.loop import train

        quiet()
    outcome = train(job, report)
    if not isinstance(outcome, Outcome):
        raise TypeError(f"the train function must return an Outcome, got {type(outcome).__name__}")
    return outcome


def called(work: dict) -> str:
    """Returns as JSON what the function named in `work` returns for its payload."""
    module, _, name = work["function"].rpartition(".")
    return json.dumps(getattr(importlib.import_module(module), name)(**json.loads(work["payload"])))


def _listen(mailbox: Any, run: str) -> None:
    """Gives notice where the run is to pause, or its node is about to be taken away: the next report may be far."""
    with contextlib.suppress(RayActorError):
        while not preemption.noticed():
            time.sleep(HEARING)
            if drained() or (mailbox is not None and isinstance(ray.get(mailbox.heard.remote(run)), Pause)):
                preemption.notice()


def drained() -> bool:
    """Says whether this process's node is about to be taken away."""
    # What Ray Train's own watcher asks (ray.train.get_preemption_info), which would be a process more per group.
    return ray.get_runtime_context().get_node_id() in ray._private.state.state.get_draining_nodes()


def _heed_sigterm() -> None:
    preemption.forget()
    signal.signal(signal.SIGTERM, preemption.notice)


class _Heeding(_TorchBackend):
    """Torch's process group, and SIGTERM as a notice: Ray's own handler would end the worker without one more step.

    Signal handlers are set by the main thread, in which Ray runs what a backend asks for; training has a thread of its own.
    """

    def on_start(self, worker_group, backend_config):
        super().on_start(worker_group, backend_config)
        worker_group.execute(_heed_sigterm)


@dataclass
class _Torch(TorchConfig):
    @property
    def backend_cls(self):
        return _Heeding


def _call_worker(config: dict) -> str:
    torch.set_num_threads(config["threads"])
    quiet()
    with _in_words(), own.given(config["own"]):
        return called(config)


@contextlib.contextmanager
def _in_words() -> Iterator[None]:
    try:
        yield
    except (InputError, RayActorError):
        raise
    except Exception as error:
        raise Raised(f"{type(error).__name__}: {error}") from error


def threads_of(resources: Resources) -> int:
    """Returns the torch threads of one worker."""
    return max(1, int(resources.cpus))


def quiet() -> None:
    """Keeps libraries' chatter out of this process's output."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def classify(error: BaseException) -> Outcome:
    """Returns an outcome for what is a result, and raises what is not."""
    failures = [_cause(f) for f in (getattr(error, "worker_failures", None) or {0: error}).values()]
    for failure in failures:
        if isinstance(failure, InputError):
            raise failure
        if out_of_memory(failure):
            return Outcome(ended="infeasible", reason=f"out of memory: {_said(failure)[:200]}", share=0)
    own = [f for f in failures if not _lost(f)]
    said = "; ".join(_said(f)[:1000] for f in (own or failures)[:2])
    raise WorkersFailed(said) if own else WorkersLost(said)


def _cause(error: BaseException) -> BaseException:
    """Returns what an exception of Ray or Ray Train wraps, if it wraps something."""
    for name in ("controller_failure", "health_check_failure", "cause"):
        if isinstance(inner := getattr(error, name, None), BaseException):
            return _cause(inner)
    return error


def _lost(error: BaseException) -> bool:
    gone = isinstance(error, (RayActorError, NodeDiedError, WorkerCrashedError)) or type(error).__name__ in LOST
    return gone or any(words in str(error).lower() for words in BEREFT)


def _said(error: BaseException) -> str:
    return str(error) if isinstance(error, Raised) else f"{type(error).__name__}: {' '.join(str(error).split())}"
